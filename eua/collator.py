"""Encoded rows → padded tensors, and the order in which forget and retain rows meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from eua.data import IGNORE_INDEX, EncodedRow


def pad_rows(rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` (B, S), padded on the right.

    Labels are the input ids where they belong to an answer, and -100 elsewhere. The padding id is never read: padding is
    masked from attention and from the loss.
    """
    width = max(len(row.input_ids) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORE_INDEX),
    }
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        batch["input_ids"][i, :length] = torch.tensor(row.input_ids)
        batch["attention_mask"][i, :length] = 1
        counted = row.answer_positions
        batch["labels"][i, counted] = batch["input_ids"][i, counted]
    return batch


class ForgetRetainCollator:
    """Items of :class:`~eua.data.ForgetRetainDataset` → one batch holding forget and retain rows.

    Beside :func:`pad_rows` it gives ``boundary`` (B, S), float32, aligned with the labels, and ``forget`` (B,), bool.
    """

    def __call__(self, items: Sequence[list[dict[str, Any]]]) -> dict[str, Tensor]:
        flat = [entry for item in items for entry in item]
        batch = pad_rows([entry["row"] for entry in flat])
        batch["boundary"] = torch.zeros(batch["labels"].shape, dtype=torch.float32)
        for i, entry in enumerate(flat):
            batch["boundary"][i, entry["row"].answer_positions] = entry["boundary"]
        batch["forget"] = torch.tensor([entry["forget"] for entry in flat])
        return batch


class PairedSampler(Sampler[tuple[int, tuple[int, ...]]]):
    """Every forget row once an epoch, in a seeded order, each with ``ratio`` retain rows.

    Retain rows come from an endless run of seeded permutations that epochs walk on through, so all are visited equally
    often however few forget rows there are. What an epoch yields depends on the seed and the epoch alone: a resumed run
    meets the pairs that an uninterrupted one would.
    """

    def __init__(self, forget_rows: int, retain_rows: int, ratio: int, seed: int) -> None:
        self.forget_rows, self.retain_rows, self.ratio, self.seed = forget_rows, retain_rows, ratio, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.forget_rows

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        forget = self._permutation("forget", self.epoch, self.forget_rows)
        retain = self._retain_rows(self.epoch * self.forget_rows * self.ratio, self.forget_rows * self.ratio)
        for i, index in enumerate(forget):
            yield index, tuple(retain[i * self.ratio : (i + 1) * self.ratio])

    def _retain_rows(self, start: int, count: int) -> list[int]:
        """``count`` entries, from ``start`` on, of the endless run of permutations."""
        first, offset = divmod(start, self.retain_rows)
        rows: list[int] = []
        while len(rows) < offset + count:
            rows += self._permutation("retain", first + len(rows) // self.retain_rows, self.retain_rows)
        return rows[offset : offset + count]

    def _permutation(self, kind: str, index: int, size: int) -> list[int]:
        generator = torch.Generator().manual_seed(2 * (self.seed * 1_000_003 + index) + (kind == "retain"))
        return torch.randperm(size, generator=generator).tolist()
