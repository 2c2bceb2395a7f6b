"""The benchmark at its smallest: twenty people, two small models, trained once for all tests."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from eua.bench.people import people
from eua.bench.task import MakeTask, Task

SIZE = {"vocabulary": 400, "hidden_size": 128, "layers": 2, "batch_size": 8}


def tiny_task(seed: int, cache: Path) -> Task:
    task = people(seed, cache=cache, people=20, target_epochs=30, epochs=4, **SIZE)
    return replace(task, samples=1, new_tokens=24)


@pytest.fixture(scope="session")
def make_task(tmp_path_factory: pytest.TempPathFactory) -> MakeTask:
    return partial(tiny_task, cache=tmp_path_factory.mktemp("bench-models"))
