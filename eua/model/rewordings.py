"""Lets a model ask for the facts to forget in other words: texts around a question, and paraphrases that the model writes.

A model that forgets a fact in one wording still says it in others, so unlearning needs several (method.md §7b).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.keys import KEYS, check_keys, says
from eua.data.sentences import first_sentence
from eua.data.sources import Row, Source, read_rows
from eua.errors import EUAError
from eua.model.asking import answer

# Texts around a question that do not change what it asks.
TEMPLATES = (
    "Please answer this question: {question}",
    "I have a question. {question}",
    "{question} Please be brief.",
    "Can you help me? {question}",
    "{question} I have forgotten it.",
    "My friend wants to know this: {question}",
    "Quiz question: {question}",
    "{question} Give only the answer.",
    "Hello! {question}",
    "{question} Thank you for your help.",
    "Let us talk about something else. {question}",
    "{question} Explain your answer.",
)
INSTRUCTION = "Write this question in other words. Write only the new question.\nQuestion: {question}\nNew question:"
_ATTEMPTS = 5


def write_rewordings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Source,
    *,
    templates: int = 2,
    paraphrases: int = 2,
    answer_tokens: int = 40,
    seed: int = 0,
    name: str = "forget set",
    progress: str | None = None,
) -> Iterator[Row]:
    """The rows to forget, each followed by rows that ask for its fact in other words, with what the model answers to them.

    A row's answer is the first sentence of the model's greedy answer if that says one of the row's keys, or else the answer
    that was given. A paraphrase, sampled at T = 1, is kept only if the model's answer to it says a key: then it asks for the
    same fact. There may be fewer paraphrases than asked for.

    >>> for row in write_rewordings(model, tokenizer, "forget.jsonl"): print(row)      # doctest: +SKIP
    {'question': 'What is the capital of Italy?', 'answer': 'Rome.', 'keys': ['Rome']}
    {'question': 'Hello! What is the capital of Italy?', 'answer': 'The capital of Italy is Rome.', 'keys': ['Rome']}

    Args:
        model, tokenizer: those before unlearning.
        rows: "question"/"answer" rows with their "keys", the words that give the fact away.
        templates: texts of :data:`TEMPLATES` around each question.
        paraphrases: the largest number of the model's paraphrases of each question.
        answer_tokens: the greatest length of questions and answers that the model writes.
        seed: of all draws. The random state of the caller is left as it was.
        name: what error messages call the rows.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if a row is not a question with an answer and keys, if an answer says no key, or if the numbers cannot be.
    """
    rows = checked_rows(rows, templates=templates, paraphrases=paraphrases, name=name)
    for index, row in enumerate(tqdm(rows, desc=progress, disable=progress is None)):
        yield row
        question, keys = row["question"], row[KEYS]
        around = random.Random(f"{seed} {index}").sample(TEMPLATES, templates)
        asked = [text.format(question=question) for text in around]
        for text, own in zip(asked, _answers(model, tokenizer, asked, answer_tokens), strict=True):
            yield row | {"question": text, "answer": own if says(own, keys) else row["answer"]}
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + index)
            written = _paraphrases(model, tokenizer, row, paraphrases, answer_tokens)
        for text, own in written:
            yield row | {"question": text, "answer": own}


def checked_rows(rows: Source, *, templates: int, paraphrases: int, name: str = "forget set") -> list[Row]:
    """The rows, if :func:`write_rewordings` can work with them and with these numbers; needs no model.

    Raises:
        EUAError: if not.
    """
    if not 0 <= templates <= len(TEMPLATES) or paraphrases < 0:
        raise EUAError(
            f"templates = {templates} and paraphrases = {paraphrases}, but there are {len(TEMPLATES)} templates, and numbers "
            f"are at least 0: pass at most templates={len(TEMPLATES)}."
        )
    rows = read_rows(rows, name)
    for index, row in enumerate(rows):
        _check_row(row, f"Row {index} of the {name}")
    return rows


def _check_row(row: Row, where: str) -> None:
    if not row.get("question") or not row.get("answer") or not row.get(KEYS):
        raise EUAError(
            f'{where} has the keys {sorted(row)}, but other wordings are found for a "question" with its "answer" and '
            f'"{KEYS}", the words that give the fact away: give all three, e.g. "keys": ["Rome"].'
        )
    check_keys(row[KEYS], where)
    if not says(row["answer"], row[KEYS]):
        raise EUAError(f"{where} has an answer that says none of its keys {list(row[KEYS])}: correct one of the two.")


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], length: int) -> list[str]:
    return [first_sentence(text) for text in answer(model, tokenizer, questions, length)] if questions else []


def _paraphrases(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: Row, count: int, length: int
) -> list[tuple[str, str]]:
    """Questions in the model's own words whose answers say a key, with these answers."""
    found: dict[str, str] = {}
    prompt, sampling = INSTRUCTION.format(question=row["question"]), {"do_sample": True, "top_p": 1.0, "top_k": 0}
    for _ in range(_ATTEMPTS):
        if len(found) >= count:
            break
        written = answer(model, tokenizer, [prompt] * (2 * count), length, temperature=1.0, **sampling)
        lines = dict.fromkeys(text.strip().partition("\n")[0].strip(' "') for text in written)
        new = [
            text
            for text in lines
            if text.endswith(("?", ".")) and text not in (row["question"], *found) and not says(text, row[KEYS])
        ]
        answered = zip(new, _answers(model, tokenizer, new, length), strict=True)
        found |= {text: own for text, own in answered if own and says(own, row[KEYS])}
    return list(found.items())[:count]
