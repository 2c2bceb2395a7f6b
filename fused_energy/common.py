"""What all implementations share, so that none of them imports another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SCRATCH_BYTES = 8 * 2**20  # of one float32 tile; a few tiles are alive at a time, whatever N, H and V
TAIL_TILES = 6  # as many tiles are one block of full rows of logits: each block reads the whole head
GPU_TILES = 4  # times as large are blocks on a GPU, which is idle between small ones
LEFT_OUT = -1  # the target of an ignored token, which replaces ``ignore_index``
OUT_OF_RANGE = 2**62  # the target that replaces labels below zero; its NLL is NaN, as for any target outside the vocabulary
NO_VMAP = (
    "linear_energy was called under torch.vmap, which it does not support: tokens are independent, and hidden may have any "
    "number of leading dimensions. Pass them all in one call."
)


class HeadOptions(NamedTuple):
    """How logits follow from a projection, ``z = softcap(logit_scale · (h Wᵀ) + bias)``, and the energy's ``temperature``."""

    temperature: float
    logit_scale: float
    softcap: float | None

    def temperatures(self, with_targets: bool) -> tuple[float, ...]:
        """The temperatures at which the energy is needed: the energy's and, for an NLL, 1 as the last one."""
        return (self.temperature, 1.0) if with_targets and self.temperature != 1.0 else (self.temperature,)

    def column_of_temperatures(self, with_targets: bool, like: Tensor) -> Tensor:
        """The temperatures as a column (K, 1), to divide a tensor (K, N) by."""
        return like.new_tensor(self.temperatures(with_targets))[:, None]


class Pass(NamedTuple):
    """The result of one pass over the vocabulary; K temperatures, N tokens. Zero for ignored tokens.

    ``weighted`` does not depend on the upstream gradient and reduces the gradient of the hidden states to a scaling of rows. It
    excludes the target's column: if the target holds nearly all of the probability, the gradient of the NLL is a small
    difference, which would be lost when the sum is rounded to the dtype of ``hidden``.
    """

    energy: Tensor  # (K, N): −T_k · logsumexp(z / T_k); softmax(z/T_k) is exp((z + energy) / T_k), without loss at a small T
    target_logit: Tensor  # (N,), NaN for a target outside the vocabulary; (0,) without targets
    weighted: Tensor  # (K, N, H): Σ_{v ≠ y} softmax(z/T_k)_v · slope_v · W_v, dtype of hidden; (0,) if not stored


def empty_pass(hidden: Tensor, targets: Tensor | None, options: HeadOptions, store: bool) -> Pass:
    """The outputs before they are filled: those of N ignored tokens."""
    n, h = hidden.shape
    k = len(options.temperatures(targets is not None))
    floats = hidden.new_empty(0, dtype=accumulation_dtype(hidden.dtype))
    return Pass(
        floats.new_zeros(k, n),
        floats.new_empty(0) if targets is None else torch.where(targets == LEFT_OUT, 0.0, torch.nan).to(floats.dtype),
        hidden.new_zeros((k, n, h) if store else 0),
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64 (for gradient checks); everything else is accumulated and returned in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def blocks(length: int, size: int) -> Iterator[slice]:
    """Slices of length at most ``size`` that cover ``range(length)``."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def rows_within_scratch(width: int, tiles: int = 1) -> int:
    """The number of rows of ``width`` float32 numbers that fit into as many tiles of scratch memory; at least one."""
    return max(1, tiles * SCRATCH_BYTES // (4 * width))


def tiles_of_tails(hidden: Tensor) -> int:
    """The size of a block of full rows of logits, in tiles."""
    return TAIL_TILES * (GPU_TILES if hidden.is_cuda else 1)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in the accumulation dtype; half-precision products are not rounded if the device supports that."""
    dtype = accumulation_dtype(left.dtype)
    if left.is_cuda and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _power_against_overflow(hidden: Tensor, weight: Tensor, scale: float) -> float:
    """The part of ``scale`` that the hidden states must have before the product, as a power of two, which rounds nothing.

    Off a GPU the product is rounded to float16, whose range ends at 65504. No larger part, because small hidden states would
    become subnormal.
    """
    largest = [float(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).max()) for x in (hidden, weight)]
    excess = largest[0] * largest[1] / torch.finfo(torch.float16).max
    if not excess > 1:  # also if it is NaN
        return 1.0
    return 2.0 ** -min(math.ceil(math.log2(min(excess, 1e30))), -math.floor(math.log2(abs(scale))))


def tile_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Tensor:
    """One tile of logits: (R, H), (V', H) → (R, V'), in the accumulation dtype."""
    scale = options.logit_scale
    if hidden.dtype == torch.float16 and not hidden.is_cuda and 0 < abs(scale) < 1:
        power = _power_against_overflow(hidden, weight, scale)
        hidden, scale = hidden * power, scale / power
    z = matmul(hidden, weight.T)
    if scale != 1.0:
        z *= scale
    if bias is not None:
        z += bias
    if options.softcap is not None:
        z = z.div_(options.softcap).tanh_().mul_(options.softcap)
    return z


def softcap_slope(z: Tensor, softcap: float | None) -> Tensor | None:
    """d softcap(x) / dx, computed from the capped value: ``1 − (z/c)²``. None without a cap."""
    return None if softcap is None else 1 - (z / softcap).square()


def rows_of_targets(weight: Tensor, targets: Tensor) -> Tensor:
    """The rows (R, H) of the head for targets (R,); an arbitrary row for ignored tokens."""
    return weight[targets.clamp(0, weight.shape[0] - 1)]


def active_tokens(targets: Tensor | None, grad_energy: Tensor, grad_target: Tensor) -> Tensor:
    """Which tokens have a nonzero upstream gradient, of the energy (K, N) or of the target's logit (N,): (N,) bool."""
    active = (grad_energy != 0).any(dim=0)
    return active if targets is None else active | (grad_target != 0)


def target_coefficient(options: HeadOptions, done: Pass, grad_energy: Tensor, grad_target: Tensor) -> Tensor:
    """``(g_y − Σ_k g_k·p_k(y))·slope_y``, (N,): the gradient of the target's logit before the softcap."""
    temperatures = options.column_of_temperatures(True, grad_energy)
    p = torch.exp((done.target_logit + done.energy) / temperatures)
    coefficient = grad_target - (grad_energy * p).sum(dim=0)
    slope = softcap_slope(done.target_logit, options.softcap)
    return coefficient if slope is None else coefficient * slope


def hidden_gradient(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor | None,  # (N,)
    options: HeadOptions,
    done: Pass,
    grad_energy: Tensor,  # (K, N)
    grad_target: Tensor,  # (N,), ignored without targets
    target_rows: Callable[[Tensor, Tensor], Tensor] = rows_of_targets,
) -> Tensor:
    """``s·((g_y − Σ_k g_k·p_k(y))·slope_y·W_y − Σ_k g_k·U_k)``, (N, H): the logits are not computed again.

    If all upstream gradients of a token are zero, its gradient is zero, whatever its hidden state holds.
    """
    active = active_tokens(targets, grad_energy, grad_target)
    of_target = None if targets is None else target_coefficient(options, done, grad_energy, grad_target)
    gradient = torch.empty_like(hidden)
    for rows in blocks(hidden.shape[0], rows_within_scratch(hidden.shape[1], GPU_TILES if hidden.is_cuda else 1)):
        total = done.weighted[0, rows].to(grad_energy.dtype) * -grad_energy[0, rows, None]
        for k in range(1, len(grad_energy)):
            total -= done.weighted[k, rows] * grad_energy[k, rows, None]
        if targets is not None and of_target is not None:
            total += target_rows(weight, targets[rows]) * of_target[rows, None]
        gradient[rows] = total.mul_(options.logit_scale).masked_fill_(~active[rows, None], 0.0)
    return gradient


def tail_size(fraction: float, vocabulary: int) -> int:
    """``k = floor(fraction · V)``; the rounding makes 0.29 · 100 equal 29, although it is 28.999999999999996 in binary."""
    return math.floor(round(fraction * vocabulary, 6))


def tail_energy_of_logits(logits: Tensor, k: int, side: str, fill: str, temperature: float, vocabulary: int) -> Tensor:
    """Energy of the k largest ("top") or smallest ("bottom") logits of each row (R, ≥ k).

    With ``fill="zero"`` every other logit of the vocabulary counts as 0 and contributes exp(0) = 1.
    """
    kept = torch.topk(logits, k, dim=-1, largest=side == "top", sorted=False).values / temperature
    others = vocabulary - k
    if fill == "zero" and others:
        kept = torch.cat([kept, kept.new_full((*kept.shape[:-1], 1), math.log(others))], dim=-1)
    return -temperature * torch.logsumexp(kept, dim=-1)
