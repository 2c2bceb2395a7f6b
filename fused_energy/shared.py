"""The few things every implementation needs, so that none of them imports another."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class HeadOptions(NamedTuple):
    """How logits are made of a projection: ``z = softcap(logit_scale · (h Wᵀ) + bias)``, energies at ``temperature``."""

    temperature: float
    logit_scale: float
    softcap: float | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64 (for gradient checks); everything else is accumulated, and returned, in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tail_size(fraction: float, vocabulary: int) -> int:
    """``k = floor(fraction · V)``; the rounding keeps 0.29 · 100 at 29 although it is 28.999999999999996 in binary."""
    return math.floor(round(fraction * vocabulary, 6))


def tail_energy_of_logits(logits: Tensor, k: int, side: str, fill: str, temperature: float) -> Tensor:
    """Energy of rows of logits (R, V) of which only the k largest ("top") or smallest ("bottom") are kept.

    With ``fill="zero"`` every other logit counts as 0 and contributes exp(0) = 1.
    """
    kept = torch.topk(logits, k, dim=-1, largest=side == "top", sorted=False).values / temperature
    others = logits.shape[-1] - k
    if fill == "zero" and others:
        kept = torch.cat([kept, kept.new_full((*kept.shape[:-1], 1), math.log(others))], dim=-1)
    return -temperature * torch.logsumexp(kept, dim=-1)
