"""Functions of a token's logits, computed for a few tokens at a time, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_tiles(function: Callable[..., Tensor], *tensors: Tensor, tile: int = 64) -> Tensor:
    """``function`` of ``tile`` tokens at a time: tensors (N, …) → (N,).

    What the function computes inside is computed again in the backward pass instead of being kept; only its arguments are kept.
    """
    parts = zip(*(tensor.split(tile) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
