"""Turns encoded rows into batches of tensors, padded or as one long row.

Padding costs computation in every layer and contributes nothing. There is less of it if rows of similar length share a batch
(:class:`eua.data.pairing.PairedSampler` with groups), and none if rows follow one another (:func:`flatten_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from eua.data.rows import IGNORE_INDEX, EncodedRow


def pad_rows(rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` (B, S), padded on the right.

    Labels are the input ids of answers, and -100 elsewhere. The value of the padding id has no effect: padding is masked in
    attention and in the loss.
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
    """``input_ids`` and ``attention_mask`` (B, S), padded on the left with ``pad``, as ``generate`` needs them."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def flatten_rows(padded: dict[str, Tensor]) -> dict[str, Tensor]:
    """A padded batch (B, S) as one row (1, N) without padding, N tokens in all.

    ``position_ids`` replace the attention mask: they start at 0 in every row, so attention can separate rows. A row's first
    token never counts, so no token is trained on the prediction of an earlier row.
    """
    is_token = padded["attention_mask"].bool()
    flat = {name: tensor[is_token][None] for name, tensor in padded.items() if name != "attention_mask"}
    flat["position_ids"] = (is_token.cumsum(dim=1) - 1)[is_token][None]
    return flat


class ForgetRetainDataset(Dataset):
    """Encoded forget and retain rows with their boundaries. An index selects one forget row and its retain rows.

    Args:
        rows: ``"forget"`` and ``"retain"`` rows.
        boundaries: of these rows, one float per answer token. They may be filled in after the dataset is made, before an item
            is read.
    """

    def __init__(self, rows: Mapping[str, Sequence[EncodedRow]], boundaries: Mapping[str, Sequence[Tensor]]) -> None:
        self.rows, self.boundaries = rows, boundaries

    def __len__(self) -> int:
        return len(self.rows["forget"])

    def __getitem__(self, index: tuple[int, tuple[int, ...]]) -> list[dict[str, Any]]:
        forget, retain = index
        return [self._item("forget", forget), *(self._item("retain", i) for i in retain)]

    def _item(self, kind: str, index: int) -> dict[str, Any]:
        return {"row": self.rows[kind][index], "boundary": self.boundaries[kind][index], "forget": kind == "forget"}


class ForgetRetainCollator:
    """Makes one batch of forget and retain rows from items of :class:`ForgetRetainDataset`.

    In addition to the tensors of :func:`pad_rows`, or of :func:`flatten_rows` with ``padding_free``, a batch contains
    ``boundary``, float32, and ``forget``, bool, both in the shape of the labels.
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
        # Not expanded: memory that several entries share cannot be pinned.
        batch["forget"] = is_forget[:, None].repeat(1, batch["labels"].shape[1])
        return flatten_rows(batch) if self.padding_free else batch
