"""Turns encoded rows into batches of tensors, padded or as one long row.

Padding costs computation in every layer and contributes nothing. There is less of it if rows of similar length share a batch
(:class:`eua.data.pairing.PairedSampler` with groups), and none if rows follow one another (:func:`flatten_rows`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from eua.data.pairing import Pair
from eua.data.rows import IGNORE_INDEX, EncodedRow


def pad_rows(rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` (B, S), padded on the right.

    Labels are the input ids of answers, and -100 elsewhere. The value of the padding id has no effect: padding is masked in
    attention and in the loss. Tokens that a row hides from attention are masked like padding.
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
        batch["attention_mask"][i, list(row.hidden)] = 0
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
    """Encoded rows with their reference figures. An index selects one forget row and what it is trained with.

    Args:
        rows: ``"forget"`` and ``"retain"`` rows, and where the method uses them ``"alternative"`` rows, other answers to the
            prompts to forget.
        reference: for each of these rows one float per answer token, the figure of the model before unlearning that the loss
            compares with. It may be filled in after the dataset is made, before an item is read.
        without: kinds of rows that the method does not train on.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[EncodedRow]],
        reference: Mapping[str, Sequence[Tensor]],
        without: Collection[str] = (),
    ) -> None:
        self.rows, self.reference, self.without = rows, reference, without

    def __len__(self) -> int:
        return len(self.rows["forget"])

    def __getitem__(self, index: Pair) -> list[dict[str, Any]]:
        """The forget row, its alternative right after it, and its retain rows."""
        pair = Pair(*index)
        chosen = {"forget": (pair.forget,), "alternative": pair.alternative, "retain": pair.retain}
        return [self._item(kind, i) for kind, of_kind in chosen.items() if kind not in self.without for i in of_kind]

    def _item(self, kind: str, index: int) -> dict[str, Any]:
        return {"row": self.rows[kind][index], "reference": self.reference[kind][index], "kind": kind}


class ForgetRetainCollator:
    """Makes one batch of rows from items of :class:`ForgetRetainDataset`.

    In addition to the tensors of :func:`pad_rows`, or of :func:`flatten_rows` with ``padding_free``, a batch contains in the
    shape of the labels: ``reference``, float32; ``forget``, ``alternative`` and ``pushed``, bool; ``row``, the number of the
    row.
    """

    def __init__(self, padding_free: bool = False) -> None:
        self.padding_free = padding_free

    def __call__(self, items: Sequence[list[dict[str, Any]]]) -> dict[str, Tensor]:
        entries = [entry for item in items for entry in item]
        batch = pad_rows([entry["row"] for entry in entries])
        width = batch["labels"].shape[1]
        batch["reference"] = torch.zeros(batch["labels"].shape, dtype=torch.float32)
        for i, entry in enumerate(entries):
            batch["reference"][i, entry["row"].answer_positions] = entry["reference"]
        # Not expanded: memory that several entries share cannot be pinned.
        for kind in ("forget", "alternative"):
            batch[kind] = torch.tensor([entry["kind"] == kind for entry in entries])[:, None].repeat(1, width)
        batch["pushed"] = torch.ones(len(entries), width, dtype=torch.bool)
        for i, entry in enumerate(entries):
            if entry["row"].pushed is not None:
                batch["pushed"][i] = False
                batch["pushed"][i, sorted(entry["row"].pushed)] = True
        batch["row"] = torch.arange(len(entries))[:, None].repeat(1, width)
        return flatten_rows(batch) if self.padding_free else batch
