"""A benchmark, the trials that it consists of, and what is known of them so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eua.bench.choice import KEPT, Choice, choose, point_of
from eua.bench.cost import versions
from eua.bench.grids import methods_on, trials_of
from eua.bench.study import GRACE, HEARTBEAT, Done, Plan, TrialQueue, default_storage
from eua.bench.task import MakeTask, Task
from eua.bench.trial import RETAIN_ONLY, TARGET, Phase
from eua.errors import EUAError

TUNING_SEED = 0  # results are reported at the seeds after it, so not with the weights that won


@dataclass(frozen=True)
class Bench:
    """A benchmark: what is compared on which task, and where it is kept. It can be sent to worker processes.

    Attributes:
        name: of the task.
        make_task: makes the task of a seed; a function of a module, or a ``functools.partial`` of one.
        methods: names of grids or candidates; None: all of :data:`eua.bench.grids.GRIDS` that can train on the task's rows.
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


def choices_of(methods: Sequence[str], tuned: Sequence[Done]) -> dict[str, Choice | None]:
    """The chosen trial of every method, see :func:`eua.bench.choice.choose`."""
    by_method = {method: [trial for trial in tuned if trial.plan.method == method] for method in (*methods, TARGET)}
    (before,) = by_method.pop(TARGET)
    if before.result is None:
        raise EUAError(
            f"The model before unlearning could not be measured ({before.error}), so there is nothing to compare methods with: "
            "correct the task, and name another output folder."
        )
    never_knew = _never_knew(tuned) or 0.0
    return {method: choose(trials, point_of(before).retain, never_knew) for method, trials in by_method.items()}


def _never_knew(tuned: Sequence[Done]) -> float | None:
    """What is left of the rows to forget in the retain-only model; None if there is none, or none that was measured."""
    found = [trial for trial in tuned if trial.plan.method == RETAIN_ONLY and trial.result is not None]
    return point_of(found[0]).forget if found else None


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
        "never_knew": _never_knew(tuned),
        "objective": task.objective,
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
