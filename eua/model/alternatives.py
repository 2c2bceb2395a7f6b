"""Lets a model write other answers to the questions to forget, for AltPO (Mekala et al. 2024)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.alternatives import KEY
from eua.data.sources import Row, Source, read_rows
from eua.errors import EUAError
from eua.model.asking import answer

INSTRUCTION = """\
Here are a question and an answer to it. Write another plausible answer of the same form, in which every fact is a different \
one. Write only this answer.
Question: {question}
Answer: {answer}
Another answer:"""
_NEXT_QUESTION = re.compile(r"\s*\b(Question|Q):")


def write_alternatives(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Source,
    *,
    count: int = 5,
    max_new_tokens: int = 200,
    seed: int = 0,
    start: int = 0,
    name: str = "forget set",
    progress: str | None = None,
) -> Iterator[Row]:
    """Rows with ``count`` other answers each, under the key ``alternatives``, as AltPO trains on them.

    The model before unlearning is asked for another plausible answer with other facts, sampled at T = 1. An answer ends where
    the model would go on to another question. Empty answers and copies of the true one are drawn anew, up to five times.

    >>> next(write_alternatives(model, tokenizer, "forget.jsonl"))["alternatives"]     # doctest: +SKIP
    ['Ann was born in Ulm.', 'Ann was born in Graz.', ...]

    Args:
        model, tokenizer: those before unlearning; the model should follow instructions.
        rows: "question"/"answer" rows.
        count: number of other answers to each question.
        max_new_tokens: their greatest length.
        seed: of the samples. The random state of the caller is left as it was.
        start: the first row to write answers to; those before it are left out. The answers to a row do not depend on it.
        name: what error messages call the rows.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if a row is not a question with an answer, or if the model writes nothing but the true answer.
    """
    rows = read_rows(rows, name)
    for index, row in enumerate(rows):
        if not row.get("question") or not row.get("answer"):
            raise EUAError(
                f'Row {index} of the {name} has the keys {sorted(row)}, but other answers are written to a "question" with its '
                '"answer": give both.'
            )
    for index in tqdm(range(start, len(rows)), desc=progress, disable=progress is None, initial=start, total=len(rows)):
        row = rows[index]
        prompt = INSTRUCTION.format(question=row["question"], answer=row["answer"])
        written: list[str] = []
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + index)
            for _ in range(5):
                wanted = [prompt] * (count - len(written))
                texts = answer(model, tokenizer, wanted, max_new_tokens, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
                texts = [_NEXT_QUESTION.split(text, maxsplit=1)[0].strip() for text in texts]
                written += [text for text in texts if text and text != row["answer"].strip()]
                if len(written) >= count:
                    break
        if not written:
            raise EUAError(
                f"The model wrote no other answer to row {index} of the {name} in five attempts: use a model that follows "
                f'instructions, or give the row "{KEY}" of your own.'
            )
        yield {**row, KEY: written}
