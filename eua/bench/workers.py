"""The processes that work on a benchmark's trials: one on every GPU, or several on the cores of a machine."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from multiprocessing import get_context, parent_process

import torch

from eua.bench.cost import versions
from eua.bench.grids import methods_on, settings_in_words
from eua.bench.results import TUNING_SEED, Bench, choices_of, results_of
from eua.bench.study import Plan
from eua.bench.task import Task
from eua.bench.trial import Phase, run_trial
from eua.errors import EUAError, in_one_line

# A line of the progress table: extraction strengths are those of the split.
_LINE = "  {:>7}  {:<18} {:>4} {:>8}  {:>7} {:>7}  {}"
HEAD = _LINE.format("trial", "method", "seed", "seconds", "forget", "retain", "settings")
_POLL = 0.5  # seconds between two looks at trials that other processes are working on


def _nothing() -> None:
    pass


def both_phases(
    bench: Bench,
    task: Task,
    deadline: float | None,
    *,
    is_first: bool = True,
    after_trial: Callable[[], None] = _nothing,
) -> None:
    """Work on the trials of the tuning and then of the report, together with all other processes that do so."""
    plans = bench.tuning_plans(task)
    work(bench, "tuning", plans, deadline, after_trial)
    tuned = bench.queue("tuning").done(plans)
    if len(tuned) == len(plans):
        report = bench.report_plans(task, choices_of(methods_on(task, bench.methods), tuned))
        if is_first:
            print(
                f"Report: {len(report)} trials on the test split, with the chosen settings at {bench.seeds} seeds.", flush=True
            )
        work(bench, "report", report, deadline, after_trial)


def default_workers() -> int:
    """One per GPU, or one per CPU core."""
    return len(gpus()) or os.cpu_count() or 1


def gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(place) for place in range(torch.cuda.device_count())] if named is None else [x for x in named.split(",") if x]


def start_workers(bench: Bench, deadline: float | None, workers: int, meanwhile: Callable[[], None]) -> None:
    """Run both phases in worker processes, and call ``meanwhile`` again and again.

    Raises:
        EUAError: if some of them ended before their time, and trials are left.
    """
    context = get_context("spawn")
    processes = [
        context.Process(target=_worker, args=(bench, deadline, place, workers), daemon=True) for place in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        while process.is_alive():
            process.join(_POLL)
            meanwhile()
    codes = [process.exitcode for process in processes]
    if any(codes) and not results_of(bench, bench.make_task(TUNING_SEED))["complete"]:
        raise EUAError(
            f"Trials are left, but worker processes ended early (exit codes {', '.join(map(str, codes))}; -9 is often a lack "
            "of memory): run the same command again, with fewer --workers if memory is short."
        )


def _worker(bench: Bench, deadline: float | None, place: int, workers: int) -> None:
    """The main function of a worker process, which has its share of the cores, or one of the GPUs."""
    _end_with_parent()
    if seen := gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[place % len(seen)]  # Trainer would spread one model over all that it sees
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    try:
        both_phases(bench, bench.make_task(TUNING_SEED), deadline, is_first=place == 0)
    except KeyboardInterrupt:
        raise SystemExit(1) from None
    except EUAError as error:
        print(f"Worker {place} ended: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, even if that was killed and could not end it."""
    parent = parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def work(
    bench: Bench,
    phase: Phase,
    plans: Sequence[Plan],
    deadline: float | None = None,
    after_trial: Callable[[], None] = _nothing,
) -> None:
    """Take trials, one after the other, and run them until all have ended, here or elsewhere, or until the deadline."""
    versions()  # of the code as it is now, should its files change while trials run
    queue = bench.queue(phase)
    task = lru_cache(maxsize=1)(bench.make_task)
    while len(ended := queue.done(plans)) < len(plans):
        if deadline is not None and time.time() >= deadline:
            return
        queue.add(plans)  # those whose process died
        taken = queue.take(plans)
        if taken is None:
            time.sleep(_POLL)
            continue
        trial, plan = taken
        started = time.monotonic()
        figures: tuple[str, ...]
        with queue.alive(trial):
            try:
                result = run_trial(task(plan.seed), plan, phase, bench.output, keep_model=bench.keep_models)
            except Exception as error:  # whatever a method does; the others go on
                queue.fail(trial, error)
                figures = ("failed", "", in_one_line(error))
            else:
                queue.finish(trial, result | {"seconds_in_all": time.monotonic() - started})
                figures = (
                    *(f"{result['objectives'][name]:.3f}" for name in ("forget", "retain")),
                    settings_in_words(plan.settings),
                )
        of_trial = (f"{len(ended) + 1}/{len(plans)}", plan.method, plan.seed, f"{time.monotonic() - started:.0f}")
        print(_LINE.format(*of_trial, *figures), flush=True)
        after_trial()
