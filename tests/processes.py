"""Processes that run a function together, with real collectives between them.

They start once and serve all tests of a module. A test sends them a function, which every rank of a group runs at the same
time; a failure on any rank fails the test. Ranks that hang are killed.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

SECONDS = 20  # the timeout of a collective
WORLD = 3
GROUPS = {3: [0, 1, 2], 2: [1, 2]}  # the group of two begins at rank 1, so that its ranks are not the world's


class Ranks:
    """Processes that run a function together. They start when first needed, and again after a failure."""

    def __init__(self, folder: Path, prepare: Callable[[], None] | None = None) -> None:
        self.folder, self.prepare, self.starts, self.workers = folder, prepare, 0, []

    def run(self, ranks: int, check: Callable, *arguments: object) -> None:
        """Run ``check(group, *arguments)`` on every rank of the group of ``ranks`` ranks."""
        if not self.workers:
            self._start()
        chosen = [self.workers[rank] for rank in GROUPS[ranks]]
        for _, pipe in chosen:
            pipe.send((ranks, check, arguments))
        deadline, failures = time.monotonic() + 2 * SECONDS, []
        for rank, (_, pipe) in enumerate(chosen):
            try:
                failure = pipe.recv() if pipe.poll(max(0.0, deadline - time.monotonic())) else "it hangs"
            except EOFError:
                failure = "it died"
            if failure:
                failures.append(f"rank {rank} of {ranks}: {failure}")
        if failures:
            self.stop()
            pytest.fail("\n".join(failures), pytrace=False)

    def _start(self) -> None:
        self.starts += 1
        context = get_context("spawn")
        for rank in range(WORLD):
            pipe, theirs = context.Pipe()
            arguments = (rank, f"file://{self.folder}/start-{self.starts}", theirs, self.prepare)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.workers.append((process, pipe))

    def stop(self) -> None:
        for process, _ in self.workers:
            process.kill()
        for process, _ in self.workers:
            process.join(SECONDS)
        self.workers = []


def _serve(rank: int, meeting_point: str, pipe, prepare: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=WORLD, timeout=timeout)
    groups = {size: dist.new_group(ranks, timeout=timeout) for size, ranks in GROUPS.items()}
    if prepare is not None:
        prepare()
    while True:
        size, check, arguments = pipe.recv()
        try:
            check(groups[size], *arguments)
            pipe.send(None)
        except (Exception, pytest.fail.Exception):
            pipe.send(traceback.format_exc(limit=-6))
