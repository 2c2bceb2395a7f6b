"""Other answers to the prompts to forget, for methods that prefer them to the forgotten ones.

They are phrases of not knowing, or a row's own: texts under the key ``alternatives``, for example made-up facts that the model
itself wrote (:func:`eua.model.alternatives.write_alternatives`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from eua.data.rows import check_rows
from eua.data.sources import Row
from eua.errors import EUAError

KEY = "alternatives"


@cache
def idk_answers() -> tuple[str, ...]:
    """Phrases of not knowing.

    >>> idk_answers()[0]
    "I don't know."
    """
    return tuple(Path(__file__).with_name("idk.txt").read_text(encoding="utf-8").splitlines())


def rows_with_alternatives(rows: Sequence[Row], kind: str, count: int, seed: int, name: str = "forget set") -> list[Row]:
    """``count`` rows for each row, with its prompt and another answer: those of row i follow those of row i − 1.

    The answers of a row are drawn without repetition until all have been, and then anew.

    Args:
        rows: to forget, of any format.
        kind: ``"idk"`` draws from :func:`idk_answers`, ``"own"`` from each row's ``alternatives``.
        count: number of other answers to each prompt, one for each epoch.
        seed: of the draws.
        name: what error messages call the rows.

    Raises:
        EUAError: if a row has no alternatives of its own, or if they are not texts.
    """
    check_rows(rows, name, answers=True)
    made: list[Row] = []
    for index, row in enumerate(rows):
        options = list(idk_answers()) if kind == "idk" else _own(row, f"Row {index} of the {name}")
        if kind == "own" and row.get("answer") in options:
            raise EUAError(
                f'Row {index} of the {name} has its answer among its "{KEY}", so nothing would be preferred to it: leave it '
                "out there."
            )
        draw = random.Random(f"{seed} {index}")
        texts: list[str] = []
        while len(texts) < count:
            texts += draw.sample(options, len(options))
        made += [_with_answer(row, text) for text in texts[:count]]
    return made


def _own(row: Row, where: str) -> list[str]:
    texts = row.get(KEY)
    if not texts or isinstance(texts, str) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise EUAError(
            f'{where} has {texts!r} as its "{KEY}", but this method prefers other answers of the row to the forgotten one: '
            "give a list of texts, which `eua alternatives` lets the model write."
        )
    return list(texts)


def _with_answer(row: Row, text: str) -> Row:
    """The row's prompt with another answer."""
    reply: Any = [{"role": "assistant", "content": text}]
    if "messages" in row:
        return {"messages": [*row["messages"][:-1], *reply]}
    if "question" in row:
        return {"question": row["question"], "answer": text}
    if isinstance(row["prompt"], str):
        completion = row["completion"]
        return {"prompt": row["prompt"], "completion": completion[: len(completion) - len(completion.lstrip())] + text}
    return {"prompt": row["prompt"], "completion": reply}
