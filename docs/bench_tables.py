"""Fills the benchmark's tables in the documents, draws its pictures, and writes all tables of every file of results next to it:
``python docs/bench_tables.py``.

No figure in them is typed by hand: they are those of ``benches/results``. A page names a table between two comments: the file
of results, the table's title, and the headings of the columns that follow the method.

    <!-- bench people.json | Cost of unlearning | seconds; peak memory (GiB) -->
    <!-- end -->

A third part, `| npo, eua`, shows the rows of these methods alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eua.bench.notes import NOT_KEPT
from eua.bench.page import render_front
from eua.bench.table import METHOD, Table, markdown, markdown_table, tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benches" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmark.md")
PICTURES = {f"{task}.json": ROOT / "docs" / f"{task}_front.svg" for task in ("people", "tofu")}
_PLACE = re.compile(
    r"(?P<begin><!-- bench (?P<file>\S+) \| (?P<title>.+?) \| (?P<columns>[^|]+?)(?: \| (?P<rows>[^|]+?))? -->\n)"
    r".*?(?P<end><!-- end -->)",
    re.DOTALL,
)


def filled(text: str) -> str:
    """A page with all its tables as the results are now.

    Raises:
        ValueError: if there is no such table or column.
    """
    return _PLACE.sub(_fill, text)


def results_in(file: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    results: dict[str, Any] = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return results


def written() -> dict[Path, str]:
    """File → content, of all that this script writes."""
    pages = {page: filled(page.read_text(encoding="utf-8")) for page in PAGES}
    pictures = {picture: render_front(results_in(file)) for file, picture in PICTURES.items()}
    files = sorted(path for path in RESULTS.glob("*.json") if "tuning" in results_in(path.name))
    return pages | pictures | {path.with_suffix(".md"): _all_tables(path.name) for path in files}


def _all_tables(file: str) -> str:
    made = markdown(tables(results_in(file)))
    return f"# All tables of {file}\n\nWritten by `docs/bench_tables.py`; `docs/benchmark.md` names the command.\n\n{made}"


def _fill(place: re.Match[str]) -> str:
    made = {table.title: table for table in tables(results_in(place["file"]))}
    if place["title"] not in made:
        raise ValueError(f"{place['file']} has no table {place['title']!r}, but {', '.join(made)}.")
    columns = [METHOD, *(name.strip() for name in place["columns"].split(";"))]
    table = _some_columns(made[place["title"]], columns)
    if place["rows"] is not None:
        table = _some_rows(table, [name.strip() for name in place["rows"].split(",")])
    return f"{place['begin']}\n{markdown_table(table)}\n{place['end']}"


def _some_columns(table: Table, columns: Sequence[str]) -> Table:
    missing = [name for name in columns if name not in table.head]
    if missing:
        raise ValueError(f"The table {table.title!r} has no column {', '.join(missing)}, but {'; '.join(table.head)}.")
    places = [table.head.index(name) for name in columns]
    return Table(table.title, table.note, list(columns), [[row[place] for place in places] for row in table.rows])


def _some_rows(table: Table, methods: Sequence[str]) -> Table:
    rows = {row[0].split(f" {NOT_KEPT}")[0]: row for row in table.rows}
    missing = [name for name in methods if name not in rows]
    if missing:
        raise ValueError(f"The table {table.title!r} has no row {', '.join(missing)}, but {', '.join(rows)}.")
    return Table(table.title, table.note, table.head, [rows[name] for name in methods])


if __name__ == "__main__":
    for path, content in written().items():
        path.write_text(content, encoding="utf-8")
