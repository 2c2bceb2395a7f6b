"""Writes the results of a benchmark as one HTML page: the forget–retain front of every method, and all tables.

The page has no script and loads nothing from elsewhere. All texts are escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from eua.bench.choice import Point, area_of, front, points_of
from eua.bench.grids import CANDIDATES, GRIDS
from eua.bench.notes import NOT_KEPT
from eua.bench.table import Table, tables
from eua.bench.trial import RETAIN_ONLY, TARGET
from eua.files import replacing

WIDTH, HEIGHT, MARGIN = 760, 460, 56
LEGEND, LINE = 180, 24  # width of the legend in a picture's own file, and height of its lines
_TICKS = 5
_ALT = "Forget–retain front"
_STYLE = (  # as on the page, in its light colours
    "text{fill:#1c2128;font:13px system-ui,sans-serif}.soft{fill:#59636e}.grid{stroke:#d5dae0}.front{fill:none;stroke-width:2}"
    ".model{fill:none;stroke:#1c2128;stroke-width:2}.chosen{stroke:#1c2128;stroke-width:2}"
)


def write_page(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results of :func:`eua.bench.results.results_of` as one HTML file, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(render_page(results), encoding="utf-8", newline="\n")


def render_page(results: Mapping[str, Any]) -> str:
    """The page as text."""
    page = resources.files("eua.bench").joinpath("page.html").read_text(encoding="utf-8")
    style = page.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    about = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    sections = [_front_section(results), *map(_table_section, tables(results))]
    texts = {
        "{style-digest}": f"'sha256-{digest}'",
        "{title}": escape(f"Unlearning methods on {results['task']}"),
        "{about}": escape(f"{about}; task {results['digest'][:12]}; {results['trials']} trials per method."),
        "{sections}": "\n".join(sections),
    }
    for place, text in texts.items():
        page = page.replace(place, text)
    return page


def render_front(results: Mapping[str, Any]) -> str:
    """The picture of the page alone, with its legend: an SVG file for documents."""
    drawn, entries = _front(results)
    legend = "".join(
        f'<circle cx="{WIDTH + 6}" cy="{MARGIN + LINE * place}" r="5" fill="{colour}"/>'
        f'<text x="{WIDTH + 18}" y="{MARGIN + LINE * place + 4}">{name}</text>'
        for place, (name, colour) in enumerate(entries)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + LEGEND} {HEIGHT}" role="img" aria-label="{_ALT}">'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>{drawn}{legend}</svg>\n'
    )


def _front(results: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The picture's contents, and of each method what the legend says, with its colour."""
    known = [*GRIDS, *CANDIDATES]
    colours = {
        method: f"hsl({360 * place / len(GRIDS):.0f} 65% {50 if method in GRIDS else 30}%)"
        for place, method in enumerate(known)
    }
    drawn, legend = [_axes()], list[tuple[str, str]]()
    for method in results["methods"]:
        points, colour = points_of(results, method), colours[method]
        if not points:
            continue
        chosen = results["chosen"][method]
        drawn.append(f'<path class="front" stroke="{colour}" d="{_staircase(front(points))}"/>')
        for trial in results["tuning"]:
            if trial["plan"]["method"] == method and trial["result"] is not None:
                is_chosen = chosen is not None and trial["number"] == chosen["trial"]
                x, y = _place(Point(**trial["result"]["objectives"]))
                label = escape(
                    f"{method}: forget {trial['result']['objectives']['forget']:.3f}, retain "
                    f"{trial['result']['objectives']['retain']:.3f} {trial['plan']['settings']}"
                )
                kind = ' class="chosen"' if is_chosen else ""
                drawn.append(f'<circle{kind} cx="{x}" cy="{y}" r="5" fill="{colour}"><title>{label}</title></circle>')
        area = area_of(results, method)
        name = f"{method} {NOT_KEPT}" if chosen is not None and not chosen["reached"] else method
        legend.append((escape(name) + ("" if area is None else f", area {area:.3f}"), colour))
    for name in (TARGET, RETAIN_ONLY):
        for point in points_of(results, name):
            x, y = _place(point)
            drawn.append(f'<circle class="model" cx="{x}" cy="{y}" r="7"><title>{escape(name)}</title></circle>')
            drawn.append(f'<text x="{x}" y="{y - 12:.1f}" text-anchor="middle">{escape(name)}</text>')
    return "".join(drawn), legend


def _front_section(results: Mapping[str, Any]) -> str:
    drawn, entries = _front(results)
    mark = '<svg viewBox="0 0 12 12"><circle cx="6" cy="6" r="5" fill="{}"/></svg>'
    legend = "".join(f"<li>{mark.format(colour)} {name}</li>" for name, colour in entries)
    return (
        "<section><h2>What every trial forgot and kept</h2>"
        f'<p class="soft">{escape(results["objective"].capitalize())} on the validation split, guard off; the best corner is '
        "at the top left. A line joins the trials of a method that none of its others beats in both, with the area under it, "
        "relative to the model before unlearning (1: nothing is left of what is to be forgotten and everything of the rest; "
        "0: nothing changes; of one seed, so without an interval). Chosen trials have an outline.</p>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_ALT}">{drawn}</svg>'
        f'<ul class="legend">{legend}</ul></section>'
    )


def _place(point: Point) -> tuple[float, float]:
    """Where a point is on the picture, in its units."""
    x = MARGIN + point.forget * (WIDTH - 2 * MARGIN)
    y = HEIGHT - MARGIN - point.retain * (HEIGHT - 2 * MARGIN)
    return round(x, 1), round(y, 1)


def _staircase(points: Sequence[Point]) -> str:
    """The outline of the region that the points dominate: from the bottom, over each point, to the right edge."""
    parts = []
    height = 0.0
    for point in points:
        parts += [Point(point.forget, height), point]
        height = point.retain
    parts.append(Point(1.0, height))
    return "M" + " L".join(f"{x} {y}" for x, y in map(_place, parts))


def _axes() -> str:
    lines = []
    for tick in range(_TICKS + 1):
        value = tick / _TICKS
        (left, y), (right, _) = _place(Point(0, value)), _place(Point(1, value))
        (x, bottom), (_, top) = _place(Point(value, 0)), _place(Point(value, 1))
        lines.append(f'<line class="grid" x1="{left}" y1="{y}" x2="{right}" y2="{y}"/>')
        lines.append(f'<line class="grid" x1="{x}" y1="{bottom}" x2="{x}" y2="{top}"/>')
        lines.append(f'<text class="soft" x="{left - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
        lines.append(f'<text class="soft" x="{x}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    middle = WIDTH / 2
    lines.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">rows to forget (lower is better)</text>')
    lines.append(
        f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2})">rows to retain</text>'
    )
    return "".join(lines)


def _table_section(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "".join(
        f"<tr><th>{escape(first)}</th>" + "".join(_cell(cell) for cell in cells) + "</tr>" for first, *cells in table.rows
    )
    return (
        f'<section><h2>{escape(table.title)}</h2><p class="soft">{escape(table.note)}</p><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _cell(text: str) -> str:
    kind = ' class="words"' if len(text) > 30 else ""
    return f"<td{kind}>{escape(text)}</td>"
