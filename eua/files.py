"""Files appear whole or not at all: written under a temporary name beside their place, then renamed."""

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
)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place when the block ends without an error."""
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
    """Have ``write`` fill a staging folder with a model, then let it take the place of the model in ``folder``, if any.

    The files without which no loader takes the folder go first and come last, so what loads is never a mixture; and nothing
    of an earlier model stays behind (an adapter, a guard) that would be loaded with the new one.
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
    """Raise :class:`EUAError` when ``folder`` holds files and the caller has not been told that it may."""
    if folder.exists() and not folder.is_dir():
        raise EUAError(f"The output {folder} is a file, but a folder is written: name another path.")
    if not allowed and folder.is_dir() and any(folder.iterdir()):
        raise EUAError(f"The output folder {folder} is not empty, and its files could be lost: name another, or pass {how}.")


def check_output_file(path: Path, *, allowed: bool, how: str) -> None:
    """Raise :class:`EUAError` when ``path`` is a folder, or a file and the caller has not been told that it may go."""
    if path.is_dir():
        raise EUAError(f"The output {path} is a folder, but a file is written: name a file in it.")
    if path.exists() and not allowed:
        raise EUAError(f"The output {path} is there already and would be lost: name another, or pass {how}.")
