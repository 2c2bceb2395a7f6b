"""Lets a model write what lies near the rows to forget and has to stay: questions that begin like theirs, and its own answers.

Unlearning harms most what resembles the forgotten rows. A model that was trained on chats continues the beginning of a user's
turn with a plausible question (Xu et al. 2024, "Magpie", arXiv 2406.08464). Behind "What is the capital of" it asks for the
capitals of many countries, behind nothing for anything. So no rows to retain have to be given, or few.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.keys import KEYS, check_keys, says
from eua.data.rows import encode_prompt, encode_rows, format_prompt
from eua.data.sentences import first_sentence
from eua.data.sources import Row, Source, read_rows
from eua.errors import EUAError
from eua.model.asking import answer, generation_explained, padding_id
from eua.model.figures import answer_nll

_PLACE = "\u2983question\u2984"  # marks where a chat template puts the question
_QUESTION = re.compile(r"[^\n]*?[.?!](?=\s|$)")
_FRUITLESS = 20  # rounds without a new row, after which a model writes no others


def write_neighbours(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Source,
    *,
    count: int = 256,
    neutral: float = 0.25,
    surest: float = 0.5,
    avoid: Sequence[str] = (),
    question_tokens: int = 24,
    answer_tokens: int = 40,
    batch_size: int = 32,
    seed: int = 0,
    name: str = "forget set",
    progress: str | None = None,
) -> list[Row]:
    """Rows to retain: ``count`` questions near those to forget, each with the first sentence of the model's greedy answer.

    A question is begun as questions to forget are, up to any word that at least one other of them shares, so that whom or what
    they are about is left open, and sampled on at T = 1. Of a question's beginnings, one with a word more is drawn twice as
    often, so that about half of the rows have the same form as those to forget. Questions to forget, and those that say or get
    a key of a row to forget (or its answer, if it has no keys), are left out. Of the rest, those are kept whose answers the
    model is surest of (mean NLL): what it makes up needs no protection.

    >>> write_neighbours(model, tokenizer, "forget.jsonl", count=2)            # doctest: +SKIP
    [{'question': 'What is the capital of Chile?', 'answer': 'The capital of Chile is Santiago.'}, ...]

    Args:
        model, tokenizer: those before unlearning.
        rows: "question"/"answer" rows to forget; "keys", the words that give a row's fact away, make the check stricter.
        count: number of rows.
        neutral: share of questions that begin freely.
        surest: share of the rows that are kept; of 0.5, twice as many are written as asked for.
        avoid: texts that no row may say, for example names that a test is about.
        question_tokens, answer_tokens: their greatest lengths.
        batch_size: questions that are sampled together.
        seed: of all draws. The random state of the caller is left as it was.
        name: what error messages call the rows.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if a row is not a question with an answer, if the numbers cannot be, or if the model writes too few questions.
    """
    rows = checked_rows(rows, count=count, neutral=neutral, surest=surest, batch_size=batch_size, name=name)
    wanted = math.ceil(count / surest)
    questions = [row["question"] for row in rows]
    shared = _beginnings(questions)
    taboo = sorted({key for row in rows for key in row.get(KEYS) or [row["answer"]]})
    seen = set(map(_plain, questions))
    rng, found, fruitless = random.Random(seed), list[Row](), 0
    with torch.random.fork_rng(), tqdm(total=wanted, desc=progress, disable=progress is None) as bar:
        torch.manual_seed(seed)
        while len(found) < wanted and fruitless < _FRUITLESS:
            begun = "" if rng.random() < neutral or not shared else _drawn(rng.choice(shared), rng)
            asked = []
            for question in _continued(model, tokenizer, begun, batch_size, question_tokens):
                if _plain(question) not in seen:
                    seen.add(_plain(question))
                    asked.append(question)
            answers = map(first_sentence, answer(model, tokenizer, asked, answer_tokens)) if asked else ()
            new: list[Row] = [
                {"question": question, "answer": text}
                for question, text in zip(asked, answers, strict=True)
                if text and not says(f"{question} {text}", [*taboo, *avoid])
            ]
            fruitless = 0 if new else fruitless + 1
            bar.update(min(len(new), wanted - len(found)))
            found += new
    if len(found) < count:
        raise EUAError(
            f"The model wrote {len(found)} of {count} rows near the {name} before {_FRUITLESS} attempts gave no new one: ask "
            "for fewer, use a model that was trained on questions of users, or give rows to retain of your own."
        )
    encoded = encode_rows(found[:wanted], tokenizer, None, "written rows")
    unsure = [float(nll.mean()) for nll in answer_nll(model, encoded, "written rows", batch_size)]
    kept = sorted(range(len(encoded)), key=unsure.__getitem__)[:count]
    return [found[index] for index in sorted(kept)]


def checked_rows(
    rows: Source, *, count: int, neutral: float, surest: float, batch_size: int = 1, name: str = "forget set"
) -> list[Row]:
    """The rows, if :func:`write_neighbours` can work with them and with these numbers; needs no model.

    Raises:
        EUAError: if not.
    """
    if count < 1 or not 0 <= neutral <= 1 or not 0 < surest <= 1 or batch_size < 1:
        raise EUAError(
            f"count = {count}, neutral = {neutral}, surest = {surest} and batch_size = {batch_size}, but at least one row is "
            "written and kept, and a share lies between 0 and 1: pass e.g. count=256, neutral=0.25, surest=0.5, batch_size=32."
        )
    rows = read_rows(rows, name)
    for index, row in enumerate(rows):
        where = f"Row {index} of the {name}"
        if not row.get("question") or not row.get("answer"):
            raise EUAError(
                f'{where} has the keys {sorted(row)}, but what lies near a "question" with its "answer" is written: give both.'
            )
        if row.get(KEYS):
            check_keys(row[KEYS], where)
    return rows


def _beginnings(questions: Sequence[str]) -> list[list[str]]:
    """For each question its beginnings, by whole words, that another one has, too; questions without any are left out.

    >>> _beginnings(["Who wrote Emma?", "Who wrote Hamlet?", "Where?"])
    [['Who', 'Who wrote'], ['Who', 'Who wrote']]
    """
    of_each = [[" ".join(words[:end]) for end in range(1, len(words))] for words in (text.split() for text in questions)]
    owners = Counter(beginning for of_question in of_each for beginning in of_question)
    shared = ([beginning for beginning in of_question if owners[beginning] > 1] for of_question in of_each)
    return [of_question for of_question in shared if of_question]


def _drawn(beginnings: Sequence[str], rng: random.Random) -> str:
    """One of a question's beginnings, each twice as likely as the next shorter one."""
    return rng.choices(beginnings, weights=[2.0 ** (place - len(beginnings)) for place in range(len(beginnings))])[0]


def _continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, begun: str, count: int, max_new_tokens: int
) -> list[str]:
    """Samples of a user's turn that begins with a text, up to the end of its first sentence; those without one are left out."""
    before, _, _ = format_prompt(tokenizer, _PLACE).partition(_PLACE)
    ids = torch.tensor([encode_prompt(before + begun, tokenizer)] * count, device=model.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), generation_explained():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=padding_id(model, tokenizer),
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
            )
    finally:
        model.train(training)
    special = set(tokenizer.all_special_ids)
    texts = []
    for row in output[:, ids.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in special), len(row))
        written = _QUESTION.match(begun + tokenizer.decode(row[:end]))
        if written and len(written[0]) > len(begun):
            texts.append(written[0].strip())
    return texts


def _plain(question: str) -> str:
    return "".join(filter(str.isalnum, question.casefold()))
