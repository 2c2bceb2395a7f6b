"""Results as tables: a row per method and per model to compare with, means over seeds with 95 % t intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eua.bench.choice import Point, area_under_front, interval
from eua.bench.trial import RETAIN_ONLY, TARGET

Result = Mapping[str, Any]  # of one trial, as eua.bench.trial.run_trial returns it
_GIB = 2**30


@dataclass(frozen=True)
class Column:
    """A figure of a trial's result: its heading, where it is in the result, and its format."""

    heading: str
    path: tuple[str, ...]
    format: str = ".3f"
    factor: float = 1.0


@dataclass(frozen=True)
class Table:
    """A title, what there is to know about the figures, the headings, and the rows of cells."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


SAID = Column("said in any wording", ("metrics", "said", "any wording"))
KNOWLEDGE = (
    Column("extraction strength, forget", ("objectives", "forget")),
    Column("extraction strength, retain", ("objectives", "retain")),
    Column("forget quality (p)", ("metrics", "aggregates", "forget_quality"), ".2g"),
    Column("model utility", ("metrics", "aggregates", "model_utility")),
    Column("memorization score", ("metrics", "aggregates", "memorization_score")),
    Column("depth of unlearning", ("metrics", "aggregates", "unlearning_depth")),
    Column("perplexity", ("metrics", "perplexity"), ".4g"),
)
PRIVACY = (
    Column("privacy leakage (%)", ("metrics", "aggregates", "privacy_leakage"), ".1f"),
    Column("privacy score", ("metrics", "aggregates", "privacy_score")),
)
COST = (
    Column("seconds", ("seconds",), ".1f"),
    Column("peak memory (GiB)", ("peak_bytes",), ".2f", 1 / _GIB),
)
# Of every set of rows. ROUGE and the truth ratio are not defined for all rows.
OF_SETS = {
    "extraction_strength": "extraction strength",
    "exact_memorization": "exact memorization",
    "probability": "answer probability",
    "truth_ratio": "truth ratio",
    "truth_ratio_openunlearning": "truth ratio (OpenUnlearning)",
    "rouge_l_recall": "ROUGE-L recall",
    "declined": "declines by itself, guard off",
    "refused": "refused by the guard",
    "refused_paraphrased": "refused by the guard, paraphrased",
}
METHOD = "method"
LASTING = (
    "What is left of the rows to forget, guard off: extraction strength where nothing else is said, the largest one during "
    "fine-tuning, and the share of facts that a greedy answer says. Compare relearning with that of the retain-only model, "
    "which learns, too."
)


def tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables of the results of :func:`eua.bench.run.results_of`. The first figure is always what is said in any wording."""
    by_method = _by_method(results)
    if not by_method:
        return [_tuning(results)]
    first = next(of_seeds[0] for of_seeds in by_method.values())
    sets = list(first["metrics"]["sets"])
    made = [
        _table("What was forgotten and what was kept", _note(results), by_method, (SAID, *KNOWLEDGE)),
        *(
            _table(
                f"Rows of the set “{name}”",
                "The guard is off, except for the share of prompts that it refuses.",
                by_method,
                (SAID, *(Column(heading, ("metrics", "sets", name, key)) for key, heading in OF_SETS.items())),
            )
            for name in sets
        ),
        _table(
            "Said, by way of asking",
            "The share of the facts to forget whose key is in at least one answer, and the same of groups of "
            "facts to retain, by their names.",
            by_method,
            _columns(by_method, ("metrics", "said"), first=SAID),
        ),
        _table(
            "Membership inference",
            "AUROC of attacks, rows to forget against rows that no model was trained on: 1 is a member without doubt, 0.5 "
            "cannot be distinguished.",
            by_method,
            (SAID, *_columns(by_method, ("metrics", "membership")), *PRIVACY),
        ),
        _table(
            "Prompt energy",
            "AUROC of the energy of the prompt's last token, rows to forget against each set to retain.",
            by_method,
            (SAID, *(Column(name, ("metrics", "separation", name, "auroc")) for name in first["metrics"]["separation"])),
        ),
        _table("Lasting", LASTING, by_method, (SAID, *_columns(by_method, ("metrics", "lasting")))),
        _table("Cost of unlearning", "Of training alone, without measuring.", by_method, (SAID, *COST)),
        _tuning(results),
    ]
    return [table for table in made if set(table.head) - {METHOD, SAID.heading}]


def value_of(result: Result, column: Column) -> float | None:
    """The figure of a column; None if the result does not have it."""
    value: Any = result
    for key in column.path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) * column.factor if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def mean_cell(values: Iterable[float | None], form: str = ".3f") -> str:
    """A mean over seeds, with half the width of its interval if there are several; empty if there is no value."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return ""
    mean, half_width, count = interval(known)
    return format(mean, form) if count == 1 else f"{mean:{form}} ± {half_width:{form}}"


def markdown(made: Sequence[Table]) -> str:
    """Tables as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    parts = []
    for table in made:
        rule = "|" + "---|" * len(table.head)
        parts.append("\n".join([f"## {table.title}", "", table.note, "", line(table.head), rule, *map(line, table.rows)]))
    return "\n\n".join(parts) + "\n"


def points_of(results: Mapping[str, Any], method: str) -> list[Point]:
    """What the trials of a method's tuning forgot and kept, on the validation split."""
    return [
        Point(trial["result"]["objectives"]["forget"], trial["result"]["objectives"]["retain"])
        for trial in results["tuning"]
        if trial["plan"]["method"] == method and trial["result"] is not None
    ]


def _by_method(results: Mapping[str, Any]) -> dict[str, list[Result]]:
    """The results at all seeds, by method, after those of the models to compare with."""
    order = (TARGET, RETAIN_ONLY, *results["methods"])
    found: dict[str, list[Result]] = {name: [] for name in order}
    for trial in results["report"]:
        if trial["result"] is not None and trial["plan"]["method"] in found:
            found[trial["plan"]["method"]].append(trial["result"])
    return {name: of_seeds for name, of_seeds in found.items() if of_seeds}


def _table(title: str, note: str, by_method: Mapping[str, Sequence[Result]], columns: Sequence[Column]) -> Table:
    """A table of the columns that some method has a figure for."""
    cells = {
        column: {
            name: mean_cell((value_of(one, column) for one in of_seeds), column.format) for name, of_seeds in by_method.items()
        }
        for column in dict.fromkeys(columns)
    }
    shown = [column for column, of_column in cells.items() if any(of_column.values())]
    rows = [[name, *(cells[column][name] for column in shown)] for name in by_method]
    return Table(title, note, [METHOD, *(column.heading for column in shown)], rows)


def _columns(by_method: Mapping[str, Sequence[Result]], path: tuple[str, ...], first: Column | None = None) -> list[Column]:
    """A column for every figure below a path of the results, in the order in which they occur."""
    found: dict[tuple[str, ...], None] = {} if first is None else {first.path: None}

    def add(value: Any, way: tuple[str, ...]) -> None:
        if isinstance(value, Mapping):
            for key, part in value.items():
                add(part, (*way, key))
        elif isinstance(value, (int, float)):
            found[way] = None

    for of_seeds in by_method.values():
        for result in of_seeds:
            value: Any = result
            for key in path:
                value = value.get(key, {})
            add(value, path)
    return [first if first and way == first.path else Column(", ".join(way[len(path) :]), way) for way in found]


def _note(results: Mapping[str, Any]) -> str:
    seeds = results["seeds"]
    spread = f"Means over {seeds} seeds ± half the width of their 95 % t interval" if seeds > 1 else "One seed"
    missing = "" if results["complete"] else " The benchmark is not complete: run the same command again."
    return (
        f"{spread}, on the test split of the task {results['task']}. The guard is off unless a heading says otherwise.{missing}"
    )


def _tuning(results: Mapping[str, Any]) -> Table:
    """How the settings of every method were chosen."""
    rows = []
    for method in results["methods"]:
        trials = [trial for trial in results["tuning"] if trial["plan"]["method"] == method]
        failed = [trial for trial in trials if trial["result"] is None]
        points, chosen = points_of(results, method), results["chosen"][method]
        settings = (
            ", ".join(
                f"{name} = {value:g}" if isinstance(value, float) else f"{name} = {value}"
                for name, value in chosen["settings"].items()
            )
            if chosen
            else ""
        )
        rows.append(
            [
                method,
                f"{area_under_front(points):.3f}" if points else "",
                f"{len(trials)} of {results['trials']}" + (f", {len(failed)} failed" if failed else ""),
                "" if chosen is None else "yes" if chosen["reached"] else "never reached",
                settings or (failed[0]["error"] if failed else "not yet chosen"),
            ]
        )
    kept = f"{100 * results['kept']:g} %"
    note = (
        f"On the validation split, at one seed: chosen is the setting that forgets most among those that keep {kept} of the "
        "model's extraction strength on rows to retain; if none does, the one that keeps most."
    )
    return Table("Tuning", note, [METHOD, "area under the front", "trials", f"keeps {kept}", "chosen settings"], rows)
