"""RMU (Li et al. 2024, the WMDP paper): inner hidden states of forgotten rows are steered towards a random vector.

Published settings: γ = α = 1, κ = 2, block 7 of OpenUnlearning's models, all parameters trained (the original code trains the
down-projections of three blocks, κ = 20).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from eua.data.rows import IGNORE_INDEX
from eua.methods.answers import Answers


def control_vector(size: int, steering: float, seed: int) -> Tensor:
    """``κ·u/‖u‖`` with u uniform in [0, 1]^H, (H,): the same for every step of a run."""
    return steering * normalize(torch.rand(size, generator=torch.Generator().manual_seed(seed)), dim=0)


def steered(answers: Answers, *, layer: int, steering: float) -> Tensor:
    """The mean squared distance of a row's states from the control vector, over the positions that predict its answer, (R,)."""
    inner, _ = _inner(answers)
    goal = control_vector(inner.shape[-1], steering, answers.seed).to(inner)
    return _row_means(answers, (inner - goal).square().mean(dim=-1)[:, :-1], answers.places.forget)


def kept(answers: Answers) -> Tensor:
    """The mean squared distance of a retained row's states from those of the model before unlearning, (R,)."""
    inner, ref = _inner(answers)
    if ref is None:
        raise ValueError("RMU compares retained rows with the model before unlearning: give ref_inner to Answers")
    return _row_means(answers, (inner - ref).square().mean(dim=-1)[:, :-1], answers.places.retain)


def steered_as_released(answers: Answers, *, layer: int, steering: float) -> Tensor:
    """As :func:`steered` in OpenUnlearning, (1,) for a batch.

    Its mask marks the tokens of the answers instead of the positions that predict them, and its mean over rows is the product
    of two means, ``mean_i S_i · mean_j 1/n_j`` for rows of n tokens whose distances sum to S, because a dimension is kept.
    """
    inner, _ = _inner(answers)
    goal = control_vector(inner.shape[-1], steering, answers.seed).to(inner)
    return _product_of_means(answers, (inner - goal).square().mean(dim=-1), answers.places.of_forget)


def kept_as_released(answers: Answers) -> Tensor:
    """As :func:`kept`, with the mask and the mean of :func:`steered_as_released`, (1,)."""
    inner, ref = _inner(answers)
    if ref is None:
        raise ValueError("RMU compares retained rows with the model before unlearning: give ref_inner to Answers")
    of_retain = ~(answers.places.of_forget | answers.places.of_alternative)
    return _product_of_means(answers, (inner - ref).square().mean(dim=-1), of_retain)


def _inner(answers: Answers) -> tuple[Tensor, Tensor | None]:
    if answers.inner is None:
        raise ValueError("RMU reads the output of a block: give it to Answers as inner")
    # In bfloat16 a count of tokens would end at 256, and in float16 squares overflow.
    return answers.inner.float(), None if answers.ref_inner is None else answers.ref_inner.float()


def _row_means(answers: Answers, values: Tensor, tokens: Tensor) -> Tensor:
    count = answers.places.row_sums(tokens.to(values.dtype), tokens)
    return answers.places.row_sums(values, tokens) / count.clamp(min=1)


def _product_of_means(answers: Answers, values: Tensor, of_rows: Tensor) -> Tensor:
    """From values (B, S) at the labelled positions of some rows."""
    labelled = (answers.places.labels != IGNORE_INDEX) & of_rows
    count = labelled.sum(dim=1)
    sums = values.where(labelled, 0.0).sum(dim=1)
    rows = count > 0
    return sums[rows].mean()[None] * (1 / count[rows]).mean() if rows.any() else sums.new_zeros(1)
