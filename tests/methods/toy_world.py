"""A bigram model small enough to compute by hand: the logits at a position depend on the token there only.

The hidden state of a token is its one-hot vector and the head's matrix is Aᵀ, so ``h Wᵀ`` is the token's row of A. Values that
tests compare with were printed by the code that the methods' authors released, run on this world.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from eua.data.batches import ForgetRetainCollator
from eua.data.rows import EncodedRow
from eua.methods.answers import Answers, Places
from eua.model.head import Head

A = [[0, 1, 2, 3], [1, 0, -1, 2], [2, 2, 0, 1], [-1, 3, 1, 0]]
B = [[1, 0, 0, 2], [0, 1, 1, 0], [2, 0, 1, 1], [0, 2, 2, -1]]  # the model before unlearning
FORGET = [EncodedRow([1, 2, 3, 0, 2], 2), EncodedRow([3, 1, 0], 1)]  # the second is padded with two zeros
RETAIN = [EncodedRow([2, 0, 1, 3], 2)]
ALTERNATIVE = [EncodedRow([1, 2, 0, 1], 2), EncodedRow([3, 2, 2], 1)]


def matrix(rows: list[list[int]], vocabulary: int = 4) -> Tensor:
    """A head (V, 4) in float64; tokens beyond the four have the logit −3."""
    padded = [[*row, *[-3] * (vocabulary - 4)] for row in rows]
    return torch.tensor(padded, dtype=torch.float64).T.contiguous().requires_grad_()


def answers_of(
    items: list[list[tuple[str, EncodedRow]]], weight: Tensor, ref_weight: Tensor, figure: str | None = None
) -> Answers:
    """What losses read of a batch of the toy world.

    Args:
        items: for each forget row the kinds and rows that are trained on together.
        weight: the head (V, 4) of the model.
        ref_weight: that of the model before unlearning.
        figure: its figure that the method compares with, "nll" or None.
    """
    entries = [
        [{"row": row, "reference": torch.zeros(len(row.answer_ids)), "kind": kind} for kind, row in item] for item in items
    ]
    batch = ForgetRetainCollator()(entries)
    places = Places.of(batch)
    hidden = one_hot(batch["input_ids"], 4).double()
    head, ref_head = Head(weight, None), Head(ref_weight.detach(), None)
    energy, nll = head.energy_and_nll(hidden[:, :-1], batch["labels"][:, 1:], 1.0)
    reference = torch.zeros_like(nll)
    if figure == "nll":
        reference = ref_head.energy_and_nll(hidden[:, :-1], batch["labels"][:, 1:], 1.0).nll
    return Answers(places, energy, nll, reference, hidden, head, hidden, ref_head)
