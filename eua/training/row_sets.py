"""The rows of a run: read from their sources, encoded as the model reads them, and checked against each other and the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import repeat

from torch import nn
from transformers import PreTrainedTokenizerBase

from eua.data.alternatives import rows_with_alternatives
from eua.data.dates import at_date, at_same_date
from eua.data.keys import pushing_keys
from eua.data.overlap import retain_without_forget
from eua.data.rows import EncodedRow, answered_prompts, encode_rows, format_prompt
from eua.data.sources import Row, Source, read_rows
from eua.errors import EUAError
from eua.methods.table import METHODS
from eua.model.forward import check_ids
from eua.training.config import EUAConfig


class RowSets:
    """Rows by kind: ``"forget"``, ``"retain"``, where they are held out from training ``"eval_forget"`` and ``"eval_retain"``,
    and for methods that use them ``"alternative"`` and ``"eval_alternative"``, other answers to the prompts to forget.

    Args:
        sources: of the first four kinds.
        tokenizer: the model's.
        args: settings of the run.
    """

    def __init__(self, sources: Mapping[str, Source], tokenizer: PreTrainedTokenizerBase, args: EUAConfig) -> None:
        self.tokenizer, self.args = tokenizer, args
        as_given = {kind: read_rows(source, name_of(kind)) for kind, source in sources.items()}
        self.rows = {kind: self._with_system(rows, name_of(kind)) for kind, rows in as_given.items()}
        self._asked_as = [as_given["forget"], *([self.rows["forget"]] if args.system_prompt is not None else [])]
        self.alternatives = 0  # of each prompt to forget
        origin = METHODS[args.method].alternatives
        if origin is not None:
            self.alternatives = sum(1 for _ in pairs_of_epochs(args, len(self.rows["forget"])))
            for kind, count in (("forget", self.alternatives), ("eval_forget", 1)):
                if kind in self.rows:
                    made = rows_with_alternatives(self.rows[kind], origin, count, args.seed, name_of(kind))
                    self.rows[kind.replace("forget", "alternative")] = made

    def encode(self, date: datetime | None) -> dict[str, list[EncodedRow]]:
        """Token ids of all rows, at the date that the chat template writes."""
        args, tokenizer = self.args, self.tokenizer
        encoding = tokenizer if date is None else at_date(tokenizer, date)
        hide = (
            (tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
            if args.hide_padding_ids
            else None
        )
        encoded = {
            kind: encode_rows(rows, encoding, args.max_length, name_of(kind), args.assistant_turns, args.labels, hide)
            for kind, rows in self.rows.items()
        }
        if args.forget_tokens != "answer":
            for kind in encoded.keys() & {"forget", "eval_forget"}:
                rows = self.rows[kind]
                encoded[kind] = pushing_keys(encoded[kind], rows, tokenizer, args.forget_tokens, name_of(kind))
        return encoded

    def kept(self, rows: Mapping[str, list[EncodedRow]]) -> list[EncodedRow]:
        """The encoded rows to retain that are not rows to forget, too, see :func:`eua.data.overlap.retain_without_forget`."""
        return retain_without_forget(rows["forget"], rows["retain"], self.tokenizer, self.args.overlap)

    def prompts_to_forget(self, rows: Mapping[str, list[EncodedRow]], date: datetime | None) -> list[list[int]]:
        """The prompts of all answers to forget, at a date that is always the same; without a system message, too, as users
        may ask them."""
        if date is None and self.args.assistant_turns == "last" and self.args.system_prompt is None:
            return [row.prompt_ids for row in rows["forget"]]
        encoding, turns = at_same_date(self.tokenizer), self.args.assistant_turns
        return [ids for asked in self._asked_as for ids in answered_prompts(asked, encoding, name_of("forget"), turns)]

    def _with_system(self, rows: list[Row], name: str) -> list[Row]:
        """The rows with the system message before the question, if there is a chat template."""
        if self.args.system_prompt is None or self.tokenizer.chat_template is None:
            return rows
        system = {"role": "system", "content": self.args.system_prompt}
        try:
            format_prompt(self.tokenizer, [system, {"role": "user", "content": "Who?"}])
        except EUAError as error:
            raise EUAError(
                f"system_prompt = {self.args.system_prompt!r} was set, but the tokenizer's chat template takes no system "
                f"message before the questions of the {name}: set system_prompt to None."
            ) from error
        return [
            {
                **row,
                "messages": [
                    system,
                    {"role": "user", "content": row["question"]},
                    {"role": "assistant", "content": row.get("answer")},
                ],
            }
            if "question" in row and "messages" not in row and row.get("answer")
            else row
            for row in rows
        ]


def name_of(kind: str) -> str:
    """What messages call a set of rows."""
    return f"{kind.replace('_', ' ')} set"


def check_rows_fit(model: nn.Module, rows: Mapping[str, list[EncodedRow]]) -> None:
    """Raise if the model has not all of the rows' tokens or positions."""
    for kind, of_kind in rows.items():
        check_ids(model, (row.input_ids for row in of_kind), name_of(kind))


def pairs_of_epochs(args: EUAConfig, forget_rows: int) -> Iterator[int]:
    """The largest number of pairs of rows, counted from its beginning, that training may use in each epoch."""
    if args.max_steps <= 0:
        yield from repeat(forget_rows, math.ceil(args.num_train_epochs))
        return
    batch = args.per_device_train_batch_size * args.world_size
    whole, rest = divmod(forget_rows, batch)
    # Several processes may split batches in other ways, and then make more steps in an epoch.
    batches = whole + (rest > 0 and not args.dataloader_drop_last and args.world_size == 1)
    steps_in_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    for steps_left in range(args.max_steps, 0, -steps_in_epoch):
        yield min(forget_rows, steps_left * args.gradient_accumulation_steps * batch)
