"""How well scores tell two groups apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive score exceeds a negative one, ties counted half (Mann–Whitney)."""
    order = negative.sort().values
    below = torch.searchsorted(order, positive, right=False)
    up_to = torch.searchsorted(order, positive, right=True)
    return float((below + up_to).double().mean() / (2 * len(negative)))


def false_positive_rate(positive: Tensor, negative: Tensor, true_positive_rate: float = 0.95) -> float:
    """Share of negative scores at or above the threshold that keeps ``true_positive_rate`` of the positive ones."""
    rank = math.ceil(round(len(positive) * true_positive_rate, 9))
    threshold = positive.sort(descending=True).values[rank - 1]
    return float((negative >= threshold).double().mean())
