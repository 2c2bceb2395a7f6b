"""The settings that are tried: as many for every method, different, spread, and always the same."""

from __future__ import annotations

from collections import Counter

import pytest

from eua.bench.grids import GRIDS, axes, check_methods, trials_of
from eua.bench.task import EvaluationSet, Task
from eua.errors import EUAError
from eua.methods.table import METHODS
from eua.training.config import EUAConfig

ROWS = [{"question": "Who?", "answer": "Ann."}]
SETS = {"forget": EvaluationSet(ROWS, forget=True), "retain": EvaluationSet(ROWS, forget=False)}


def task(**more) -> Task:
    return Task("people", "target", None, ROWS, ROWS, SETS, SETS, ["Who?"], ["Ann"], **more)


SMALL = task(learning_rates=(1e-4, 2e-4, 5e-4), epochs=(6, 12), blocks=4)


@pytest.mark.parametrize("method", GRIDS)
def test_every_method_gets_as_many_settings_of_its_grid(method):
    drawn = trials_of(method, SMALL, 6)
    assert len(drawn) == 6
    assert len({tuple(settings.items()) for settings in drawn}) == 6
    known = axes(method, SMALL)
    for name, values in known.items():
        counts = Counter(settings[name] for settings in drawn)
        assert set(counts) <= set(values)
        if len(values) <= 6:  # every value is tried, as often as every other up to one
            assert set(counts) == set(values)
            assert max(counts.values()) - min(counts.values()) <= 1, name
    assert drawn == trials_of(method, SMALL, 6)


@pytest.mark.parametrize("method", GRIDS)
def test_the_settings_are_fields_that_the_method_has(method, tmp_path):
    for settings in trials_of(method, SMALL, 6):
        config = EUAConfig(output_dir=str(tmp_path), report_to="none", method=method, **settings)
        own = set(settings) - {"learning_rate", "num_train_epochs", "rho"}
        assert own <= set(METHODS[method].settings)  # others would have no effect
        assert {name: getattr(config, name) for name in own} == {name: settings[name] for name in own}


def test_every_method_has_a_grid():
    assert set(GRIDS) == set(METHODS)


def test_the_task_decides_learning_rates_epochs_and_blocks():
    assert axes("npo", SMALL)["learning_rate"] == (1e-4, 2e-4, 5e-4)
    assert axes("npo", task())["learning_rate"] == (1e-5, 2e-5, 5e-5)
    assert axes("npo", task())["num_train_epochs"] == (5, 10)
    assert axes("rmu", task())["layer"] == (5, 10, 15)  # as published
    assert axes("rmu", SMALL)["layer"] == (1, 2, 3)
    assert axes("pdu", task())["dual_warmup"] == (2.5,)


def test_more_trials_than_a_grid_has_are_refused():
    with pytest.raises(
        EUAError, match=r"the grid of ce_u on the task people has 6 settings.*ask for at most 6, or leave ce_u out"
    ):
        trials_of("ce_u", SMALL, 7)


def test_unknown_methods_are_refused():
    with pytest.raises(EUAError, match=r"There is no method 'simnpp'.*did you mean.*Known are grad_ascent"):
        check_methods(["eua", "simnpp"])
