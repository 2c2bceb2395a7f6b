"""Runs a benchmark: tunes every method on the validation split, then measures the chosen settings at other seeds on the test
split.

Everything is kept in one output folder: the trials (``bench.db``), what was asked for (``bench.json``), the models of the
chosen settings (``models/``), and the results as JSON, a table and a page. The same command goes on where an interrupted one
stopped.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from eua.bench.choice import KEPT, Choice, choose, point_of
from eua.bench.cost import versions
from eua.bench.grids import GRIDS, check_methods, methods_on, trials_of
from eua.bench.study import GRACE, HEARTBEAT, Done, Plan, TrialQueue, default_storage
from eua.bench.task import MakeTask, Task
from eua.bench.trial import RETAIN_ONLY, TARGET, Phase, run_trial
from eua.errors import EUAError, in_one_line

TUNING_SEED = 0  # results are reported at the seeds after it, so not with the weights that won
# A line of the progress table: extraction strengths are those of the split.
_LINE = "  {:>7}  {:<18} {:>4} {:>8}  {:>7} {:>7}  {}"
_HEAD = _LINE.format("trial", "method", "seed", "seconds", "forget", "retain", "settings")
_POLL = 0.5  # seconds between two looks at trials that other processes are working on
_WRITE = 30.0  # seconds between two writings of the results so far, at least


@dataclass(frozen=True)
class Bench:
    """A benchmark: what is compared on which task, and where it is kept. It can be sent to worker processes.

    Attributes:
        name: of the task.
        make_task: makes the task of a seed; a function of a module, or a ``functools.partial`` of one.
        methods: names of :data:`eua.bench.grids.GRIDS`; None: all that can train on the task's rows.
        trials: settings to try for each method.
        seeds: number of seeds at which the chosen settings are measured, from 1; settings are chosen at seed 0.
        output: folder of everything that is written.
        storage: URL of Optuna's storage; None: a SQLite file in the output folder. Several machines share one of a server.
        keep_models: whether models and guards of the report are kept, a folder for each method and seed.
        heartbeat, grace: whole seconds between signs of life of a trial, and without one until it is handed out again.
    """

    name: str
    make_task: MakeTask
    methods: Sequence[str] | None
    trials: int
    seeds: int
    output: Path
    storage: str | None = None
    keep_models: bool = True
    heartbeat: int = HEARTBEAT
    grace: int = GRACE

    def queue(self, phase: Phase) -> TrialQueue:
        """The study of a phase."""
        url = self.storage or default_storage(self.output)
        return TrialQueue(url, f"{self.name}-{phase}", heartbeat=self.heartbeat, grace=self.grace)

    def tuning_plans(self, task: Task) -> list[Plan]:
        """All trials of the tuning phase: the first of every method, then the second, and so on."""
        drawn = [
            [Plan(method, settings, TUNING_SEED) for settings in trials_of(method, task, self.trials)]
            for method in methods_on(task, self.methods)
        ]
        return [*self._compared(task, [TUNING_SEED]), *(plan for of_round in zip(*drawn, strict=True) for plan in of_round)]

    def report_plans(self, task: Task, choices: Mapping[str, Choice | None]) -> list[Plan]:
        """All trials of the report phase: every chosen setting, and the models to compare with, at every seed."""
        chosen = [(method, choice.trial.plan.settings) for method, choice in choices.items() if choice is not None]
        seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + self.seeds)
        plans = [Plan(method, settings, seed) for seed in seeds for method, settings in chosen]
        compared = self._compared(task, seeds)
        return sorted([*compared, *plans], key=lambda plan: plan.seed)  # a seed's models are measured once for all its trials

    def _compared(self, task: Task, seeds: Sequence[int]) -> list[Plan]:
        models = [TARGET] if task.retain_model is None else [TARGET, RETAIN_ONLY]
        return [Plan(model, {}, seed) for model in models for seed in seeds]


def run_bench(
    bench: Bench,
    *,
    workers: int | None = None,
    limit: float | None = None,
    checked: Callable[[], None] | None = None,
    so_far: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run what is missing of both phases, and return the results as :func:`results_of` does.

    Args:
        bench: what to compare.
        workers: processes on this machine; by default one per GPU, or one per two CPU cores.
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
    print(f"Tuning: {len(plans)} trials on the validation split of {bench.name}, {workers} at a time.\n{_HEAD}", flush=True)
    last = time.monotonic()

    def write() -> None:
        nonlocal last
        if so_far is not None and time.monotonic() - last > _WRITE:
            so_far(results_of(bench, task))
            last = time.monotonic()

    if workers == 1 and len(_gpus()) <= 1:
        _both_phases(bench, task, deadline, after_trial=write)
    else:
        _start_workers(bench, deadline, workers, meanwhile=write)
    return results_of(bench, task)


def _nothing() -> None:
    pass


def _both_phases(
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


def choices_of(methods: Sequence[str], tuned: Sequence[Done]) -> dict[str, Choice | None]:
    """The chosen trial of every method, see :func:`eua.bench.choice.choose`."""
    by_method = {method: [trial for trial in tuned if trial.plan.method == method] for method in (*methods, TARGET)}
    (before,) = by_method.pop(TARGET)
    if before.result is None:
        raise EUAError(
            f"The model before unlearning could not be measured ({before.error}), so there is nothing to compare methods with: "
            "correct the task, and name another output folder."
        )
    return {method: choose(trials, point_of(before).retain) for method, trials in by_method.items()}


def results_of(bench: Bench, task: Task) -> dict[str, Any]:
    """What is known so far, for JSON: every trial of both phases, what was chosen, and whether anything is missing.

    Raises:
        EUAError: if the folder or storage holds another benchmark.
    """
    methods, plans = methods_on(task, bench.methods), bench.tuning_plans(task)
    queue = bench.queue("tuning")
    queue.belongs_to(task.digest, bench.name)
    tuned = queue.done(plans)
    is_tuned = len(tuned) == len(plans)
    choices = choices_of(methods, tuned) if is_tuned else dict.fromkeys(methods)
    expected = bench.report_plans(task, choices) if is_tuned else []
    reported = bench.queue("report").done(expected)
    return {
        "task": bench.name,
        "digest": task.digest,
        "trials": bench.trials,
        "seeds": bench.seeds,
        "kept": KEPT,
        "tolerance": task.tolerance,
        "note": task.note,
        "complete": is_tuned and len(reported) == len(expected),
        "versions": versions(),
        "versions_of_trials": _versions_of([*tuned, *reported]),
        "methods": methods,
        "chosen": {
            method: choice and {"trial": choice.trial.number, "reached": choice.reached, **asdict(choice.trial.plan)}
            for method, choice in choices.items()
        },
        "tuning": [asdict(trial) for trial in tuned],
        "report": [asdict(trial) for trial in reported],
    }


def _versions_of(trials: Sequence[Done]) -> list[dict[str, str]]:
    """The versions that trials ran with, each once: more than one where a benchmark went on after an update."""
    found = [trial.result["versions"] for trial in trials if trial.result is not None and "versions" in trial.result]
    return [of_trial for place, of_trial in enumerate(found) if of_trial not in found[:place]]


def default_workers() -> int:
    """One per GPU, or one per two CPU cores."""
    return len(_gpus()) or max(1, (os.cpu_count() or 1) // 2)


def _gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(place) for place in range(torch.cuda.device_count())] if named is None else [x for x in named.split(",") if x]


def _start_workers(bench: Bench, deadline: float | None, workers: int, meanwhile: Callable[[], None]) -> None:
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
    gpus = _gpus()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]  # Trainer would spread one model over all that it sees
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    try:
        _both_phases(bench, bench.make_task(TUNING_SEED), deadline, is_first=place == 0)
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
                queue.finish(trial, result)
                figures = (*(f"{result['objectives'][name]:.3f}" for name in ("forget", "retain")), _in_words(plan))
        seconds = f"{time.monotonic() - started:.0f}"
        print(_LINE.format(f"{len(ended) + 1}/{len(plans)}", plan.method, plan.seed, seconds, *figures), flush=True)
        after_trial()


def _in_words(plan: Plan) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in plan.settings.items()
    )
