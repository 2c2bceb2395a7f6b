"""Methods that need more of a token's distribution than the NLL of its answer: ME+GD, PDU, UNDIAL.

Only UNDIAL needs the whole distribution, in tiles of bounded size; the others need the mean and the maximum of the logits.
Each returns the values whose mean over the counted positions is the forget part of the loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eua.data.rows import IGNORE_INDEX
from eua.methods.answers import Answers, Places
from eua.methods.tiles import in_tiles
from eua.model.head import Head


def maximum_entropy(answers: Answers) -> Tensor:
    """ME (Yuan et al. 2024, "A closer look at machine unlearning"): ``KL(uniform ‖ p) = −E − mean_v z − ln V``, (B, S−1).

    Published settings of ME+GD: γ = 0.1, α = 1, learning rate 1e-5, 5 epochs.
    """
    hidden, head = _states(answers)
    return -answers.energy - head.mean_logit(hidden[:, :-1]) - math.log(head.vocabulary)


def flatness(answers: Answers) -> Tensor:
    """PDU (primal-dual unlearning, Entesari et al. 2025): ``(max_v z − mean_v z)²``, (B, S−1), which is 0 for flat logits.

    The weight of the retain part is a multiplier that rises while the retained rows' NLL is above a bound:
    :func:`next_multiplier`.

    Published settings for TOFU: γ = 1, α = 100 (the multiplier's start), bound ε = 0.3, step η = 5, warm-up of 5 epochs, 10
    epochs.
    """
    return _flatness(answers, answers.places.forget)


def flatness_as_released(answers: Answers) -> Tensor:
    """As :func:`flatness`, at the positions of the answers' tokens instead of those that predict them, (B, S)."""
    return _flatness(answers, answer_positions(answers.places))


def answer_positions(places: Places, **settings: object) -> Tensor:
    """(B, S) bool, the positions of the tokens to forget: the mask that the released code of PDU and RMU does not shift."""
    return (places.labels != IGNORE_INDEX) & places.of_forget


def next_multiplier(multiplier: float, nll: float, bound: float, step: float) -> float:
    """PDU's weight of the retain part after a step: ``max(0, λ + η·(NLL − ε))``.

    >>> next_multiplier(100.0, 1.44019, 0.3, 5.0)
    105.70095
    """
    return max(0.0, multiplier + step * (nll - bound))


def self_distillation(answers: Answers, *, beta: float) -> Tensor:
    """UNDIAL (Dong et al. 2024): ``−Σ_v q log p`` with ``q = softmax(z_ref − β·onehot(y))``, (B, S−1).

    The model learns the reference's prediction without the answer's token.

    Published settings: β = 10, γ = 1, α = 0, learning rate 1e-4, LoRA of rank 8.
    """
    places = answers.places
    return _distilled(answers, places.forget, places.labels[:, 1:], beta)


def self_distillation_as_released(answers: Answers, *, beta: float) -> Tensor:
    """As :func:`self_distillation`, at all positions of the rows to forget, prompt and padding included.

    Where no answer token is predicted, β is taken off the logit of token V − 100, since −100 is the label there.
    """
    places = answers.places
    _, head = _states(answers)
    labels = places.labels[:, 1:]
    return _distilled(answers, every_position(places), labels.where(labels >= 0, head.vocabulary + labels), beta)


def every_position(places: Places, **settings: object) -> Tensor:
    """(B, S−1) bool, all positions of rows to forget."""
    return places.of_forget[:, 1:]


def _states(answers: Answers) -> tuple[Tensor, Head]:
    if answers.hidden is None or answers.head is None:
        raise ValueError("this method reads hidden states and head: give them to Answers")
    return answers.hidden, answers.head


def _flatness(answers: Answers, counted: Tensor) -> Tensor:
    """At the positions of a mask, which is as wide as the hidden states or leaves the last position out."""
    hidden, head = _states(answers)
    states = hidden[:, : counted.shape[1]][counted]
    with torch.no_grad():
        largest = head.most_likely(states)
    values = (head.logit(states, largest) - head.mean_logit(states)).square()
    empty = torch.zeros(counted.shape, dtype=values.dtype, device=values.device)
    return empty.masked_scatter(counted, values)


def _distilled(answers: Answers, tokens: Tensor, targets: Tensor, beta: float) -> Tensor:
    hidden, head = _states(answers)
    if answers.ref_hidden is None or answers.ref_head is None:
        raise ValueError("UNDIAL compares with the model before unlearning: give its states to Answers")
    ref_head = answers.ref_head

    def cross_entropy(states: Tensor, ref_states: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = ref_head.logits(ref_states)
            teacher.scatter_add_(1, target[:, None], torch.full_like(target[:, None], -beta, dtype=teacher.dtype))
            teacher = teacher.softmax(dim=-1)
        return -(teacher * head.logits(states).log_softmax(dim=-1)).sum(dim=-1)

    states = hidden[:, :-1][tokens].to(head.weight.dtype)
    ref_states = answers.ref_hidden[:, :-1][tokens].to(ref_head.weight.dtype)
    values = in_tiles(cross_entropy, states, ref_states, targets[tokens])
    return torch.zeros_like(answers.energy).masked_scatter(tokens, values.to(answers.energy.dtype))
