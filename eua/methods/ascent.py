"""Methods that make forgotten tokens less likely, one token at a time: GradAscent, GradDiff, WGA, SatImp, CE-U.

Each returns the values (B, S−1) whose mean over the tokens to forget is the forget part of the loss. They read nothing but the
NLL, so no logits are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eua.methods.answers import Answers, Places


def gradient_ascent(answers: Answers) -> Tensor:
    """``−nll``: GradAscent without a retain part (Jang et al. 2023), GradDiff with one (Liu et al. 2022).

    Published settings: GradDiff γ = α = 1, learning rate 1e-5 to 5e-5, α 1 to 10, 5 or 10 epochs.
    """
    return -answers.nll


def weighted_gradient_ascent(answers: Answers, *, beta: float) -> Tensor:
    """WGA (Wang et al. 2025): ``−p(y)^β · nll``, where the weight has no gradient, so unlikely tokens are pushed less.

    Published settings: β = 1, γ = α = 1, 5 epochs.
    """
    return -(-beta * answers.nll.detach()).exp() * answers.nll


def saturation_importance(answers: Answers, *, beta: float, beta2: float) -> Tensor:
    """SatImp (Yang et al. 2025): ``−p(y)^β · (1 − p(y))^β₂ · nll``, where the weight has no gradient.

    Published settings: β = 5, β₂ = 1, γ = 0.1, α = 1, 5 epochs.
    """
    p = (-answers.nll.detach()).exp()
    return -(p**beta * (1 - p).clamp(min=0) ** beta2) * answers.nll


LARGEST_WEIGHT = 1e4


def ce_u(answers: Answers, *, skip_first: int) -> Tensor:
    """CE-U (Yang 2025): the cross-entropy with the model's own prediction without the true token.

    With ``q = p`` without y, renormalized and without a gradient, the gradient of ``−Σ q log p`` is that of
    ``−p(y)/(1 − p(y)) · nll`` with a weight that has no gradient. That is what is computed, so the value is not that of the
    cross-entropy. The weight, which has no bound as p(y) → 1, is at most 1e4.

    Published settings: learning rate 1e-5, the first token of each row's answer left out, no retain part.
    """
    p = (-answers.nll.detach()).exp()
    return -(p / (1 - p).clamp(min=torch.finfo(p.dtype).tiny)).clamp(max=LARGEST_WEIGHT) * answers.nll


def after_the_first(places: Places, *, skip_first: int) -> Tensor:
    """(B, S−1) bool, the tokens to forget without the first ones of each row."""
    before = places.forget.int().cumsum(dim=1)  # the number of tokens up to here, in a row of the batch
    if places.row.shape[0] == 1 and places.rows > 1:  # rows that follow one another: count anew in each
        row = places.row[:, 1:]
        starts = torch.cat([row.new_ones(1, 1, dtype=torch.bool), row[:, 1:] != row[:, :-1]], dim=1)
        before = before - torch.where(starts, before - places.forget.int(), 0).cummax(dim=1).values
    return places.forget & (before > skip_first)
