"""Chooses a method's settings, and sums its trials up: the forget–retain front, the area under it, intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from eua.bench.study import Done
from eua.bench.trial import TARGET
from eua.errors import EUAError

KEPT = 0.95  # of the target's retain measure, which a method must keep


class Point(NamedTuple):
    """What a trial left of what was to be forgotten and to be retained, in [0, 1]; see :attr:`Task.objective`."""

    forget: float
    retain: float


@dataclass(frozen=True)
class Choice:
    """The trial whose settings are reported, and whether any trial of the method kept enough."""

    trial: Done
    reached: bool


def point_of(trial: Done) -> Point:
    """The objectives of a trial that has a result."""
    if trial.result is None:
        raise EUAError(f"Trial {trial.number} ended with an error ({trial.error}), so it has no objectives: leave it out.")
    return Point(**trial.result["objectives"])


def choose(trials: Sequence[Done], target_retain: float, never_knew: float = 0.0) -> Choice | None:
    """The trial that forgets most among those that keep 95 % of the target's retain measure; None if all trials failed.

    Trials of which no more is left than a model that never knew the rows to forget has of them are equal in this: to forget
    more is not the aim, and costs what lies near. If none keeps that much, it is the trial that keeps most, marked as not
    reached. Of equal trials, the one that is better in the other measure is chosen, then the one that forgets more, then the
    first.

    Args:
        trials: of one method, on the validation split.
        target_retain: the retain measure of the model before unlearning.
        never_knew: the forget measure of the model that was never trained on the rows to forget; 0 if there is none.
    """
    worked = [trial for trial in trials if trial.result is not None]
    enough = [trial for trial in worked if point_of(trial).retain >= KEPT * target_retain]
    if enough:

        def rank(trial: Done) -> tuple[float, float, float]:
            forget, retain = point_of(trial)
            return max(forget, never_knew), -retain, forget

        return Choice(min(enough, key=rank), True)
    if worked:
        return Choice(min(worked, key=lambda trial: (-point_of(trial).retain, point_of(trial).forget)), False)
    return None


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both measures, by what they forget.

    >>> front([Point(0.5, 0.9), Point(0.1, 0.6), Point(0.6, 0.8)])
    [Point(forget=0.1, retain=0.6), Point(forget=0.5, retain=0.9)]
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.forget, -point.retain)):
        if not kept or point.retain > kept[-1].retain:
            kept.append(point)
    return kept


def relative_to(target: Point, points: Sequence[Point]) -> list[Point]:
    """What is left of the target's measures, at most 1: (1, 1) is a method that changes nothing.

    >>> relative_to(Point(0.5, 0.8), [Point(0.25, 0.8), Point(0.6, 0.4)])
    [Point(forget=0.5, retain=1.0), Point(forget=1.0, retain=0.5)]

    Args:
        target: the model before unlearning. Where one of its measures is 0, there is nothing to forget or to keep, and a
            method's counts as 1.
    """

    def share(value: float, whole: float) -> float:
        return min(value / whole, 1.0) if whole > 0 else 1.0

    return [Point(share(point.forget, target.forget), share(point.retain, target.retain)) for point in points]


def area_under_front(points: Sequence[Point]) -> float:
    """The area of the unit square that is worse than some point: ``∫₀¹ max {retain : forget ≤ f} df``, in [0, 1].

    1 is a method that forgets everything and keeps everything, 0 one that forgets nothing or keeps nothing. Of points relative
    to the model before unlearning, see :func:`relative_to`, that model itself adds nothing. It is the hypervolume of the two
    measures with the reference point (1, 0).

    >>> area_under_front([Point(0.5, 0.9), Point(0.0, 0.6)])
    0.75
    """
    steps = [*front(points), Point(1.0, 0.0)]
    return sum(point.retain * (after.forget - point.forget) for point, after in zip(steps, steps[1:], strict=False))


class Interval(NamedTuple):
    """A mean over ``seeds`` seeds, and half the width of its 95 % interval; NaN for a single seed."""

    mean: float
    half_width: float
    seeds: int


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of a mean: ``x̄ ± t·s/√n`` with n − 1 degrees of freedom.

    >>> interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, half_width=2.484137711719594, seeds=3)

    Raises:
        EUAError: if there are no values.
    """
    count = len(values)
    if not count:
        raise EUAError("There are no values, so they have no mean: give one for each seed.")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, 1)
    from scipy.stats import t  # type: ignore[import-untyped, unused-ignore]

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, float(t.ppf((1 + level) / 2, count - 1)) * deviation / math.sqrt(count), count)


def points_of(results: Mapping[str, Any], method: str) -> list[Point]:
    """What the trials of a method's tuning forgot and kept, on the validation split."""
    return [
        Point(**trial["result"]["objectives"])
        for trial in results["tuning"]
        if trial["plan"]["method"] == method and trial["result"] is not None
    ]


def area_of(results: Mapping[str, Any], method: str) -> float | None:
    """The area under the front of a method's trials, relative to the model before unlearning; None until both are measured."""
    points, target = points_of(results, method), points_of(results, TARGET)
    return area_under_front(relative_to(target[0], points)) if points and target else None
