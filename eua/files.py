"""Atomic writing of files and model folders: a file is written under a temporary name next to its path, then renamed."""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eua.errors import EUAError, in_one_line

logger = logging.getLogger(__name__)

ENTRY_FILES = ("config.json", "adapter_config.json")
_SECONDS_OF_A_WRITE = 3600.0
_locked_by: dict[tuple[int, int], int] = {}  # folder (device and inode) → the thread of this process that has locked it
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
    temporary = _temporary(path)
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what fails in the block, which writes ``path``, into an :class:`EUAError`: no space, no permission, a bad name."""
    try:
        yield
    except Exception as error:
        if isinstance(error, EUAError) or not _is_of_disk(error):
            raise
        raise EUAError(
            f"{path} cannot be written ({in_one_line(error)}): free some space, or name a place where you may write. What was "
            "there before is unchanged."
        ) from error


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of ``path``. A process that is writing now has changed its file of late."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError):  # another process has removed it
            if leftover.stat().st_mtime < time.time() - _SECONDS_OF_A_WRITE:
                leftover.unlink()


def _is_of_disk(error: Exception) -> bool:
    """Whether an error is of the system, or what safetensors and torch.save make of one."""
    return (
        isinstance(error, OSError)
        or (type(error).__name__ == "SafetensorError" and "os error" in str(error))
        or (isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error))
    )


def _flush(path: Path) -> None:
    """Let a file, or the names in a folder, reach the disk, where a loss of power cannot take them back."""
    if path.is_dir():
        with suppress(OSError):  # on Windows and on some drives, which cannot flush folders; the names are there already
            _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDWR)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    with locked(folder), writing(folder):
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        staging.mkdir()
        try:
            write(staging)
            flush_folder(staging)
            earlier = [path for pattern in MODEL_FILES for path in folder.glob(pattern)]
            for path in sorted(earlier, key=lambda path: path.name not in ENTRY_FILES):
                path.unlink(missing_ok=True)
            for path in sorted(staging.iterdir(), key=lambda path: path.name in ENTRY_FILES):
                os.replace(path, folder / path.name)
            _flush(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing into ``folder`` while the block runs. The folder is created if it does not exist.

    The lock is on the folder itself, so no file is left over, and the system takes it back from a process that is killed.
    Inside the block, the same thread may lock the folder again. Where folders cannot be locked (Windows, some network drives),
    a warning is logged.

    Args:
        folder: the folder to lock.
        wait: whether to wait until no other process has locked it.

    Raises:
        EUAError: if another thread of this process has locked the folder or, unless it is to wait, another process.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        status = folder.stat()
    key, thread = (status.st_dev, status.st_ino), threading.get_ident()
    if _locked_by.get(key) == thread:
        yield
        return
    handle = _lock(folder, wait)
    try:
        if _locked_by.setdefault(key, thread) != thread:
            raise _in_use(folder)
        try:
            yield
        finally:
            del _locked_by[key]
    finally:
        if handle is not None:
            _unlock(handle)


def _unlock(handle: int) -> None:
    import fcntl

    fcntl.flock(handle, fcntl.LOCK_UN)  # a process that was forked meanwhile has the handle, too, so closing is not enough
    os.close(handle)


def _lock(folder: Path, wait: bool) -> int | None:
    """An open handle that holds the lock; None where folders cannot be locked."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError) as error:
        logger.warning("%s cannot be locked (%s): let no other process write into it.", folder, in_one_line(error))
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        os.close(handle)
        raise _in_use(folder) from error
    except OSError as error:
        os.close(handle)
        logger.warning("%s cannot be locked (%s): let no other process write into it.", folder, in_one_line(error))
        return None
    return handle


def _in_use(folder: Path) -> EUAError:
    return EUAError(
        f"Another process is writing into {folder}, and the two would mix their files: wait for it to end, or name another "
        "folder."
    )


def flush_folder(folder: Path) -> None:
    """Let all files in a folder reach the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _flush(path)
    _flush(folder)


def check_output_folder(folder: Path, *, allowed: bool, how: str) -> None:
    """Raise :class:`EUAError` if ``folder`` cannot be written into, or holds files and is not ``allowed`` to.

    ``how`` names the option that allows it.
    """
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise EUAError(f"The output {folder} is a file, but the output must be a folder: name another path.")
        if not allowed and any(not path.is_dir() for path in folder.rglob("*")):
            raise EUAError(
                f"The output folder {folder} is not empty, and its files could be lost: name another, or pass {how}."
            )
        _try_to_write(folder / "output")


def check_output_file(path: Path, *, allowed: bool, how: str, inputs: Iterable[str | None] = ()) -> None:
    """Raise :class:`EUAError` if ``path`` cannot be written, or exists and is not ``allowed`` to; ``how`` names the option.

    It cannot be one of the ``inputs`` either.
    """
    with writing(path):
        if path.is_dir():
            raise EUAError(f"The output {path} is a folder, but the output must be a file: name a file in it.")
        if path.exists():
            if not allowed:
                raise EUAError(f"The output {path} already exists and would be lost: name another, or pass {how}.")
            if any(name is not None and os.path.exists(name) and path.samefile(name) for name in inputs):
                raise EUAError(f"The output {path} is a file that this command reads, and would be lost: name another.")
        _try_to_write(path)


def free_bytes(folder: Path) -> int:
    """Free space on the disk on which ``folder`` is or would be."""
    return shutil.disk_usage(_nearest_folder(folder)).free


def _try_to_write(path: Path) -> None:
    """Write a file as :func:`replacing` would, in the nearest folder that exists, and remove it."""
    nearest = _nearest_folder(path.parent)
    if not nearest.is_dir():
        raise EUAError(f"The output {path} cannot be created, since {nearest} is not a folder: name another path.")
    trial = nearest / _temporary(path).name
    try:
        trial.touch()
    finally:
        with suppress(OSError):
            trial.unlink(missing_ok=True)


def _nearest_folder(folder: Path) -> Path:
    """``folder`` or the nearest one above it that exists; it may turn out to be a file."""
    path = folder.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
