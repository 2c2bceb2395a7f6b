"""Atomic writing of files and model folders: a file is written under a temporary name next to its path, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eua.errors import EUAError

ENTRY_FILES = ("config.json", "adapter_config.json")
MODEL_FILES = (
    *ENTRY_FILES,
    "model*.safetensors*",
    "adapter_model*.safetensors*",
    "generation_config.json",
    "energy_guard.json",
    "forgotten_prompts.json",
)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; rename it to ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def fill_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a staging folder with a model, then replace the model in ``folder``, if any, by it.

    The files that every loader needs are removed first and added last, so a folder that loads never holds a mixture of models.
    No file of an earlier model (an adapter, a guard) remains that would be loaded with the new one.
    """
    staging = folder / ".partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        write(staging)
        earlier = [path for pattern in MODEL_FILES for path in folder.glob(pattern)]
        for path in sorted(earlier, key=lambda path: path.name not in ENTRY_FILES):
            path.unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name in ENTRY_FILES):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_output_folder(folder: Path, *, allowed: bool, how: str) -> None:
    """Raise :class:`EUAError` if ``folder`` is a file, or holds files and is not ``allowed`` to; ``how`` names the option."""
    if folder.exists() and not folder.is_dir():
        raise EUAError(f"The output {folder} is a file, but the output must be a folder: name another path.")
    _check_parents(folder)
    if not allowed and folder.is_dir() and any(folder.iterdir()):
        raise EUAError(f"The output folder {folder} is not empty, and its files could be lost: name another, or pass {how}.")


def check_output_file(path: Path, *, allowed: bool, how: str) -> None:
    """Raise :class:`EUAError` if ``path`` is a folder, or exists and is not ``allowed`` to; ``how`` names the option."""
    if path.is_dir():
        raise EUAError(f"The output {path} is a folder, but the output must be a file: name a file in it.")
    if path.exists() and not allowed:
        raise EUAError(f"The output {path} already exists and would be lost: name another, or pass {how}.")
    _check_parents(path)


def _check_parents(path: Path) -> None:
    """Raise :class:`EUAError` if ``path`` could not be created where it is to be."""
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        why = "is not writable" if nearest.is_dir() else "is not a folder"
        raise EUAError(f"The output {path} cannot be created, since {nearest} {why}: name another path.")
