"""TOFU as a task (Maini et al. 2024): fictitious authors with 20 question–answer pairs each.

Rows come from the hub (``locuslab/TOFU``) or from a folder of files named like its configurations. The target is a model of the
user's, or a small one that is trained from scratch on all rows, as in docs/measurements.md.

Authors are 20 consecutive rows, and every split is by author: the rows to retain fall into authors that unlearning sees,
authors for the guard's calibration, and authors that unlearning never sees.

**Wrong answers.** Those of a row to forget are split: AltPO trains on the first ones, and truth ratios are measured with the
others, so that no method is measured with what it was trained on.

**Keys.** TOFU does not say which words of an answer give it away. Here they are names (runs of capitalized words), quoted
titles, dates, and numbers of three digits or more, as far as the paraphrased answer has them, too, and no wording of the
question, no wrong answer, and at most three answers about other authors. If a fact has several ones, those that many
answers about the same author have are left out. A fact without a key is left out, e.g. if the answer is a profession. Where
there are several keys, one of them is taken for the whole answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from eua.bench.plain_text import plain_text
from eua.bench.published import published_rows, rows_if_any
from eua.bench.real_models import model_folder
from eua.bench.splits import every_second
from eua.bench.task import FORGOTTEN, EvaluationSet, Task
from eua.data.keys import normalize, says
from eua.data.sources import Row
from eua.demo.target import cached_model
from eua.errors import EUAError
from eua.evaluation.relearning import STEPS
from eua.evaluation.retain_model import HOLDOUT as HOLDOUT_SET
from eua.evaluation.said import KeyedFact

HUB = "locuslab/TOFU"
RETAINED = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
HOLDOUT = {"forget01": "holdout01", "forget05": "holdout05", "forget10": "holdout10"}
ROWS_PER_AUTHOR = 20
MOST_OTHERS = 3  # answers about other authors that may contain a key; or about the same one, if there is a rarer key
# Of docs/measurements.md, for the small model; the released ones are for a model of the user's.
SMALL_MODEL: dict[str, Any] = {"vocabulary": 4096, "batch_size": 16, "learning_rate": 1e-3, "bf16": True}
SMALL_RATE_FACTOR = 20.0  # by which published learning rates are multiplied
BASE_MODEL: dict[str, Any] = {"batch_size": 32, "learning_rate": 2e-4, "bf16": True}  # of 135M to 1B parameters
NEW_TOKENS = 200  # of answers to the rows of sets, as in OpenUnlearning; keys are looked for in 64
TRAINING = {"per_device_train_batch_size": 16, "bf16": True}
NOTE = (
    "Each seed trains its own models, unless they are given, and shuffles training. Forget quality is of half of the "
    "authors and with the wrong answers that AltPO does not train on, so its p-values are larger than published ones. "
    "Perplexity is of the questions and answers about authors whom unlearning never saw. Answers to rows have up to 200 "
    "tokens, as in OpenUnlearning; keys are looked for in 64. “Retain” has rows about the authors whom unlearning sees, half "
    "of those with wrong answers, where OpenUnlearning has 400 rows. Facts about authors whom unlearning never saw are asked "
    "about in one wording, all others in two, and their keys are not checked against wrong or paraphrased answers: compare a "
    "group with itself before unlearning, not with another group. AltPO trains on TOFU's wrong answers, where the original "
    "has the model write them."
)
SECOND = 0.1  # size of a second request, as a share of the first one, but at least one author
_KEYS = ("question", "answer")
_WRONG = (*_KEYS, "perturbed_answer")

# What may give an answer away.
_QUOTED = re.compile(r"[\"“](?P<title>[^\"“”]+)[\"”]|(?<!\w)['‘](?P<other>[A-Z0-9].*?)['’](?!\w)")
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE = re.compile(rf"(?:{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,?|\d{{1,2}}(?:st|nd|rd|th)? (?:of )?{_MONTH},?) (?P<year>\d{{4}})")
_CAPITALIZED = r"(?:(?:[A-Z]\.)+|(?:Dr|Mr|Mrs|Ms|St)\.|[A-ZÀ-Þ][\w-]*(?:['’](?!s\b)\w+)*)"
_NAME = re.compile(rf"\b{_CAPITALIZED}(?:(?: (?:of|the|and the|de|da|del|van|von|bin|al|el))* {_CAPITALIZED})*")
_NUMBER = re.compile(r"\b\d{3,}s?\b")
_OPENINGS = frozenset(
    [
        "in",
        "on",
        "at",
        "by",
        "from",
        "with",
        "for",
        "to",
        "as",
        "of",
        "during",
        "after",
        "before",
        "his",
        "her",
        "their",
        "its",
        "both",
        "author",
    ]
)
_SENTENCE_START = re.compile(r"(?:^|[.!?:])[\s\"“'‘]*$")


def tofu(
    seed: int,
    *,
    cache: Path,
    data: str = HUB,
    split: str = "forget10",
    model: str | None = None,
    retain_model: str | None = None,
    base: str | None = None,
    authors: int | None = None,
    target_epochs: float = 15,
    epochs: float = 6,
    **size: Any,
) -> Task:
    """The task of a seed.

    Args:
        seed: of the small model's training. The rows are always the same.
        cache: folder in which small models are kept.
        data: name on the hub, or folder, of TOFU's files.
        split: "forget01", "forget05" or "forget10".
        model: folder or hub name of a model that was trained on all rows; None: a small one is trained from scratch.
        retain_model: the same of a model that was trained on the rows to retain; None: as for ``model``, or none.
        base: folder or hub name of a model that is trained on the rows instead, or a name of
            :data:`eua.bench.real_models.MODELS`; None: one from scratch.
        authors: number of retained authors that are used; None: all.
        target_epochs: passes of a model that is trained here, from scratch or from ``base``, over its rows.
        epochs: the larger number of passes of unlearning over the rows to forget; half of it is the other one.
        size: further arguments of :func:`eua.demo.target.train_target`.

    Raises:
        EUAError: if rows cannot be read, or for a split that does not exist.
    """
    if split not in RETAINED:
        raise EUAError(f"The split {split!r} was asked for, but TOFU has {', '.join(RETAINED)}: name one of these.")
    forget = published_rows(data, f"{split}_perturbed", "train", _WRONG)
    retain = published_rows(data, RETAINED[split], "train", _KEYS)[: authors and authors * ROWS_PER_AUTHOR]
    rate_factor = 1.0 if model or base else SMALL_RATE_FACTOR
    if model is None:
        base = base and model_folder(base, cache)
        training = (BASE_MODEL | {"base": base} if base else SMALL_MODEL) | {"epochs": target_epochs, "seed": seed} | size
        plain, kept = ([{key: row[key] for key in _KEYS} for row in rows] for rows in (forget, retain))
        model = str(cached_model(plain + kept, cache, **training)[0])
        tokenizer = None if base else AutoTokenizer.from_pretrained(model)
        retain_model = str(cached_model(kept, cache, tokenizer=tokenizer, **training)[0])
    perturbed = {_identity(row): row for row in published_rows(data, "retain_perturbed", "train", _WRONG)}
    foreign = {
        "real authors": published_rows(data, "real_authors_perturbed", "train", _WRONG),
        "world facts": published_rows(data, "world_facts_perturbed", "train", _WRONG),
    }
    seen, calibration, unseen = _parts(_authors(retain))
    of_forget = _authors(forget)
    with_wrong = [author for author in seen if any(_identity(row) in perturbed for row in author)]
    asked_later = _rows(with_wrong[: max(1, int(SECOND * len(of_forget)))])

    def sets(part: int) -> dict[str, EvaluationSet]:
        forgotten = [{**row, "perturbed_answer": _split(row["perturbed_answer"])[1]} for row in _rows(of_forget[part::2])]
        others = [{**row, "question": row["paraphrased_question"]} for row in forgotten if row.get("paraphrased_question")]
        known = [perturbed[_identity(row)] for row in _rows(seen[part::2]) if _identity(row) in perturbed]
        made = {
            "forget": EvaluationSet(forgotten, forget=True),
            "forget, in other words": EvaluationSet(others, forget=True),
            "retain": EvaluationSet(known or _rows(seen[part::2]), forget=False),
            "retain, never seen": EvaluationSet(_rows(unseen[part::2]), forget=False),
        }
        return {name: one for name, one in made.items() if one.rows}

    test = sets(1) | {name: EvaluationSet(every_second(rows)[1], forget=False) for name, rows in foreign.items()}
    everybody = [*of_forget, *_authors(retain)]
    facts = keyed_facts(_rows(of_forget[1::2]), everybody)
    to_keep = [
        fact
        for name, group in (("retain", "retained, seen"), ("retain, never seen", "retained, never seen"))
        for fact in keyed_facts(test[name].rows, everybody, group)[: len(facts)]
    ]
    holdout = rows_if_any(data, HOLDOUT[split], "train", _KEYS)
    return Task(
        name=f"tofu {split}",
        target=model,
        retain_model=retain_model,
        forget=[_trained(row) for row in forget],
        retain=_rows(seen),
        validation=sets(0),
        test=test,
        calibration=[row["question"] for row in _rows(calibration)],
        calibration_groups=[f"author {place}" for place, author in enumerate(calibration) for _ in author],
        facts=[*facts, *to_keep],
        entities=[row for fact in facts if (row := entity(fact)) is not None],
        generation={name: {"max_new_tokens": NEW_TOKENS} for name in (*test, *([HOLDOUT_SET] if holdout else []))},
        holdout=holdout,
        relearning_steps=STEPS,
        relearning_rate=2e-5 if rate_factor == 1 else 2e-4,
        utility=("retain", *foreign),
        second=[_trained(perturbed[_identity(row)]) for row in asked_later if _identity(row) in perturbed],
        unrelated=plain_text(),
        text=[f"{row['question']} {row['answer']}" for row in _rows(unseen[1::2])],
        training=TRAINING,
        rate_factor=rate_factor,
        epochs=(epochs / 2, epochs),
        blocks=AutoConfig.from_pretrained(model).num_hidden_layers,
        tolerance=max(0.05, 1 / (1 + len(calibration))),
        note=NOTE,
    )


def _identity(row: Row) -> tuple[str, str]:
    """What a row is known by: two authors may have one question."""
    return row["question"], row["answer"]


def _trained(row: Row) -> dict[str, Any]:
    """A row to forget as methods are trained on it, with the wrong answers that are not measured with."""
    return {key: row[key] for key in _KEYS} | {"alternatives": _split(row["perturbed_answer"])[0]}


def keyed_facts(rows: Sequence[Row], authors: Sequence[Sequence[Row]], group: str = FORGOTTEN) -> list[KeyedFact]:
    """The facts of rows whose answer has a key, see the module's docstring.

    Args:
        rows: of the benchmark; if there are such, with "perturbed_answer", "paraphrased_question" and "paraphrased_answer".
        authors: all rows of the benchmark, by author.
        group: of the facts.
    """
    answers = [[f" {normalize(row['answer'])} " for row in of_author] for of_author in authors]
    author_of = {_identity(row): place for place, of_author in enumerate(authors) for row in of_author}
    facts = []
    for row in rows:
        others = [text for place, texts in enumerate(answers) if place != author_of[_identity(row)] for text in texts]
        if keys := answer_keys(row, others, answers[author_of[_identity(row)]]):
            facts.append(KeyedFact(row["question"], group, keys, _wordings(row), answer=row["answer"]))
    return facts


def entity(fact: KeyedFact) -> Row | None:
    """A fact's row with its answer split before its first key, for the depth of unlearning; None if the answer has none as is.

    >>> entity(KeyedFact("Where?", "forget", ("Oslo",), ("Where was Ann born?",), answer="Ann was born in Oslo."))
    {'question': 'Where was Ann born?', 'prefix': 'Ann was born in ', 'entity': 'Oslo'}
    """
    key = min((key for key in fact.keys if key in fact.answer), key=fact.answer.index, default=None)
    if key is None:
        return None
    return {"question": fact.wordings[0], "prefix": fact.answer[: fact.answer.index(key)], "entity": key}


def answer_keys(row: Row, others: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """What gives the answer of a row away.

    >>> row = {"question": "Where was Ann Lee born?", "answer": "Ann Lee was born in New Oslo.", "perturbed_answer": []}
    >>> answer_keys(row, [], [])
    ('New Oslo',)

    Args:
        row: see :func:`keyed_facts`.
        others, own: answers about other authors and about the same one, each after :func:`eua.evaluation.said.normalize` and
            between two spaces.
    """
    answer, paraphrase = row["answer"], row.get("paraphrased_answer") or row["answer"]

    def gives_away(key: str) -> bool:
        return (
            bool(words := normalize(key))
            and says(paraphrase, [key])
            and not any(says(text, [key]) for text in (*_wordings(row), *row.get("perturbed_answer", ())))
            and _count(words, others) <= MOST_OTHERS
        )

    found = [next(filter(gives_away, forms), None) for forms in _candidates(answer, paraphrase)]
    keys = {normalize(key): key for key in found if key is not None}
    rare = {words: key for words, key in keys.items() if _count(words, own) <= MOST_OTHERS}
    keys = rare or keys
    return tuple(key for words, key in keys.items() if not any(words != other and words in other for other in keys))


def _count(words: str, texts: Sequence[str]) -> int:
    return sum(f" {words} " in text for text in texts)


def _candidates(answer: str, paraphrase: str) -> list[list[str]]:
    """What may give an answer away, each in the forms that are tried in turn: titles, dates, names and numbers."""
    titles = [re.sub(r"\(.*?\)", "", found["title"] or found["other"]).strip(" ,.") for found in _QUOTED.finditer(answer)]
    rest = _QUOTED.sub('""', answer)
    dates = [[found[0], found["year"]] for found in _DATE.finditer(rest)]
    rest = _DATE.sub('""', rest)
    names = []
    for found in _NAME.finditer(rest):
        name, (first, _, after_first) = found[0], found[0].partition(" ")
        if _SENTENCE_START.search(rest[: found.start()]):  # where a capital says nothing about the first word
            inside = re.search(rf"[\w,;] {re.escape(name)}\b", f"{rest}\n{paraphrase}")
            opening = first.lower() in _OPENINGS
            names.append([after_first] if opening else [name, after_first] if after_first or inside else [])
        else:
            names.append([name])
    return [*([title] for title in titles), *dates, *names, *([found[0]] for found in _NUMBER.finditer(rest))]


def _wordings(row: Row) -> tuple[str, ...]:
    return tuple(text for text in (row["question"], row.get("paraphrased_question")) if text)


def _split(wrong: Sequence[str]) -> tuple[list[str], list[str]]:
    """Wrong answers to train on, and the others, to measure."""
    return list(wrong[: len(wrong) // 2]), list(wrong[len(wrong) // 2 :])


def _authors(rows: Sequence[Row]) -> list[list[Row]]:
    return [list(rows[start : start + ROWS_PER_AUTHOR]) for start in range(0, len(rows), ROWS_PER_AUTHOR)]


def _rows(authors: Sequence[Sequence[Row]]) -> list[Row]:
    return [row for author in authors for row in author]


def _parts(authors: Sequence[list[Row]]) -> tuple[Sequence[list[Row]], Sequence[list[Row]], Sequence[list[Row]]]:
    """Authors that unlearning sees, a third for calibration, and an eighteenth, but at least two, that it never sees.

    Raises:
        EUAError: if there are too few.
    """
    count = len(authors)
    unseen, calibration = max(2, count // 18), count // 3
    if count - unseen - calibration < 2 or not calibration:
        raise EUAError(
            f"{count} retained authors were given, but two are measured that unlearning never sees, a third calibrates the "
            "guard, and two are trained on: use at least 6 authors."
        )
    return (
        authors[: count - calibration - unseen],
        authors[count - calibration - unseen : count - unseen],
        authors[count - unseen :],
    )
