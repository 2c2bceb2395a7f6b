"""Results as tables: a row per method and per model to compare with, means over seeds with 95 % t intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eua.bench.choice import Point, area_under_front, interval, relative_to
from eua.bench.lasting import SHOULD_STAY
from eua.bench.trial import RETAIN_ONLY, TARGET
from eua.evaluation.retain_model import HOLDOUT

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


@dataclass(frozen=True)
class Table:
    """A title, what there is to know about the figures, the headings, and the rows of cells."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


SAID = Column("said in any wording", ("metrics", "said", "any wording"))
BY_CHANCE = Column("said by chance", ("metrics", "said", "any wording, by chance"))  # in answers about others of the same kind
KNOWLEDGE = (
    Column("extraction strength, forget", ("objectives", "forget")),
    Column("extraction strength, retain", ("objectives", "retain")),
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
    "exact_memorization": "exact memorization",
    "probability": "answer probability",
    "truth_ratio": "truth ratio",
    "truth_ratio_openunlearning": "truth ratio (OpenUnlearning)",
    "rouge_l_recall": "ROUGE-L recall",
    "rouge_l_f1": "ROUGE-L F1",
    "accuracy": "chooses the right answer",
    "declined": "declines by itself, guard off",
    "refused": "refused by the guard",
    "refused_paraphrased": "refused by the guard, paraphrased",
}
METHOD = "method"
OURS = "eua"  # the method that others are compared with
NOT_KEPT = "†"  # of a method none of whose trials kept enough
LASTING = (
    "What is left of the rows to forget, guard off where nothing else is said: extraction strength, in relearning the largest "
    "one during fine-tuning; “said” is the share of facts that a greedy answer says. Lower is better."
)
OF_SET = (
    "The guard is off, except for the share of prompts that it refuses. The second truth ratio is min(R, 1/R) of rows to "
    "forget and max(0, 1 − R) of others, as OpenUnlearning aggregates it."
)
OF_HOLDOUT = (
    "Rows like those to forget on which no model was trained. They are neither to be forgotten nor to be retained, so it is no "
    "fault to refuse them."
)
OF_COST = (
    "Of one training with the chosen settings, which differ in epochs and in rows to retain, beside other trials on the same "
    "machine. Boundaries and likelihoods of the model before unlearning are part of it, loading and measuring are not."
)
STAYING = (
    "What should stay, guard off where nothing else is said: the share of forgotten facts that a greedy answer says when the "
    "prompt states them, and the extraction strength of rows to retain after a second request. Higher is better."
)


def tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables of the results of :func:`eua.bench.run.results_of`. The first figure is always what is said in any wording."""
    by_method = _by_method(results)
    if not any(by_method.values()):
        return [table for table in (_failed(results), _tuning(results)) if table.rows]
    every = [result for of_seeds in by_method.values() for result in of_seeds]
    sets, separated = (dict.fromkeys(name for one in every for name in one["metrics"][key]) for key in ("sets", "separation"))
    names = {method: _name(method, len(of_seeds), results) for method, of_seeds in by_method.items()}
    lasting = _columns(every, ("metrics", "lasting"))
    of_staying = [column for column in lasting if column.heading.startswith(SHOULD_STAY)]

    def table(title: str, note: str, columns: Sequence[Column]) -> Table:
        return _table(title, note, by_method, names, columns)

    made = [
        _with_kept(table("What was forgotten and what was kept", _note(results), (SAID, BY_CHANCE, *KNOWLEDGE)), results),
        _compared(results, names),
        *(
            table(
                f"Rows of the set “{name}”",
                OF_HOLDOUT if name == HOLDOUT else OF_SET,
                (SAID, *(Column(heading, ("metrics", "sets", name, key)) for key, heading in OF_SETS.items())),
            )
            for name in sets
        ),
        table(
            "Said, by way of asking",
            "The share of the facts to forget whose key is in at least one answer, and the same of groups of "
            "facts to retain, by their names. More answers say more facts, so compare shares of equally many answers.",
            _columns(every, ("metrics", "said"), first=SAID),
        ),
        table(
            "The worst of k sampled answers",
            "leak@k of the facts to forget, guard off: the expected maximum over k answers to a question of whether the key is "
            "said, of the words in common with the true answer (ROUGE-L recall), and of the similarity of their meaning "
            "(cosine of all-MiniLM-L6-v2's embeddings). Answers of the right form about something else have words and meaning "
            "in common with it, too, so compare both with those of the retain-only model.",
            (SAID, *_columns(every, ("metrics", "leaks"))),
        ),
        table(
            "Membership inference",
            "AUROC of attacks, rows to forget against rows that no model was trained on: 1 is a member without doubt, 0.5 "
            "cannot be distinguished."
            + _beside_retain_only(
                results,
                "Where its own AUROC is not 0.5, the rows differ in other "
                "ways, too, and a value above or below its own gives a member away.",
            ),
            (SAID, *_columns(every, ("metrics", "membership")), *PRIVACY),
        ),
        table(
            "Prompt energy",
            "AUROC of the energy of the prompt's last token, rows to forget against each set to retain.",
            (SAID, *(Column(name, ("metrics", "separation", name, "auroc")) for name in separated if name != HOLDOUT)),
        ),
        table(
            "What is left of the forgotten",
            LASTING + _beside_retain_only(results, "It learns in relearning, too."),
            (SAID, *(one for one in lasting if one not in of_staying)),
        ),
        table("What should stay", STAYING, (SAID, *of_staying)),
        table("Cost of unlearning", OF_COST, (SAID, *COST)),
        *([failed] if (failed := _failed(results)).rows else []),
        _tuning(results),
    ]
    return [one for one in made if set(one.head) - {METHOD, SAID.heading}]


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


def markdown(made: Sequence[Table]) -> str:
    """Tables with their titles and notes as Markdown."""
    return "\n".join(f"## {table.title}\n\n{table.note}\n\n{markdown_table(table)}" for table in made)


def markdown_table(table: Table) -> str:
    """The cells alone as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    return line(table.head) + "|" + "---|" * len(table.head) + "\n" + "".join(map(line, table.rows))


def points_of(results: Mapping[str, Any], method: str) -> list[Point]:
    """What the trials of a method's tuning forgot and kept, on the validation split."""
    return [
        Point(trial["result"]["objectives"]["forget"], trial["result"]["objectives"]["retain"])
        for trial in results["tuning"]
        if trial["plan"]["method"] == method and trial["result"] is not None
    ]


def area_of(results: Mapping[str, Any], method: str) -> float | None:
    """The area under the front of a method's trials, relative to the model before unlearning; None until both are measured."""
    points, target = points_of(results, method), points_of(results, TARGET)
    return area_under_front(relative_to(target[0], points)) if points and target else None


def _by_method(results: Mapping[str, Any]) -> dict[str, list[Result]]:
    """The results at all seeds, by method, after those of the models to compare with. A method may have none."""
    compared = [name for name in (TARGET, RETAIN_ONLY) if any(trial["plan"]["method"] == name for trial in results["report"])]
    found: dict[str, list[Result]] = {name: [] for name in (*compared, *results["methods"])}
    for trial in results["report"]:
        if trial["result"] is not None and trial["plan"]["method"] in found:
            found[trial["plan"]["method"]].append(trial["result"])
    return found


def _name(method: str, count: int, results: Mapping[str, Any]) -> str:
    """A method as tables name it: with a mark if it never kept enough, and its number of results if seeds are missing."""
    chosen = results["chosen"].get(method)
    mark = f" {NOT_KEPT}" if chosen is not None and not chosen["reached"] else ""
    return f"{method}{mark}" + (f" ({count} of {results['seeds']} seeds)" if count < results["seeds"] else "")


def _table(
    title: str,
    note: str,
    by_method: Mapping[str, Sequence[Result]],
    names: Mapping[str, str],
    columns: Sequence[Column],
) -> Table:
    """A table of the columns that some method has a figure for."""
    cells = {
        column: {
            method: mean_cell((value_of(one, column) for one in of_seeds), column.format, median=column.median)
            for method, of_seeds in by_method.items()
        }
        for column in dict.fromkeys(columns)
    }
    shown = [column for column, of_column in cells.items() if any(of_column.values())]
    rows = [[names[method], *(cells[column][method] for column in shown)] for method in by_method]
    return Table(title, note, [METHOD, *(column.heading for column in shown)], rows)


def _compared(results: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    """What every other method has more or less than EUA, seed by seed, so that what both have in common does not count."""
    columns = (SAID, SAID_GUARDED, *KNOWLEDGE[:2], RELEARNED)
    at = {(trial["plan"]["method"], trial["plan"]["seed"]): trial["result"] for trial in results["report"] if trial["result"]}
    seeds = sorted(seed for method, seed in at if method == OURS)
    rows = []
    for method in results["methods"]:
        pairs = [(at[method, seed], at[OURS, seed]) for seed in seeds if (method, seed) in at]
        if method != OURS and len(pairs) > 1:
            rows.append([names[method], *(_differences(pairs, column) for column in columns)])
    note = (
        f"A method's figure less that of {OURS} at the same seed: the mean, ± half the width of the 95 % t interval of the "
        "differences. Where that has 0 in it, these seeds do not tell the two apart; of so many comparisons, one in twenty "
        f"has not by chance alone. Of what should be small, {OURS} has less where a difference is above 0."
    )
    return Table(f"Compared with {OURS}", note, [METHOD, *(column.heading for column in columns if rows)], rows)


def _differences(pairs: Sequence[tuple[Result, Result]], column: Column) -> str:
    """A cell: the mean difference of a column, if all results have it."""
    values = [(value_of(one, column), value_of(other, column)) for one, other in pairs]
    known = [one - other for one, other in values if one is not None and other is not None]
    return mean_cell(known, f"+{column.format}") if len(known) == len(pairs) else ""


def _with_kept(table: Table, results: Mapping[str, Any]) -> Table:
    """A table with a column, after what is said, of the seeds at which each method kept enough on the test split."""
    kept = {
        (trial["plan"]["method"], trial["plan"]["seed"]): trial["result"]["objectives"]["retain"]
        for trial in results["report"]
        if trial["result"] is not None
    }
    cells = []
    for method in _by_method(results):
        seeds = [seed for of_method, seed in kept if of_method == method and (TARGET, seed) in kept]
        enough = [seed for seed in seeds if kept[method, seed] >= results["kept"] * kept[TARGET, seed]]
        cells.append(f"{len(enough)} of {len(seeds)}" if seeds else "")
    place = table.head.index(SAID.heading) + 1 if SAID.heading in table.head else 1
    head = [*table.head[:place], f"keeps {_kept(results)} (seeds)", *table.head[place:]]
    rows = [[*row[:place], cell, *row[place:]] for row, cell in zip(table.rows, cells, strict=True)]
    return Table(table.title, table.note, head, rows)


def _kept(results: Mapping[str, Any]) -> str:
    return f"{100 * results['kept']:g} %"


def _columns(every: Sequence[Result], path: tuple[str, ...], first: Column | None = None) -> list[Column]:
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


def _note(results: Mapping[str, Any]) -> str:
    seeds = results["seeds"]
    half_width = "± half the width of their 95 % t interval, where they differ"
    spread = f"Means over {seeds} seeds {half_width}" if seeds > 1 else "One seed"
    parts = [
        f"{spread}, on the test split of the task {results['task']}. The guard is off unless a heading says otherwise.",
        "Extraction strengths are means over all rows of the sets that settings are chosen by: to forget, in the wording that "
        "is trained on and in others; to retain, those that unlearning sees and those that it never sees. "
        f"“Keeps {_kept(results)}” counts the seeds at which a method keeps that much of the latter of the model before "
        "unlearning.",
        "The guard is this project's, calibrated for every model alike for at most "
        f"{100 * results['tolerance']:.3g} % false refusals; only {OURS} trains the energies that it looks at.",
        results["note"],
    ]
    parts += [
        _beside_retain_only(results, "What is below its figures is forgotten more than if it had never been known.").strip()
    ]
    if any(chosen is not None and not chosen["reached"] for chosen in results["chosen"].values()):
        parts.append(
            f"{NOT_KEPT}: no trial of the method kept that much when settings were chosen, so compare what it forgot with care."
        )
    if any(trial["result"] is None for trial in results["report"]):
        parts.append("Where trials failed, the mean is over the other seeds.")
    if len(results["versions_of_trials"]) > 1:
        parts.append(f"Trials ran with different versions: {_versions(results['versions_of_trials'])}.")
    if not results["complete"]:
        parts.append("The benchmark is not complete: run the same command again.")
    return " ".join(filter(None, parts))


def _beside_retain_only(results: Mapping[str, Any], text: str) -> str:
    """A sentence about the retain-only model, where there is one."""
    has_one = any(trial["plan"]["method"] == RETAIN_ONLY for trial in (*results["tuning"], *results["report"]))
    return f" Compare with the model “{RETAIN_ONLY}”, which was never trained on the rows to forget. {text}" if has_one else ""


def _versions(found: Sequence[Mapping[str, str]]) -> str:
    """The versions that differ among trials.

    >>> _versions([{"torch": "2.9", "eua": "1"}, {"torch": "2.10", "eua": "1"}])
    'torch 2.9 and 2.10'
    """
    names = dict.fromkeys(name for of_trial in found for name in of_trial)
    values = {name: dict.fromkeys(str(of_trial.get(name, "none")) for of_trial in found) for name in names}
    return "; ".join(f"{name} {' and '.join(of_name)}" for name, of_name in values.items() if len(of_name) > 1)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} = {value:g}" if isinstance(value, float) else f"{name} = {value}" for name, value in settings.items()
    )


def _failed(results: Mapping[str, Any]) -> Table:
    """Every trial that ended with an error."""
    rows = [
        [trial["plan"]["method"], phase, str(trial["plan"]["seed"]), trial["error"] or "", _settings(trial["plan"]["settings"])]
        for phase in ("tuning", "report")
        for trial in results[phase]
        if trial["result"] is None
    ]
    note = "They have no figures: they count neither for the choice of settings nor in any mean."
    return Table("Failed trials", note, [METHOD, "phase", "seed", "error", "settings"], rows)


def _tuning(results: Mapping[str, Any]) -> Table:
    """How the settings of every method were chosen."""
    rows = []
    if points_of(results, RETAIN_ONLY) and (area := area_of(results, RETAIN_ONLY)) is not None:
        rows.append([RETAIN_ONLY, f"{area:.3f}", "", "", ""])
    for method in results["methods"]:
        trials = [trial for trial in results["tuning"] if trial["plan"]["method"] == method]
        failed = [trial for trial in trials if trial["result"] is None]
        area, chosen = area_of(results, method), results["chosen"][method]
        rows.append(
            [
                method,
                "" if area is None else f"{area:.3f}",
                f"{len(trials)} of {results['trials']}" + (f", {len(failed)} failed" if failed else ""),
                "" if chosen is None else "yes" if chosen["reached"] else f"never reached {NOT_KEPT}",
                _settings(chosen["settings"]) if chosen else failed[0]["error"] if failed else "not yet chosen",
            ]
        )
    kept = _kept(results)
    note = (
        f"On the validation split, at one seed: chosen is the setting that forgets most among those that keep {kept} of the "
        "model's extraction strength on rows to retain; if none does, the one that keeps most. The area is under the front of "
        "both measures, relative to the model before unlearning: 1 where nothing is left of the rows to forget and everything "
        "of those to retain, which is more than a model forgets that never knew the rows; 0 if nothing changes. It is of one "
        "seed, so it has no interval."
    )
    return Table("Tuning", note, [METHOD, "area under the front", "trials", f"keeps {kept}", "chosen settings"], rows)
