"""The settings that are tried for each method: grids that have been published, cut to one number of trials for all methods.

The grids are those of OpenUnlearning's released checkpoints (398 of TOFU's forget10, Llama 3.2 1B, each for 5 and for 10
epochs) and of its scripts for methods of the community; D²'s is around its released settings. Two things depend on the task:
numbers of epochs, and learning rates, because models smaller than 1B parameters need larger ones. A task that names its
learning rates gives every method the same ones.

A grid is cut by stratified sampling: among the trials, each value of a setting occurs as often as every other, up to one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eua.bench.task import Task
from eua.errors import EUAError, did_you_mean

Settings = dict[str, Any]  # fields of EUAConfig

PUBLISHED_BLOCKS = 16  # of the model for which the grids were made
_FEW = (1e-5, 2e-5, 5e-5)
_MANY = (1e-5, 2e-5, 3e-5, 4e-5, 5e-5)
_TRIES = 1000  # shuffles, before settings are drawn that are only different from each other


@dataclass(frozen=True)
class Grid:
    """The published learning rates and further settings of a method.

    Attributes:
        learning_rates: those published.
        settings: field of EUAConfig → the values to try. Other settings keep the method's published values.
    """

    learning_rates: Sequence[float]
    settings: Mapping[str, Sequence[Any]]


GRIDS: dict[str, Grid] = {
    "grad_ascent": Grid(_MANY, {}),
    "grad_diff": Grid(_MANY, {"alpha": (1, 2, 5, 10)}),
    "npo": Grid(_FEW, {"beta": (0.05, 0.1, 0.5), "alpha": (1, 2, 5)}),
    "simnpo": Grid(_FEW, {"beta": (3.5, 4.5), "delta": (0, 1), "gamma": (0.125, 0.25)}),
    "idk_dpo": Grid(_FEW, {"beta": (0.05, 0.1, 0.5), "alpha": (1, 2, 5)}),
    "alt_po": Grid(_FEW, {"beta": (0.05, 0.1, 0.5), "alpha": (1, 2, 5)}),
    "idk_nll": Grid(_MANY, {"alpha": (1, 2, 5, 10)}),
    "rmu": Grid(_FEW, {"layer": (5, 10, 15), "steering": (1, 10, 100)}),
    "wga": Grid(_MANY, {"alpha": (1, 0.1, 10)}),
    "satimp": Grid(_MANY, {"beta": (5, 6), "gamma": (1,), "alpha": (1, 0.1, 0.01)}),
    "ce_u": Grid(_MANY, {}),
    "undial": Grid((1e-5, 1e-4, 3e-4), {"beta": (3, 10, 30), "alpha": (1, 2, 5)}),
    "pdu": Grid(_MANY, {"dual_warmup": ()}),
    "me_gd": Grid(_MANY, {}),
    "eua": Grid(_FEW, {"gamma": (0.01, 0.05, 0.2), "rho": (0.1, 0.3)}),
}


def check_methods(methods: Sequence[str]) -> None:
    """Raise for a method that does not exist.

    Raises:
        EUAError: if so.
    """
    for method in methods:
        if method not in GRIDS:
            raise EUAError(
                f"There is no method {method!r}{did_you_mean(method, GRIDS)} Known are {', '.join(GRIDS)}: name some of these."
            )


def axes(method: str, task: Task) -> dict[str, Sequence[Any]]:
    """Every setting that is tried for a method on a task, with its values."""
    grid = GRIDS[method]
    settings = dict(grid.settings)
    if "layer" in settings:
        scaled = (max(1, round(block * task.blocks / PUBLISHED_BLOCKS)) for block in settings["layer"])
        settings["layer"] = tuple(dict.fromkeys(min(block, task.blocks - 1) for block in scaled))
    if "dual_warmup" in settings:  # published: 5 of 10 epochs
        settings["dual_warmup"] = (min(task.epochs) / 2,)
    return {
        "learning_rate": task.learning_rates or grid.learning_rates,
        "num_train_epochs": task.epochs,
        **settings,
    }


def trials_of(method: str, task: Task, count: int) -> list[Settings]:
    """``count`` different settings of a method, spread over its grid: the same ones wherever and whenever they are drawn.

    Raises:
        EUAError: if the grid has fewer.
    """
    values = axes(method, task)
    whole = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    if count > len(whole):
        raise EUAError(
            f"{count} trials were asked for, but the grid of {method} on the task {task.name} has {len(whole)} settings, and "
            f"every method gets as many as the others: ask for at most {len(whole)}, or leave {method} out."
        )
    rng = random.Random(f"{method} {count}")
    for _ in range(_TRIES):
        columns = [_balanced(list(column), count, rng) for column in values.values()]
        points = [dict(zip(values, point, strict=True)) for point in zip(*columns, strict=True)]
        if len({settings_key(point) for point in points}) == count:
            return points
    return rng.sample(whole, count)


def settings_key(settings: Mapping[str, Any]) -> str:
    """A short text that equal settings, and no others, have in common."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _balanced(values: list[Any], count: int, rng: random.Random) -> list[Any]:
    """``count`` of the values in random order, each as often as every other, up to one."""
    rng.shuffle(values)
    drawn = [values[i % len(values)] for i in range(count)]
    rng.shuffle(drawn)
    return drawn
