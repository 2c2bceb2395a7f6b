"""Runs a benchmark: tunes every method on the validation split, then measures the chosen settings at other seeds on the test
split.

Everything is kept in one output folder: the trials (``bench.db``), what was asked for (``bench.json``), the models of the
chosen settings (``models/``), what was measured of every row (``rows/``), every answer to a question about a fact
(``answers/``), and the results as JSON, tables and a page. The same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from eua.bench.grids import GRIDS, check_methods, methods_on
from eua.bench.results import TUNING_SEED, Bench, results_of
from eua.bench.workers import HEAD, both_phases, default_workers, gpus, start_workers

_WRITE = 30.0  # seconds between two writings of the results so far, at least


def run_bench(
    bench: Bench,
    *,
    workers: int | None = None,
    limit: float | None = None,
    checked: Callable[[], None] | None = None,
    so_far: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run what is missing of both phases, and return the results as :func:`eua.bench.results.results_of` does.

    Args:
        bench: what to compare.
        workers: processes on this machine; by default one per GPU, or one per CPU core.
        limit: seconds after which no new trial begins.
        checked: is called before the first trial, once it is certain that the folder holds no other benchmark.
        so_far: is called with the results so far, as this function returns them, every half minute or after every trial.

    Raises:
        EUAError: for a method that is unknown or cannot train on the task's rows, more trials than a grid has, a folder or
            storage that holds another benchmark, or if worker processes ended early.
    """
    deadline = None if limit is None else time.time() + limit
    if bench.methods is not None:
        check_methods(bench.methods)  # before models are trained for the task
    task = bench.make_task(TUNING_SEED)
    plans = bench.tuning_plans(task)
    bench.output.mkdir(parents=True, exist_ok=True)
    queue = bench.queue("tuning")
    queue.belongs_to(task.digest, bench.name)
    if checked is not None:
        checked()
    queue.add(plans)
    left_out = [method for method in GRIDS if method not in methods_on(task, bench.methods)] if bench.methods is None else []
    if left_out:
        print(f"Left out: {', '.join(left_out)}, since the rows to forget of {bench.name} have no other answers to train on.")
    workers = workers or default_workers()
    print(f"Tuning: {len(plans)} trials on the validation split of {bench.name}, {workers} at a time.\n{HEAD}", flush=True)
    last = time.monotonic()

    def write() -> None:
        nonlocal last
        if so_far is not None and time.monotonic() - last > _WRITE:
            so_far(results_of(bench, task))
            last = time.monotonic()

    if workers == 1 and len(gpus()) <= 1:
        both_phases(bench, task, deadline, after_trial=write)
    else:
        start_workers(bench, deadline, workers, meanwhile=write)
    return results_of(bench, task)
