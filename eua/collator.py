"""Encoded rows → tensors, padded or one after another, and the order in which forget and retain rows meet.

Padding is computed in every layer for nothing. There is less of it where rows of like length meet (:class:`PairedSampler`
with groups), and none where rows follow one another (:func:`flatten_rows`).
"""

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


def pad_prompts(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (B, S), padded on the left with ``pad``, as ``generate`` takes them."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def flatten_rows(padded: dict[str, Tensor]) -> dict[str, Tensor]:
    """A padded batch (B, S) as one row (1, N) without its padding, N tokens in all.

    ``position_ids`` take the place of the attention mask: they start at 0 with every row, by which attention knows rows
    apart. A row's first token never counts, so no token is trained on what a row before it predicts.
    """
    is_token = padded["attention_mask"].bool()
    flat = {name: tensor[is_token][None] for name, tensor in padded.items() if name != "attention_mask"}
    flat["position_ids"] = (is_token.cumsum(dim=1) - 1)[is_token][None]
    return flat


class ForgetRetainCollator:
    """Items of :class:`~eua.data.ForgetRetainDataset` → one batch holding forget and retain rows.

    Beside what :func:`pad_rows` gives, or with ``padding_free`` :func:`flatten_rows`, there are ``boundary``, float32, and
    ``forget``, bool, both of the labels' shape.
    """

    def __init__(self, padding_free: bool = False) -> None:
        self.padding_free = padding_free

    def __call__(self, items: Sequence[list[dict[str, Any]]]) -> dict[str, Tensor]:
        entries = [entry for item in items for entry in item]
        batch = pad_rows([entry["row"] for entry in entries])
        batch["boundary"] = torch.zeros(batch["labels"].shape, dtype=torch.float32)
        for i, entry in enumerate(entries):
            batch["boundary"][i, entry["row"].answer_positions] = entry["boundary"]
        is_forget = torch.tensor([entry["forget"] for entry in entries])
        # Not expanded: memory that several places share cannot be pinned.
        batch["forget"] = is_forget[:, None].repeat(1, batch["labels"].shape[1])
        return flatten_rows(batch) if self.padding_free else batch


_GROUPS_SORTED = 50  # as transformers' LengthGroupedSampler has it


class PairedSampler(Sampler[tuple[int, tuple[int, ...]]]):
    """Every forget row once an epoch, in a seeded order, each with ``ratio`` retain rows.

    Retain rows come from an endless run of seeded permutations that epochs walk on through, so all are visited equally
    often however few forget rows there are. What an epoch yields depends on the seed and the epoch alone: a resumed run
    meets the pairs that an uninterrupted one would.

    Args:
        forget_lengths, retain_lengths: tokens of each row.
        ratio: retain rows beside each forget row.
        seed: of all orders.
        group: rows of like length stand together, so many forget rows at a time; 0: they do not. An epoch holds the same rows.
    """

    def __init__(
        self, forget_lengths: Sequence[int], retain_lengths: Sequence[int], ratio: int, seed: int, group: int = 0
    ) -> None:
        self.lengths = {"forget": forget_lengths, "retain": retain_lengths}
        self.forget_rows, self.retain_rows = len(forget_lengths), len(retain_lengths)
        self.ratio, self.seed, self.group = ratio, seed, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.forget_rows

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        forget = self._permutation("forget", self.epoch, self.forget_rows)
        retain = self._retain_rows(self.epoch * self.forget_rows * self.ratio, self.forget_rows * self.ratio)
        if self.group:
            forget, retain = self._by_length("forget", forget, 1), self._by_length("retain", retain, self.ratio)
        pairs = [(index, tuple(retain[i * self.ratio : (i + 1) * self.ratio])) for i, index in enumerate(forget)]
        if not self.group:
            yield from pairs
            return
        whole = len(pairs) // self.group  # groups; what is left over stays at the end
        for number in [*self._permutation("group", self.epoch, whole), whole]:
            yield from pairs[number * self.group : (number + 1) * self.group]

    def _by_length(self, kind: str, rows: list[int], ratio: int) -> list[int]:
        """Sorts rows by length within stretches, of which an epoch has at least four: so who meets whom stays random."""
        groups = min(_GROUPS_SORTED, max(1, self.forget_rows // (4 * self.group)))
        stretch = groups * self.group * ratio
        starts = range(0, len(rows), stretch)
        return [i for start in starts for i in sorted(rows[start : start + stretch], key=lambda i: -self.lengths[kind][i])]

    def _retain_rows(self, start: int, count: int) -> list[int]:
        """``count`` entries, from ``start`` on, of the endless run of permutations."""
        first, offset = divmod(start, self.retain_rows)
        rows: list[int] = []
        while len(rows) < offset + count:
            rows += self._permutation("retain", first + len(rows) // self.retain_rows, self.retain_rows)
        return rows[offset : offset + count]

    def _permutation(self, kind: str, index: int, size: int) -> list[int]:
        salt = {"forget": 0, "retain": 1, "group": 1 << 40}[kind]
        generator = torch.Generator().manual_seed(2 * (self.seed * 1_000_003 + index) + salt)
        return torch.randperm(size, generator=generator).tolist()
