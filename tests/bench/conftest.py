"""The benchmark at its smallest: twenty people, two small models, trained once for all tests."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from eua.bench.people import people
from eua.bench.study import Plan
from eua.bench.task import MakeTask, Task
from eua.bench.trial import TARGET

SIZE = {"vocabulary": 400, "hidden_size": 128, "layers": 2, "batch_size": 8}
WORLD: dict[str, Any] = {"people": 20, "target_epochs": 30, "epochs": 4, **SIZE}


def tiny_task(seed: int, cache: Path) -> Task:
    """One world for all seeds, whose models take half a minute; the seeds of training differ all the same."""
    task = people(0, cache=cache, **WORLD)
    return replace(task, samples=1, new_tokens=24, relearning_steps=(5, 20))


def made_up_trial(task: Task, plan: Plan, phase: str, output: Path, **_: Any) -> dict[str, Any]:
    """In place of ``run_trial``: a result of the same shape, without training or measuring anything."""
    objectives = {"forget": 0.5, "retain": 1.0} if plan.method == TARGET else {"forget": 0.25, "retain": 0.98}
    metrics = {"said": {"any wording": 0.25}, "objectives": objectives, "sets": {"forget": {"extraction_strength": 0.5}}}
    metrics |= {"aggregates": {}, "membership": {}, "separation": {}, "lasting": {}}
    cost = {"seconds": 1.5, "peak_bytes": 2**30}
    return {"objectives": objectives, **cost, **({"metrics": metrics} if phase == "report" else {})}


@pytest.fixture(scope="session")
def make_task(tmp_path_factory: pytest.TempPathFactory) -> MakeTask:
    return partial(tiny_task, cache=tmp_path_factory.mktemp("bench-models"))
