"""Fills the benchmark's tables in the documents from ``benches/results``: ``python docs/bench_tables.py``.

No figure in them is typed by hand. A page names a table between two comments: the file of results, the table's title, and the
headings of the columns that follow the method.

    <!-- bench people.json | Cost of unlearning | seconds; peak memory (GiB) -->
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from eua.bench.table import METHOD, Table, markdown_table, tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benches" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmark.md")
_PLACE = re.compile(
    r"(?P<begin><!-- bench (?P<file>\S+) \| (?P<title>.+?) \| (?P<columns>.+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def filled(text: str) -> str:
    """A page with all its tables as the results are now.

    Raises:
        ValueError: if there is no such table or column.
    """
    return _PLACE.sub(_fill, text)


def _fill(place: re.Match[str]) -> str:
    results = json.loads((RESULTS / place["file"]).read_text(encoding="utf-8"))
    made = {table.title: table for table in tables(results)}
    if place["title"] not in made:
        raise ValueError(f"{place['file']} has no table {place['title']!r}, but {', '.join(made)}.")
    columns = [METHOD, *(name.strip() for name in place["columns"].split(";"))]
    return f"{place['begin']}\n{markdown_table(_some_columns(made[place['title']], columns))}\n{place['end']}"


def _some_columns(table: Table, columns: Sequence[str]) -> Table:
    missing = [name for name in columns if name not in table.head]
    if missing:
        raise ValueError(f"The table {table.title!r} has no column {', '.join(missing)}, but {'; '.join(table.head)}.")
    places = [table.head.index(name) for name in columns]
    return Table(table.title, table.note, list(columns), [[row[place] for place in places] for row in table.rows])


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
