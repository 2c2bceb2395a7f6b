"""The rule by which settings are chosen, the area under the front, and intervals, on made-up trials."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from eua.bench.choice import Point, area_under_front, choose, front, interval, point_of, relative_to
from eua.bench.results import choices_of
from eua.bench.study import Done, Plan
from eua.bench.trial import RETAIN_ONLY, TARGET
from eua.errors import EUAError


def trial(number: int, forget: float, retain: float) -> Done:
    return Done(Plan("npo", {"beta": number}, 0), number, {"objectives": {"forget": forget, "retain": retain}}, None)


def failed(number: int) -> Done:
    return Done(Plan("npo", {"beta": number}, 0), number, None, "EUAError: the loss became nan")


def test_the_one_that_forgets_most_among_those_that_keep_enough_is_chosen():
    trials = [trial(0, 0.0, 0.5), trial(1, 0.3, 0.76), trial(2, 0.2, 0.77), trial(3, 0.9, 0.8), failed(4)]
    choice = choose(trials, target_retain=0.8)  # 0.95 of it is 0.76
    assert (choice.trial.number, choice.reached) == (2, True)


def test_exactly_95_per_cent_are_enough():
    assert choose([trial(0, 0.1, 0.95), trial(1, 0.5, 1.0)], target_retain=1.0).trial.number == 0


def test_if_none_keeps_enough_the_one_that_keeps_most_is_chosen_and_marked():
    choice = choose([trial(0, 0.0, 0.1), trial(1, 0.9, 0.7), failed(2), trial(3, 0.4, 0.7)], target_retain=1.0)
    assert (choice.trial.number, choice.reached) == (3, False)


def test_equal_ones_are_decided_by_the_other_measure_and_then_by_order():
    assert choose([trial(0, 0.1, 0.96), trial(1, 0.1, 0.99), trial(2, 0.1, 0.99)], target_retain=1.0).trial.number == 1


def test_forgetting_more_than_a_model_that_never_knew_is_no_gain():
    trials = [trial(0, 0.0, 0.96), trial(1, 0.2, 0.99), trial(2, 0.3, 1.0)]
    assert choose(trials, target_retain=1.0).trial.number == 0
    assert choose(trials, target_retain=1.0, never_knew=0.2).trial.number == 1
    assert choose(trials, target_retain=1.0, never_knew=0.25).trial.number == 1
    assert choose(trials, target_retain=1.0, never_knew=0.3).trial.number == 2
    assert choose([trial(0, 0.1, 1.0), trial(1, 0.05, 1.0)], target_retain=1.0, never_knew=0.3).trial.number == 1


def test_the_retain_only_model_says_what_forgetting_is_enough():
    compared = [
        replace(trial(place, *point), plan=Plan(name, {}, 0))
        for place, (name, point) in enumerate({TARGET: (0.9, 1.0), RETAIN_ONLY: (0.2, 1.0)}.items())
    ]
    trials = [trial(2, 0.0, 0.96), trial(3, 0.2, 0.99)]
    assert choices_of(["npo"], [*compared, *trials])["npo"].trial.number == 3
    assert choices_of(["npo"], [compared[0], *trials])["npo"].trial.number == 2


def test_nothing_is_chosen_if_all_failed():
    assert choose([failed(0), failed(1)], target_retain=1.0) is None
    with pytest.raises(
        EUAError, match=r"Trial 0 ended with an error \(EUAError: the loss became nan\), so it has no objectives"
    ):
        point_of(failed(0))


def test_area_under_the_front_on_constructed_points():
    assert area_under_front([Point(0.0, 1.0)]) == 1.0  # forgets everything, keeps everything
    assert area_under_front([Point(1.0, 1.0)]) == 0.0  # the model before unlearning
    assert area_under_front([Point(0.0, 0.0)]) == 0.0
    assert area_under_front([]) == 0.0
    assert area_under_front([Point(0.25, 0.8)]) == pytest.approx(0.6)
    # 0.4 from 0 to 0.5, then 0.9; the third point is worse than the second in both.
    points = [Point(0.5, 0.9), Point(0.0, 0.4), Point(0.7, 0.8)]
    assert area_under_front(points) == pytest.approx(0.4 * 0.5 + 0.9 * 0.5)
    assert front(points) == [Point(0.0, 0.4), Point(0.5, 0.9)]
    assert front([*points, Point(0.5, 0.9)]) == [Point(0.0, 0.4), Point(0.5, 0.9)]
    assert area_under_front([*points, Point(0.5, 0.9)]) == pytest.approx(0.65)


def test_the_area_is_relative_to_the_model_before_unlearning():
    target = Point(0.6, 0.8)
    assert area_under_front(relative_to(target, [target])) == 0.0  # changes nothing
    assert area_under_front(relative_to(target, [Point(0.0, 0.8)])) == 1.0
    assert area_under_front(relative_to(target, [Point(0.3, 0.4)])) == pytest.approx(0.25)
    assert relative_to(target, [Point(0.9, 0.9)]) == [(1.0, 1.0)]
    assert area_under_front(relative_to(Point(0.0, 0.8), [Point(0.0, 0.8)])) == 0.0  # there was nothing to forget


def test_intervals_of_a_mean():
    # Student's t of 0.975 with 2 degrees of freedom is 4.302653; the standard deviation of 1, 2, 3 is 1.
    mean, half_width, seeds = interval([1.0, 2.0, 3.0])
    assert (mean, seeds) == (2.0, 3)
    assert half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert interval([0.5, 0.5]) == (0.5, 0.0, 2)
    single = interval([0.7])
    assert single.mean == 0.7
    assert math.isnan(single.half_width)
    with pytest.raises(EUAError, match="There are no values"):
        interval([])
