"""What the losses of unlearning methods read of a batch: answer tokens, and the model's figures at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eua.data.rows import IGNORE_INDEX
from eua.model.head import Head


class Places(NamedTuple):
    """Which positions of a batch belong to which answers; needs no model.

    A token is predicted at the position before it, so masks of tokens are (B, S−1): place t is where token t + 1 is predicted.

    Attributes:
        labels: (B, S), the ids of answer tokens, −100 elsewhere.
        of_forget: (B, S) bool, positions in rows to forget.
        of_alternative: (B, S) bool, positions in rows with another answer to a prompt to forget.
        row: (B, S), the number of the row in the batch.
        pushed: (B, S) bool, the answer tokens that are pushed away in rows to forget; None: all of them.
    """

    labels: Tensor
    of_forget: Tensor
    of_alternative: Tensor
    row: Tensor
    pushed: Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Places:
        """From a batch of :class:`eua.data.batches.ForgetRetainCollator`."""
        return cls(batch["labels"], batch["forget"], batch["alternative"], batch["row"], batch["pushed"])

    @property
    def counted(self) -> Tensor:
        """(B, S−1) bool, the tokens of all answers."""
        return self.labels[:, 1:] != IGNORE_INDEX

    @property
    def forget(self) -> Tensor:
        """(B, S−1) bool, the tokens to forget."""
        tokens = self.counted & self.of_forget[:, 1:]
        return tokens if self.pushed is None else tokens & self.pushed[:, 1:]

    @property
    def alternative(self) -> Tensor:
        """(B, S−1) bool, the tokens of other answers to prompts to forget."""
        return self.counted & self.of_alternative[:, 1:]

    @property
    def retain(self) -> Tensor:
        """(B, S−1) bool, the tokens to retain."""
        return self.counted & ~(self.of_forget | self.of_alternative)[:, 1:]

    @property
    def after_prompt(self) -> Tensor:
        """(B, S−1) bool, the first tokens of answers: they are predicted at the last token of a prompt."""
        return self.counted & (self.labels[:, :-1] == IGNORE_INDEX)

    @property
    def rows(self) -> int:
        """The number of rows in the batch, which only rows that follow one another in one do not show in a shape."""
        return self.row.shape[0] if self.row.shape[0] > 1 else int(self.row.max()) + 1

    def row_sums(self, values: Tensor, tokens: Tensor) -> Tensor:
        """Sums within rows, (R,): ``values`` (B, S−1) at the tokens of the mask ``tokens``, 0 for a row without any."""
        sums = torch.zeros(self.rows, dtype=values.dtype, device=values.device)
        return sums.index_add(0, self.row[:, 1:].flatten(), values.where(tokens, 0.0).flatten())

    def rows_with(self, tokens: Tensor) -> Tensor:
        """(R,) bool, the rows that have tokens in a mask (B, S−1)."""
        return self.row_sums(tokens.float(), tokens) > 0


@dataclass(frozen=True)
class Answers:
    """The figures of a model at the answers of a batch.

    Attributes:
        places: which positions are which.
        energy, nll: (B, S−1) of the model in training, in nats; 0 where no answer token is predicted.
        reference: (B, S−1), the figure of the model before unlearning that the method compares with: a boundary or an NLL, in
            nats; 0 for methods that compare with none.
        hidden: (B, S, H), what the head reads, for methods that need more than energy and NLL.
        head: the model's head, for these methods.
        ref_hidden, ref_head: the same of the model before unlearning.
        inner, ref_inner: (B, S, H), the output of one block of the two models.
        seed: of what a method draws once.
    """

    places: Places
    energy: Tensor
    nll: Tensor
    reference: Tensor
    hidden: Tensor | None = None
    head: Head | None = None
    ref_hidden: Tensor | None = None
    ref_head: Head | None = None
    inner: Tensor | None = None
    ref_inner: Tensor | None = None
    seed: int = 0
