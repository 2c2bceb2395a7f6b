"""Finds rows that would be trained both ways, because they are to be forgotten and to be retained."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from eua.data.rows import EncodedRow
from eua.errors import EUAError

logger = logging.get_logger(__name__)

_NAMED = 5


def retain_without_forget(
    forget: Sequence[EncodedRow], retain: Sequence[EncodedRow], tokenizer: PreTrainedTokenizerBase, overlap: str
) -> list[EncodedRow]:
    """The rows to retain that are not rows to forget, too.

    A warning counts the remaining rows that ask what a row to forget asks: their prompt is the same, or differs only in case,
    spaces and punctuation.

    Args:
        forget, retain: encoded rows.
        tokenizer: the one that encoded them.
        overlap: what happens to rows in both sets: ``"error"`` or ``"drop"``.

    Raises:
        EUAError: if rows are in both sets and may not be left out, or if they are all rows to retain.
    """
    forgotten = {row.key: index for index, row in reversed(list(enumerate(forget)))}
    both = [(index, forgotten[row.key]) for index, row in enumerate(retain) if row.key in forgotten]
    uncut = {(row.key, row.cut_ids) for row in forget}
    differ = sum((retain[index].key, retain[index].cut_ids) not in uncut for index, _ in both)
    cut = f" The texts of {differ} of them differ, but only beyond max_length, where they are cut." if differ else ""
    if both and overlap == "error":
        named = ", ".join(f"row {index} (row {other} of the forget set)" for index, other in both[:_NAMED])
        raise EUAError(
            f"{len(both)} of {len(retain)} rows of the retain set are rows of the forget set, too: {named}"
            f"{', …' if len(both) > _NAMED else ''}.{cut} They would be trained both ways: take them out of one of the two "
            f'sets, {"raise max_length, " if differ else ""}or set overlap = "drop" to leave them out of the retain set.'
        )
    left_out = {index for index, _ in both}
    kept = [row for index, row in enumerate(retain) if index not in left_out]
    if not kept:
        raise EUAError(
            f"All {len(retain)} rows of the retain set are rows of the forget set, too, and overlap = {overlap!r} leaves none: "
            "give other rows to retain."
        )
    if both:
        logger.warning(f"{len(both)} of {len(retain)} rows to retain are left out, since they are rows to forget, too.{cut}")
    asked = set(_plain_prompts(forget, tokenizer))
    alike = sum(prompt in asked for prompt in _plain_prompts(kept, tokenizer))
    if alike:
        logger.warning(
            f"{alike} of {len(kept)} rows to retain ask what a row to forget asks (the prompts are the same, or differ only in "
            "case, spaces and punctuation), so what follows these prompts is trained both ways: check that this is intended."
        )
    return kept


def _plain_prompts(rows: Sequence[EncodedRow], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompts in lower case, without spaces and punctuation (unless they have nothing else)."""
    texts = tokenizer.batch_decode([row.prompt_ids for row in rows], skip_special_tokens=True)
    return ["".join(filter(str.isalnum, text.casefold())) or text for text in texts]
