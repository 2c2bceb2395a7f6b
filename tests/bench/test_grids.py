"""The settings that are tried: as many for every method, different, spread, and always the same."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from eua.bench.grids import CANDIDATES, GRIDS, axes, check_methods, methods_on, trials_of, unlearning_method
from eua.bench.study import Plan
from eua.bench.task import EvaluationSet, Task
from eua.bench.trial import _config
from eua.errors import EUAError
from eua.methods.table import METHODS
from eua.training.config import EUAConfig

OF_ANY_METHOD = ("preset", "forget_tokens", "retain_sampler", "gradient_filter", "sign_gate", "distinct_directions")
ROWS = [{"question": "Who?", "answer": "Ann."}]
SETS = {"forget": EvaluationSet(ROWS, forget=True), "retain": EvaluationSet(ROWS, forget=False)}


def task(**more) -> Task:
    return Task("people", "target", None, ROWS, ROWS, SETS, SETS, ["Who?"], ["Ann"], **more)


SMALL = task(rate_factor=20.0, epochs=(6, 12), blocks=4)


@pytest.mark.parametrize("method", [*GRIDS, *CANDIDATES])
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


@pytest.mark.parametrize("method", [*GRIDS, *CANDIDATES])
def test_more_trials_begin_with_those_of_fewer(method):
    assert trials_of(method, SMALL, 10)[:4] == trials_of(method, SMALL, 4)
    everything = trials_of(method, SMALL, math.prod(map(len, axes(method, SMALL).values())))
    assert len({tuple(settings.items()) for settings in everything}) == len(everything)


@pytest.mark.parametrize("method", [*GRIDS, *CANDIDATES])
def test_the_settings_are_fields_that_the_method_has(method, tmp_path):
    for settings in trials_of(method, SMALL, 6):
        config = EUAConfig(output_dir=str(tmp_path), report_to="none", method=unlearning_method(method), **settings)
        own = set(settings) - {"learning_rate", "num_train_epochs", "rho", "retain_per_forget", *OF_ANY_METHOD}
        assert own <= set(METHODS[unlearning_method(method)].settings)  # others would have no effect
        assert {name: getattr(config, name) for name in own} == {name: settings[name] for name in own}


def test_every_method_has_a_grid():
    assert set(GRIDS) == set(METHODS)


def test_candidates_are_compared_if_they_are_named():
    assert {unlearning_method(name) for name in CANDIDATES} == {"eua"}
    assert not set(CANDIDATES) & set(methods_on(SMALL))
    assert methods_on(SMALL, ["eua_distinct", "npo"]) == ["eua_distinct", "npo"]
    config = _config(SMALL, Plan("eua_distinct", trials_of("eua_distinct", SMALL, 1)[0], 0), Path("out"))
    assert config.method == "eua"
    assert config.distinct_directions in (16, 64)
    with pytest.raises(EUAError, match="did you mean 'eua_distinct'"):
        check_methods(["eua_distnct"])


def test_the_task_decides_learning_rates_epochs_and_blocks():
    assert axes("npo", task())["learning_rate"] == (1e-5, 2e-5, 5e-5)
    assert axes("npo", SMALL)["learning_rate"] == pytest.approx((2e-4, 4e-4, 1e-3))
    assert axes("undial", SMALL)["learning_rate"] == pytest.approx((2e-4, 6e-4, 2e-3))  # the same factor for every method
    assert axes("npo", task())["num_train_epochs"] == (5, 10)
    assert axes("rmu", task())["layer"] == (5, 10, 15)  # as published
    assert axes("rmu", SMALL)["layer"] == (1, 2, 3)


def test_the_warm_up_of_pdu_takes_half_of_the_epochs_of_each_trial():
    drawn = trials_of("pdu", SMALL, 6)
    assert {settings["num_train_epochs"] for settings in drawn} == {6, 12}
    assert all(settings["dual_warmup"] == settings["num_train_epochs"] / 2 for settings in drawn)


def test_every_method_with_a_retain_part_is_tried_with_one_and_with_three_rows_to_retain():
    without = {method for method in GRIDS if "retain_per_forget" not in axes(method, SMALL)}
    assert without == {"grad_ascent", "ce_u"}
    assert axes("eua", SMALL)["retain_per_forget"] == (1, 3)
    config = _config(task(training={"retain_per_forget": 2}), Plan("npo", {"retain_per_forget": 1}, 0), Path("out"))
    assert config.retain_per_forget == 1  # whatever the task's shared settings are


def test_a_method_without_rows_to_train_on_is_left_out_unless_it_is_named():
    assert methods_on(SMALL) == [method for method in GRIDS if method != "alt_po"]
    assert methods_on(SMALL, ["npo", "eua"]) == ["npo", "eua"]
    with pytest.raises(EUAError, match=r'alt_po was asked for.*those of the task people have no "alternatives": leave it out'):
        methods_on(SMALL, ["eua", "alt_po"])
    rows = [ROWS[0] | {"alternatives": ["Bob."]}]
    assert methods_on(replace(SMALL, forget=rows)) == list(GRIDS)
    assert methods_on(replace(SMALL, forget=rows), ["alt_po"]) == ["alt_po"]


def test_more_trials_than_a_grid_has_are_refused():
    with pytest.raises(
        EUAError, match=r"the grid of ce_u on the task people has 12 settings.*ask for at most 12, or leave ce_u out"
    ):
        trials_of("ce_u", SMALL, 13)


def test_unknown_methods_are_refused():
    with pytest.raises(EUAError, match=r"There is no method 'simnpp'.*did you mean.*Known are grad_ascent"):
        check_methods(["eua", "simnpp"])
    with pytest.raises(EUAError, match=r"The method eua was named 2 times.*name it once"):
        check_methods(["eua", "npo", "eua"])
