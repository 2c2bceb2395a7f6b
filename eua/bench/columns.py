"""What tables show of a trial's result: where each figure is, its heading, and the cell of its mean over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eua.bench.choice import interval

Result = Mapping[str, Any]  # of one trial, as eua.bench.trial.run_trial returns it
_GIB = 2**30


@dataclass(frozen=True)
class Column:
    """A figure of a trial's result: its heading, where it is in the result, and its format.

    ``median``: of p-values, whose mean and interval have no meaning, the median over seeds is shown.
    """

    heading: str
    path: tuple[str, ...]
    format: str = ".3f"
    factor: float = 1.0
    median: bool = False


SAID = Column("said in any wording", ("metrics", "said", "any wording"))
BY_CHANCE = Column("said by chance", ("metrics", "said", "any wording, by chance"))  # in answers about others of the same kind
AGGREGATES = (
    Column("forget quality (p, median)", ("metrics", "aggregates", "forget_quality"), ".2g", median=True),
    Column("model utility", ("metrics", "aggregates", "model_utility")),
    Column("memorization score", ("metrics", "aggregates", "memorization_score")),
    Column("depth of unlearning", ("metrics", "aggregates", "unlearning_depth")),
    Column("perplexity", ("metrics", "perplexity"), ".4g"),
)
PRIVACY = (
    Column("privacy leakage (%)", ("metrics", "aggregates", "privacy_leakage"), ".1f"),
    Column("privacy score", ("metrics", "aggregates", "privacy_score")),
)
SAID_GUARDED = Column("said, guard on", ("metrics", "said", "any wording, guard on"))
RELEARNED = Column("extraction strength, relearned", ("metrics", "lasting", "relearning on the same rows"))
COST = (
    Column("seconds", ("seconds",), ".1f"),
    Column("peak memory (GiB)", ("peak_bytes",), ".2f", 1 / _GIB),
)
# Of every set of rows. ROUGE and the truth ratio are not defined for all rows.
OF_SETS = {
    "extraction_strength": "extraction strength",
    "extraction_strength_openunlearning": "extraction strength (OpenUnlearning)",
    "exact_memorization": "exact memorization",
    "exact_memorization_openunlearning": "exact memorization (OpenUnlearning)",
    "probability": "answer probability",
    "paraphrase_probability": "probability of the paraphrase",
    "probability_with_options": "probability with options",
    "right_answer_share": "share of the right answer",
    "truth_ratio": "truth ratio",
    "truth_ratio_openunlearning": "truth ratio (OpenUnlearning)",
    "rouge_1_recall": "ROUGE-1 recall",
    "rouge_l_recall": "ROUGE-L recall",
    "rouge_l_recall_guarded": "ROUGE-L recall, guard on",
    "rouge_l_f1": "ROUGE-L F1",
    "rouge_l_f1_guarded": "ROUGE-L F1, guard on",
    "repetition": "repetition",
    "perplexity": "perplexity of its texts",
    "accuracy": "chooses the right answer",
    "declined": "declines by itself, guard off",
    "refused": "refused by the guard",
    "refused_paraphrased": "refused by the guard, paraphrased",
}


def objectives_of(results: Mapping[str, Any]) -> tuple[Column, Column]:
    """The columns of what settings were chosen by, on the test split."""
    name = results["objective"]
    return Column(f"{name}, forget", ("objectives", "forget")), Column(f"{name}, retain", ("objectives", "retain"))


def value_of(result: Result, column: Column) -> float | None:
    """The figure of a column; None if the result does not have it."""
    value: Any = result
    for key in column.path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) * column.factor if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def mean_cell(values: Iterable[float | None], form: str = ".3f", *, median: bool = False) -> str:
    """A mean over seeds, with half the width of its interval if they differ; empty if there is no value.

    ``median``: the median in its place, without an interval.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return ""
    if median:
        return format(statistics.median(known), form)
    mean, half_width, count = interval(known)
    same = count == 1 or min(known) == max(known)  # which says nothing about other seeds
    return format(mean, form) if same else f"{mean:{form}} ± {half_width:{form.removeprefix('+')}}"


def columns_below(every: Sequence[Result], path: tuple[str, ...], first: Column | None = None) -> list[Column]:
    """A column for every figure below a path of the results, in the order in which they occur."""
    found: dict[tuple[str, ...], None] = {} if first is None else {first.path: None}

    def add(value: Any, way: tuple[str, ...]) -> None:
        if isinstance(value, Mapping):
            for key, part in value.items():
                add(part, (*way, key))
        elif isinstance(value, (int, float)):
            found[way] = None

    for result in every:
        value: Any = result
        for key in path:
            value = value.get(key, {})
        add(value, path)
    return [first if first and way == first.path else Column(", ".join(way[len(path) :]), way) for way in found]
