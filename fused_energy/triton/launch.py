"""What the launches of a pass share: its arguments, tokens to compute, sizes, and matrix products."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fused_energy.common import HeadOptions
from fused_energy.triton import configs

SCRATCH_BYTES = 32 * 2**20  # of a chunk of logits; what is made from it takes as much, whatever N and V
SPLIT_BYTES = 2**20  # of partial maxima, and as much for each partial sum
PROGRAMS = 2048  # enough to fill any GPU several times over; fewer, longer programs fold more of the vocabulary on the chip
TOKENS_AT_ONCE = 8192  # whose gradients of logits are held for one product with the hidden states
FEWEST_ROWS = 512  # of a chunk of logits: with fewer, its product would not fill a GPU
STEP = 128  # rows and columns of a chunk are a multiple of it, unless there are fewer, so that products use whole tiles
LARGEST_BLOCK = 4096  # columns that one program reads at a time


class Problem:
    """Tokens (N, H), all of them to be computed, and a head (V, H)."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None, options: HeadOptions
    ) -> None:
        self.hidden, self.weight, self.options = hidden, weight, options
        self.tokens, self.hidden_size = hidden.shape
        self.vocabulary = weight.shape[0]
        self.has_bias, self.has_targets = bias is not None, targets is not None
        self.and_at_one = targets is not None and options.temperature != 1.0
        # Kernels take a pointer for everything; a pointer that stands for None is never read.
        self.bias = hidden if bias is None else bias.contiguous()
        self.targets = hidden if targets is None else targets

    def options_of_logits(self) -> tuple[float, float]:
        """The arguments ``logit_scale`` and ``softcap``."""
        return float(self.options.logit_scale), float(self.options.softcap or 0.0)

    def flags(self) -> dict[str, bool]:
        """The compile-time arguments that every kernel takes."""
        return {
            "HAS_BIAS": self.has_bias,
            "HAS_SOFTCAP": self.options.softcap is not None,
            "HAS_TARGETS": self.has_targets,
        }

    def block(self, width: int) -> dict[str, int]:
        """The columns that the program of a row reads at a time, and its warps."""
        if configs.interpreted(self.hidden.device):
            return {"BLOCK": 32}  # so that tests read several
        size = min(LARGEST_BLOCK, triton.next_power_of_2(width))
        return {"BLOCK": size, "num_warps": 8 if size >= 1024 else 4}


def chosen_tokens(chosen: Tensor | None, hidden: Tensor) -> tuple[Tensor | None, Tensor]:
    """The indices of the tokens to compute, None for all, and their hidden states.

    The host must know how many there are, and waits for the device. In a CUDA graph it cannot, so all tokens are computed, with
    hidden states of zero for those that are left out.
    """
    if chosen is None:
        return None, hidden
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        return None, hidden.masked_fill(~chosen[:, None], 0.0)
    tokens = chosen.nonzero()[:, 0]
    return (None, hidden) if len(tokens) == len(chosen) else (tokens, hidden[tokens])


def whole_steps(size: int, length: int) -> int:
    """``size``, but a multiple of ``STEP`` if that fits, at most ``length`` and at least 1."""
    return min(length, max(1, size // STEP * STEP or size))


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``out = left @ right``; half precision is multiplied exactly and summed in float32, whatever the dtype of ``out``."""
    if not left.is_cuda:  # the interpreter; a CPU would round a product of half precision to half precision
        out.copy_(left.to(torch.float32) @ right.to(torch.float32))
    elif out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """``sums += left @ right`` in float32."""
    if not left.is_cuda:
        sums.addmm_(left.to(torch.float32), right.to(torch.float32))
    elif sums.dtype == left.dtype:
        sums.addmm_(left, right)
    else:
        torch.addmm(sums, left, right, out_dtype=sums.dtype, out=sums)
