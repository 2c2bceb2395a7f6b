"""Methods that prefer other answers to the forgotten ones: NPO, SimNPO, IdkDPO and AltPO, IdkNLL.

NPO and SimNPO prefer anything else; DPO prefers a given alternative: a phrase of not knowing (IdkDPO) or a made-up answer
(AltPO). Each but IdkNLL returns one value per row to forget, (R,), whose mean is the forget part of the loss.

``2/β`` scales all of them, as in the code of OpenUnlearning. The reference's NLL is computed once, before training.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from eua.methods.answers import Answers, Places


def forget_rows(places: Places, **settings: object) -> Tensor:
    """(R,) bool, the rows to forget."""
    return places.rows_with(places.forget)


def npo(answers: Answers, *, beta: float) -> Tensor:
    """NPO (Zhang et al. 2024): ``−(2/β)·log σ(β·(s − s_ref))``, where s is the NLL of the row's answer, summed over its tokens.

    Published settings: β = 0.1, γ = α = 1, learning rate 1e-5 to 5e-5.
    """
    places = answers.places
    excess = places.row_sums(answers.nll - answers.reference, places.forget)
    return -2 / beta * logsigmoid(beta * excess)


def simnpo(answers: Answers, *, beta: float, delta: float) -> Tensor:
    """SimNPO (Fan et al. 2024): ``−(2/β)·log σ(β·(s/|y| − δ))``, with the mean NLL of the answer and no reference.

    Published settings: β = 4.5, δ = 0, γ = 0.125, α = 1.
    """
    places = answers.places
    tokens = places.row_sums(places.forget.to(answers.nll.dtype), places.forget)
    mean = places.row_sums(answers.nll, places.forget) / tokens.clamp(min=1)
    return -2 / beta * logsigmoid(beta * (mean - delta))


def dpo(answers: Answers, *, beta: float) -> Tensor:
    """DPO (Rafailov et al. 2023): ``−(2/β)·log σ(β·[(s_l − s_l,ref) − (s_w − s_w,ref)])``.

    l is the answer to forget, w the alternative to the same prompt, whose row follows in the batch. IdkDPO (Maini et al. 2024)
    and AltPO (Mekala et al. 2024) differ in where the alternative comes from.

    Published settings: β = 0.1, γ = α = 1; AltPO at its best: learning rate 5e-5, α = 2, 10 epochs.
    """
    places = answers.places
    excess = answers.nll - answers.reference
    forgotten = places.row_sums(excess, places.forget)
    preferred = places.row_sums(excess, places.alternative).roll(-1)  # of the row that follows
    return -2 / beta * logsigmoid(beta * (forgotten - preferred))


def alternative_nll(answers: Answers) -> Tensor:
    """IdkNLL (Maini et al. 2024): ``nll`` of a phrase of not knowing, (B, S−1), averaged over its tokens.

    Published settings: γ = 1, learning rate 1e-5 to 5e-5, α 1 to 10.
    """
    return answers.nll
