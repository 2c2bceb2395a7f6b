"""What the launches of a pass share: its arguments, tokens to compute, sizes, and matrix products."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fused_energy.common import HeadOptions

FORWARD_BYTES = 48 * 2**20  # of a chunk of logits, whatever N and V; a third of it more for the sums made from it
BACKWARD_BYTES = 64 * 2**20  # of a chunk of logits, which has a row for every token, up to TOKENS_AT_ONCE
SPLIT_BYTES = 2**20  # of partial maxima, and as much for each partial sum
PROGRAMS = 2048  # enough to fill any GPU several times over; fewer, longer programs fold more of the vocabulary on the chip
TOKENS_AT_ONCE = 8192  # whose gradients of logits are held for one product with the hidden states
LONGEST_ROW = 16384  # columns of a chunk, which one program reads at once
STEP = 128  # rows and columns of a chunk are a multiple of it, unless there are fewer, so that products use whole tiles


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
        """The compile-time arguments of every kernel that has logits."""
        return {
            "HAS_BIAS": self.has_bias,
            "HAS_SOFTCAP": self.options.softcap is not None,
        }

    def chunk(self, rows: int, size: int) -> tuple[Tensor, Tensor]:
        """Room for float32 logits of ``rows`` tokens within ``size`` bytes, and the same memory in the dtype of the head."""
        width = whole_steps(min(LONGEST_ROW, size // (4 * rows)), self.vocabulary)
        aligned = (width + 7) // 8 * 8  # as the matrix library needs it for its fast products
        products = self.hidden.new_empty(rows, aligned, dtype=torch.float32)
        return products, products.view(self.hidden.dtype)


def program_of_row(width: int) -> dict[str, int]:
    """The block that covers a row, and enough warps to hold it in registers."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 1024))}


def in_graph(hidden: Tensor) -> bool:
    """Whether the launches are being recorded into a CUDA graph."""
    return hidden.is_cuda and torch.cuda.is_current_stream_capturing()


def chosen_tokens(chosen: Tensor | None, hidden: Tensor) -> tuple[Tensor | None, Tensor]:
    """The indices of the tokens to compute, None for all, and their hidden states.

    The host must know how many there are, and waits for the device. In a CUDA graph it cannot, so all tokens are computed, with
    hidden states of zero for those that are left out.
    """
    if chosen is None:
        return None, hidden
    if in_graph(hidden):
        return None, hidden.masked_fill(~chosen[:, None], 0.0)
    tokens = chosen.nonzero()[:, 0]
    return (None, hidden) if len(tokens) == len(chosen) else (tokens, hidden[tokens])


def whole_steps(size: int, length: int) -> int:
    """``size``, but a multiple of ``STEP`` if that fits, at most ``length`` and at least 1."""
    return min(length, max(1, size // STEP * STEP or size))


def product(left: Tensor, right: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """``out = scale · left @ right``; half precision is multiplied exactly and summed in float32, then rounded to ``out``."""
    if not left.is_cuda:  # the interpreter; a CPU would round a product of half precision to half precision
        out.copy_(scale * (left.to(torch.float32) @ right.to(torch.float32)))
    elif out.dtype != left.dtype:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
        if scale != 1.0:
            out *= scale
    elif scale == 1.0:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """``sums += left @ right`` in float32."""
    if not left.is_cuda:
        sums.addmm_(left.to(torch.float32), right.to(torch.float32))
    elif sums.dtype == left.dtype:
        sums.addmm_(left, right)
    else:
        torch.addmm(sums, left, right, out_dtype=sums.dtype, out=sums)
