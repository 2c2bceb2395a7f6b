"""TOFU as a task (Maini et al. 2024): fictitious authors with 20 question–answer pairs each.

Rows come from the hub (``locuslab/TOFU``) or from a folder of files named like its configurations. The target is a model of the
user's, or a small one that is trained from scratch on all rows, as in docs/measurements.md.

Authors are 20 consecutive rows, and every split is by author: the rows to retain fall into authors that unlearning sees,
authors for the guard's calibration, and authors that unlearning never sees.

**Keys.** TOFU does not say which words of an answer give it away. Here they are the words and numbers of the answer that are
not in its question and that begin with a capital letter, or have a digit, and that at most 1 % of the other answers contain. A
fact without such a word is left out. This is a heuristic: an answer that names something common is missed, and one rare word of
several is taken for the whole answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from eua.bench.facts import FORGET
from eua.bench.published import every_second, published_rows, rows_if_any
from eua.bench.task import EvaluationSet, Task
from eua.data.sources import Row
from eua.demo.target import cached_model
from eua.errors import EUAError
from eua.evaluation.said import KeyedFact, normalize

HUB = "locuslab/TOFU"
RETAINED = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
HOLDOUT = {"forget01": "holdout01", "forget05": "holdout05", "forget10": "holdout10"}
ROWS_PER_AUTHOR = 20
RAREST = 0.01  # share of the other answers that may contain a key
# Of docs/measurements.md, for the small model; the released ones are for a model of the user's.
SMALL_MODEL: dict[str, Any] = {"vocabulary": 4096, "batch_size": 16, "learning_rate": 1e-3}
SMALL_RATE_FACTOR = 20.0  # by which published learning rates are multiplied
BASE_MODEL: dict[str, Any] = {"batch_size": 32, "learning_rate": 2e-4}  # of 135M to 1B parameters
BASE_RATE_FACTOR = 4.0
TRAINING = {"per_device_train_batch_size": 16, "retain_per_forget": 3}
_KEYS = ("question", "answer")
_WRONG = (*_KEYS, "perturbed_answer")


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
        base: folder or hub name of a model that is trained on the rows instead, e.g. SmolLM2; None: one from scratch.
        authors: number of retained authors that are used; None: all.
        target_epochs: passes of a small model over its rows.
        epochs: the larger number of passes of unlearning over the rows to forget; half of it is the other one.
        size: further arguments of :func:`eua.demo.target.train_target`.

    Raises:
        EUAError: if rows cannot be read, or for a split that does not exist.
    """
    if split not in RETAINED:
        raise EUAError(f"The split {split!r} was asked for, but TOFU has {', '.join(RETAINED)}: name one of these.")
    forget = published_rows(data, f"{split}_perturbed", "train", _WRONG)
    retain = published_rows(data, RETAINED[split], "train", _KEYS)[: authors and authors * ROWS_PER_AUTHOR]
    rate_factor = 1.0 if model else BASE_RATE_FACTOR if base else SMALL_RATE_FACTOR
    if model is None:
        training = (BASE_MODEL | {"base": base} if base else SMALL_MODEL) | {"epochs": target_epochs, "seed": seed} | size
        plain, kept = ([{key: row[key] for key in _KEYS} for row in rows] for rows in (forget, retain))
        model = str(cached_model(plain + kept, cache, **training)[0])
        tokenizer = None if base else AutoTokenizer.from_pretrained(model)
        retain_model = str(cached_model(kept, cache, tokenizer=tokenizer, **training)[0])
    perturbed = {row["question"]: row for row in published_rows(data, "retain_perturbed", "train", _WRONG)}
    foreign = {
        "real authors": published_rows(data, "real_authors_perturbed", "train", _WRONG),
        "world facts": published_rows(data, "world_facts_perturbed", "train", _WRONG),
    }
    seen, calibration, unseen = _parts(_authors(retain))
    of_forget = _authors(forget)

    def sets(part: int) -> dict[str, EvaluationSet]:
        forgotten = _rows(of_forget[part::2])
        others = [{**row, "question": row["paraphrased_question"]} for row in forgotten if row.get("paraphrased_question")]
        known = [perturbed[row["question"]] for row in _rows(seen[part::2]) if row["question"] in perturbed]
        made = {
            "forget": EvaluationSet(forgotten, forget=True),
            "forget, in other words": EvaluationSet(others, forget=True),
            "retain": EvaluationSet(known or _rows(seen[part::2]), forget=False),
            "retain, never seen": EvaluationSet(_rows(unseen[part::2]), forget=False),
        }
        return {name: one for name, one in made.items() if one.rows}

    test = sets(1) | {name: EvaluationSet(every_second(rows)[1], forget=False) for name, rows in foreign.items()}
    return Task(
        name=f"tofu {split}",
        target=model,
        retain_model=retain_model,
        forget=[{key: row[key] for key in _KEYS} | {"alternatives": row["perturbed_answer"]} for row in forget],
        retain=_rows(seen),
        validation=sets(0),
        test=test,
        calibration=[row["question"] for row in _rows(calibration)],
        calibration_groups=[f"author {place}" for place, author in enumerate(calibration) for _ in author],
        facts=keyed_facts(test["forget"].rows, [row["answer"] for row in [*forget, *retain]]),
        holdout=rows_if_any(data, HOLDOUT[split], "train", _KEYS),
        relearning_steps=(1, 2, 5, 10, 20),
        relearning_rate=2e-5 if rate_factor == 1 else 2e-4,
        utility=("retain", *foreign),
        text=[f"{row['question']} {row['answer']}" for row in _rows(unseen)],
        training=TRAINING,
        rate_factor=rate_factor,
        epochs=(epochs / 2, epochs),
        blocks=AutoConfig.from_pretrained(model).num_hidden_layers,
        tolerance=max(0.05, 1 / (1 + len(calibration))),
    )


def keyed_facts(rows: Sequence[Row], answers: Sequence[str]) -> list[KeyedFact]:
    """The facts of rows whose answer has a word that gives it away, see the module's docstring.

    Args:
        rows: rows to forget, with "paraphrased_question" if they have another wording.
        answers: all answers of the benchmark, by which rare words are found; those of ``rows`` are among them.
    """
    counts = Counter(word for answer in answers for word in set(normalize(answer).split()))
    facts = []
    for row in rows:
        keys = answer_keys(row["question"], row["answer"], counts, len(answers))
        wordings = [row["question"], *([row["paraphrased_question"]] if row.get("paraphrased_question") else [])]
        if keys:
            facts.append(KeyedFact(row["question"], FORGET, keys, tuple(wordings), answer=row["answer"]))
    return facts


def answer_keys(question: str, answer: str, counts: Counter[str], total: int) -> tuple[str, ...]:
    """The words of an answer that give it away, in their order.

    >>> counts = Counter({"oslo": 1, "born": 40, "in": 90, "ann": 1, "was": 80})
    >>> answer_keys("Where was Ann born?", "Ann was born in Oslo.", counts, 100)
    ('Oslo',)

    Args:
        question, answer: of the row.
        counts: in how many of all ``total`` answers each normalized word is.
    """
    asked = set(normalize(question).split())
    rare = max(1, round(RAREST * total))
    found: dict[str, str] = {}
    for word in re.findall(r"[^\s,;:()\"“”]+", answer):
        key = normalize(word)
        is_name = word.strip("'‘’.-")[:1].isupper() or any(letter.isdigit() for letter in word)
        if is_name and key and " " not in key and key not in asked and counts[key] <= rare:
            found.setdefault(key, word.strip(".'‘’!?"))
    return tuple(found.values())


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
