"""What a trial costs, and what it ran on: seconds, peak memory, versions."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass
class Cost:
    """``seconds`` of a block, and the largest number of bytes that were in use during it; None where that cannot be measured.

    On a GPU the bytes are those that PyTorch allocated there. On a CPU they are the memory of the whole process, of which what
    earlier blocks left unused is given back first.
    """

    seconds: float | None = None
    peak_bytes: int | None = None


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure a block; the result is there when the block has ended."""
    cost = Cost()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        _give_back()
        can_reset = _reset_peak()
    start = time.perf_counter()
    yield cost
    if gpu:
        torch.cuda.synchronize()
    cost.seconds = time.perf_counter() - start
    cost.peak_bytes = torch.cuda.max_memory_allocated() if gpu else _peak() if can_reset else None


def _give_back() -> None:
    """Return freed memory to the system, which glibc keeps: otherwise a peak would be that of the hungriest block so far."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # where there is another C library
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Let Linux forget the largest amount of memory that the process had so far; whether it did."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _peak() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


@cache
def versions() -> dict[str, str]:
    """The versions of what a result depends on, and a digest of this library's own code."""
    digest = hashlib.sha256()
    for package in ("eua", "fused_energy"):
        root = resources.files(package)
        with resources.as_file(root) as folder:
            for path in sorted(folder.rglob("*.py")):
                digest.update(f"{package}/{path.relative_to(folder).as_posix()}".encode() + path.read_bytes())
    return {
        "eua": version("eua"),
        "code": digest.hexdigest()[:12],
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }
