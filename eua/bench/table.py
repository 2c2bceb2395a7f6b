"""Results as tables: a row per method and per model to compare with, means over seeds with 95 % t intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eua.bench import notes
from eua.bench.asking import STATED
from eua.bench.choice import area_of, points_of
from eua.bench.columns import (
    AGGREGATES,
    BY_CHANCE,
    COST,
    OF_SETS,
    PRIVACY,
    RELEARNED,
    SAID,
    SAID_GUARDED,
    Column,
    Result,
    columns_below,
    mean_cell,
    objectives_of,
    value_of,
)
from eua.bench.grids import settings_in_words
from eua.bench.lasting import KEPT
from eua.bench.notes import NOT_KEPT, OURS, beside_retain_only, kept_share
from eua.bench.trial import RETAIN_ONLY, TARGET
from eua.evaluation.retain_model import HOLDOUT

METHOD = "method"
# How the names of figures begin of which more is better; of others of what is left, less is better.
_SHOULD_STAY = (f"said {STATED}", "still said", KEPT)


@dataclass(frozen=True)
class Table:
    """A title, what there is to know about the figures, the headings, and the rows of cells."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables of the results of a benchmark. The first figure of every table of measures is what is said in any wording.

    Args:
        results: what :func:`eua.bench.results.results_of` returned.
    """
    by_method = _by_method(results)
    if not any(by_method.values()):
        return [table for table in (_failed(results), _tuning(results)) if table.rows]
    every = [result for of_seeds in by_method.values() for result in of_seeds]
    sets, separated = (dict.fromkeys(name for one in every for name in one["metrics"][key]) for key in ("sets", "separation"))
    names = {method: _name(method, len(of_seeds), results) for method, of_seeds in by_method.items()}
    lasting = [*columns_below(every, ("metrics", "lasting")), *columns_below(every, ("metrics", "wrapped"))]
    of_staying = [column for column in lasting if column.heading.startswith(_SHOULD_STAY)]

    def table(title: str, note: str, columns: Sequence[Column]) -> Table:
        return _table(title, note, by_method, names, columns)

    made = [
        _with_kept(
            table(
                "What was forgotten and what was kept",
                notes.on_everything(results),
                (SAID, BY_CHANCE, *objectives_of(results), *AGGREGATES),
            ),
            results,
        ),
        _paired_differences(results, names),
        *(
            table(
                f"Rows of the set “{name}”",
                notes.OF_HOLDOUT if name == HOLDOUT else notes.OF_SET,
                (SAID, *(Column(heading, ("metrics", "sets", name, key)) for key, heading in OF_SETS.items())),
            )
            for name in sets
        ),
        table(
            "Facts said in answers to questions", notes.SAID_BY_ASKING, columns_below(every, ("metrics", "said"), first=SAID)
        ),
        table(
            "Prompts that the guard refuses, by form of the question",
            notes.REFUSED,
            (SAID, *columns_below(every, ("metrics", "refused"))),
        ),
        table(
            "The worst of k sampled answers",
            notes.LEAKS + beside_retain_only(results),
            (SAID, *columns_below(every, ("metrics", "leaks"))),
        ),
        table(
            "Membership inference",
            notes.MEMBERSHIP + beside_retain_only(results, notes.MEMBERSHIP_OF_RETAIN_ONLY),
            (SAID, *columns_below(every, ("metrics", "membership")), *PRIVACY),
        ),
        table(
            "Prompt energy",
            notes.ENERGY,
            (
                SAID,
                *(
                    Column(f"{name}{end}", ("metrics", "separation", name, key))
                    for key, end in (("auroc", ""), ("fpr_at_95_tpr", ", FPR at 95 % TPR"))
                    for name in separated
                    if name != HOLDOUT
                ),
            ),
        ),
        table(
            "What is left of the forgotten",
            notes.LASTING + beside_retain_only(results, "Relearning teaches this model, too."),
            (SAID, *(one for one in lasting if one not in of_staying)),
        ),
        table("What should stay", notes.STAYING, (SAID, *of_staying)),
        table("Cost of unlearning", notes.on_cost(results), (SAID, *COST)),
        *(one for one in (_left_out(by_method), _failed(results)) if one.rows),
        _tuning(results),
    ]
    return [one for one in made if set(one.head) - {METHOD, SAID.heading}]


def markdown(made: Sequence[Table]) -> str:
    """Tables with their titles and notes as Markdown."""
    return "\n".join(f"## {table.title}\n\n{table.note}\n\n{markdown_table(table)}" for table in made)


def markdown_table(table: Table) -> str:
    """The cells alone as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    return line(table.head) + "|" + "---|" * len(table.head) + "\n" + "".join(map(line, table.rows))


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


def _paired_differences(results: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    """What every other method has more or less than EUA, seed by seed, so that what both have in common does not count."""
    columns = (SAID, SAID_GUARDED, *objectives_of(results), RELEARNED)
    at = {(trial["plan"]["method"], trial["plan"]["seed"]): trial["result"] for trial in results["report"] if trial["result"]}
    seeds = sorted(seed for method, seed in at if method == OURS)
    rows = []
    for method in results["methods"]:
        pairs = [(at[method, seed], at[OURS, seed]) for seed in seeds if (method, seed) in at]
        if method != OURS and len(pairs) > 1:
            rows.append([names[method], *(_differences(pairs, column) for column in columns)])
    return Table(f"Compared with {OURS}", notes.DIFFERENCES, [METHOD, *(column.heading for column in columns if rows)], rows)


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
    head = [*table.head[:place], f"keeps {kept_share(results)} (seeds)", *table.head[place:]]
    rows = [[*row[:place], cell, *row[place:]] for row, cell in zip(table.rows, cells, strict=True)]
    return Table(table.title, table.note, head, rows)


def _left_out(by_method: Mapping[str, Sequence[Result]]) -> Table:
    """What could not be measured, why, and of which methods."""
    methods: dict[tuple[str, str], dict[str, None]] = {}
    for method, of_seeds in by_method.items():
        for result in of_seeds:
            for what, why in result["metrics"].get("left_out", {}).items():
                methods.setdefault((what, why), {})[method] = None
    measured = [method for method, of_seeds in by_method.items() if of_seeds]
    rows = [
        [what.replace("_", " "), "all" if list(of_what) == measured else ", ".join(of_what), why]
        for (what, why), of_what in methods.items()
    ]
    return Table("What was not measured", notes.LEFT_OUT, ["measure", METHOD, "why"], rows)


def _failed(results: Mapping[str, Any]) -> Table:
    """Every trial that ended with an error."""
    rows = [
        [
            trial["plan"]["method"],
            phase,
            str(trial["plan"]["seed"]),
            trial["error"] or "",
            settings_in_words(trial["plan"]["settings"]),
        ]
        for phase in ("tuning", "report")
        for trial in results[phase]
        if trial["result"] is None
    ]
    return Table("Failed trials", notes.FAILED, [METHOD, "phase", "seed", "error", "settings"], rows)


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
                settings_in_words(chosen["settings"]) if chosen else failed[0]["error"] if failed else "not yet chosen",
            ]
        )
    kept = kept_share(results)
    return Table(
        "Tuning", notes.on_tuning(results), [METHOD, "area under the front", "trials", f"keeps {kept}", "chosen settings"], rows
    )
