"""Tables of numbers, printed for people and written as JSON to ``benches/results/`` for programs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "triton", "cut-cross-entropy", "liger-kernel")
Cell = float | str  # a number, or the reason why there is none


class Report:
    """Tables by title, each with rows and columns, and the context needed to judge them."""

    def __init__(self, name: str, command: str, device: str, folder: Path = RESULTS) -> None:
        self.path = folder / f"{name}.json"
        self.about = {
            "command": command,
            "machine": _machine(device),
            "versions": {"python": platform.python_version()} | {x: v for x in LIBRARIES if (v := _version(x))},
            "commit": _commit(),
        }
        self.tables: dict[str, dict[str, dict[str, Cell]]] = {}
        self.notes: list[str] = []

    def add(self, title: str, row: str, column: str, value: Cell) -> None:
        cell = float(f"{value:.4g}") if isinstance(value, float) else value
        self.tables.setdefault(title, {}).setdefault(row, {})[column] = cell

    def write(self) -> None:
        """Write under a temporary name first, so that a killed run leaves the last complete file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.about | {"notes": self.notes, "tables": self.tables}
        part = self.path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        part.rename(self.path)

    def __str__(self) -> str:
        return "\n\n".join([*(table(title, rows) for title, rows in self.tables.items()), *self.notes])


def table(title: str, rows: dict[str, dict[str, Cell]]) -> str:
    """Aligned columns under the title. A row that did not run has its reason once, after its name."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = max(len(name) for name in rows) + 2
    lines = [title, " " * width + "  ".join(columns)]
    for name, row in rows.items():
        cells = [row.get(column, "") for column in columns]
        if isinstance(cells[0], str) and len(set(cells)) == 1:
            lines.append(f"{name:{width}}{cells[0]}")
        else:
            lines.append(f"{name:{width}}" + "  ".join(f"{x:>{len(c)}}" for x, c in zip(cells, columns, strict=True)))
    return "\n".join(lines)


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit, with a mark if the measured code differs from it; "unknown" without a git history."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parents[1]).stdout.strip()
        except OSError:
            return ""

    changed = git("status", "--porcelain", "--", "eua", "fused_energy", "benches/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (", with changes" if changed else "")
