"""The definition of energy and NLL, in a few lines of plain PyTorch that materialize the logits (N, V).

Every other implementation is tested against this one; autograd computes the gradients. Keep it short enough to check by eye.
"""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor

from fused_energy.common import LEFT_OUT, HeadOptions, accumulation_dtype, tail_energy_of_logits


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Tensor:
    """``softcap(logit_scale · (h Wᵀ) + b)``: (N, H), (V, H) → (N, V), float32 (float64 for float64)."""
    dtype = accumulation_dtype(hidden.dtype)
    z = options.logit_scale * einsum(hidden.to(dtype), weight.to(dtype), "n h, v h -> n v")
    if bias is not None:
        z = z + bias.to(dtype)
    return z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)


def linear_energy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor | None,  # (N,), within the vocabulary or LEFT_OUT
    bias: Tensor | None,  # (V,)
    options: HeadOptions,
) -> tuple[Tensor, Tensor | None]:
    """``E = −T · logsumexp(z/T)`` and ``NLL = logsumexp(z) − z_y``, each (N,); both are 0 for ignored tokens."""
    if targets is None:
        return _energy(logits(hidden, weight, bias, options), options.temperature), None
    counted = (targets != LEFT_OUT).nonzero()[:, 0]
    z = logits(hidden[counted], weight, bias, options)
    energy, nll = _energy(z, options.temperature), -_energy(z, 1.0) - z.gather(-1, targets[counted, None])[:, 0]
    zeros = energy.new_zeros(len(hidden))
    return zeros.index_put((counted,), energy), zeros.index_put((counted,), nll)


def _energy(z: Tensor, temperature: float) -> Tensor:
    return -temperature * torch.logsumexp(z / temperature, dim=-1)


def tail_energy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    k: int,
    side: str,
    fill: str,
    bias: Tensor | None,
    options: HeadOptions,
) -> Tensor:
    """The energy of the k largest or smallest logits of each token, (N,)."""
    return tail_energy_of_logits(logits(hidden, weight, bias, options), k, side, fill, options.temperature, weight.shape[0])
