"""The settings that are tried for each method: grids that have been published, cut to one number of trials for all methods.

The settings are those of OpenUnlearning's released checkpoints (398 of TOFU's forget10, Llama 3.2 1B, each for 5 and for 10
epochs) and of its scripts for methods of the community. Methods of which one learning rate was published are tried with those
of its other grids. GradAscent and CE-U, which have no rows to retain and destroy a model at the rates of the others, are tried
with lower ones, too, and UNDIAL with 3e-5 in place of the highest published one, 3e-4. EUA's grid is this project's own:
NPO's learning rates, and values of γ and ρ around D²'s released settings. Every method that trains on rows to retain is tried
with one of them per row to forget, as published, and with three.

Candidates are EUA with options that D² does not have. They are compared only if they are named.

Three things depend on the task: the numbers of epochs, the blocks, and the learning rates, because models smaller than 1B
parameters need larger ones. A task multiplies every method's published learning rates by one factor.

The settings of a grid have one order, of which a benchmark takes the first ones. Among these, the values of a setting occur as
evenly as possible.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eua.bench.task import Task
from eua.errors import EUAError, did_you_mean
from eua.methods.table import METHODS

Settings = dict[str, Any]  # fields of EUAConfig

PUBLISHED_BLOCKS = 16  # of the model for which the grids were made
_FEW = (1e-5, 2e-5, 5e-5)
_MANY = (1e-5, 2e-5, 3e-5, 4e-5, 5e-5)
_FOR_ADAPTERS = (1e-4, 2.5e-4, 5e-4)  # of which one matrix is trained, from 0
_LOW = (5e-7, 1e-6, 2e-6, 5e-6, 1e-5, 2e-5)
_GAMMAS = (0.01, 0.05, 0.2)
_RETAIN_PER_FORGET = (1, 3)  # rows in a batch: the published number, and that of docs/measurements.md


@dataclass(frozen=True)
class Grid:
    """The learning rates, for models of 1B parameters, and further settings of a method.

    Attributes:
        learning_rates: see the module's docstring.
        settings: field of EUAConfig → the values to try. Other settings keep the method's published values.
        of_epochs: field of EUAConfig → its value as a share of the trial's epochs.
        always: fields of EUAConfig that all of its trials have.
        method: of which it is a candidate, a name of :data:`eua.methods.table.METHODS`; None: its own name is that.
    """

    learning_rates: Sequence[float]
    settings: Mapping[str, Sequence[Any]]
    of_epochs: Mapping[str, float] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None


GRIDS: dict[str, Grid] = {
    "grad_ascent": Grid(_LOW, {}),
    "grad_diff": Grid(_MANY, {"alpha": (1, 2, 5, 10)}),
    "npo": Grid(_FEW, {"beta": (0.05, 0.1, 0.5), "alpha": (1, 2, 5)}),
    "simnpo": Grid(_FEW, {"beta": (3.5, 4.5), "delta": (0, 1), "gamma": (0.125, 0.25)}),
    "idk_dpo": Grid(_FEW, {"beta": (0.05, 0.1, 0.5), "alpha": (1, 2, 5)}),
    "alt_po": Grid(_FEW, {"beta": (0.05, 0.1, 0.5), "alpha": (1, 2, 5)}),
    "idk_nll": Grid(_MANY, {"alpha": (1, 2, 5, 10)}),
    "rmu": Grid(_FEW, {"layer": (5, 10, 15), "steering": (1, 10, 100)}),
    "wga": Grid(_MANY, {"alpha": (1, 0.1, 10)}),
    "satimp": Grid(_MANY, {"beta": (5, 6), "gamma": (1,), "alpha": (1, 0.1, 0.01)}),
    "ce_u": Grid(_LOW, {}),
    "undial": Grid((1e-5, 3e-5, 1e-4), {"beta": (3, 10, 30), "alpha": (1, 2, 5)}),
    "pdu": Grid(_MANY, {}, {"dual_warmup": 0.5}),  # published: 5 of 10 epochs
    "me_gd": Grid(_MANY, {}),
    "eua": Grid(_FEW, {"gamma": _GAMMAS, "rho": (0.1, 0.3)}),
}


# An option of EUA each, the same for all of its trials or tried with several values, and in the end several together.
_GUARDED: dict[str, Any] = {"prompt_energy": 1.0}
_AT_MARGIN: dict[str, Sequence[Any]] = {"gamma": _GAMMAS, "margin": (3.0, 5.0)}
CANDIDATES: dict[str, Grid] = {
    "eua_prompt": Grid(_FEW, {"gamma": _GAMMAS, "prompt_energy": (0.3, 1.0)}, method="eua"),
    "eua_margin": Grid(_FEW, _AT_MARGIN, always=_GUARDED, method="eua"),
    "eua_key": Grid(_FEW, _AT_MARGIN, always=_GUARDED | {"forget_tokens": "key"}, method="eua"),
    "eua_similar": Grid(_FEW, {"gamma": _GAMMAS, "rho": (0.1, 0.3)}, always={"retain_sampler": "similar"}, method="eua"),
    "eua_filter": Grid(_FEW, {"gamma": _GAMMAS, "gradient_filter": (1, 4)}, method="eua"),
    "eua_gate": Grid(_FEW, {"gamma": _GAMMAS, "rho": (0.1, 0.3)}, always={"sign_gate": True}, method="eua"),
    "eua_warm": Grid(_FEW, {"gamma": _GAMMAS, "forget_warmup_ratio": (0.4, 0.7)}, method="eua"),
    "eua_distinct": Grid(_FOR_ADAPTERS, {"gamma": _GAMMAS, "distinct_directions": (16, 64)}, method="eua"),
    "eua_distinct_warm": Grid(
        _FOR_ADAPTERS,
        {"gamma": _GAMMAS, "distinct_directions": (32, 64)},
        always={"forget_warmup_ratio": 0.7},
        method="eua",
    ),
    "eua_gentle": Grid(_FOR_ADAPTERS, {"margin": (5.0, 7.0)}, always={"preset": "gentle"}, method="eua"),
}
_KNOWN = GRIDS | CANDIDATES


def unlearning_method(name: str) -> str:
    """The method of :data:`eua.methods.table.METHODS` that a grid or a candidate is of.

    >>> unlearning_method("npo"), unlearning_method("eua_margin")
    ('npo', 'eua')
    """
    return _KNOWN[name].method or name


def is_compared(name: str) -> bool:
    """Whether a trial's method is one that unlearns, and not one of the models to compare with."""
    return name in _KNOWN


def check_methods(methods: Sequence[str]) -> None:
    """Raise for a method that does not exist, and for one that is named twice.

    Raises:
        EUAError: if there is one.
    """
    for method in methods:
        if method not in _KNOWN:
            raise EUAError(
                f"There is no method {method!r}{did_you_mean(method, _KNOWN)} Known are {', '.join(_KNOWN)}: name some of "
                "these."
            )
    for method in dict.fromkeys(methods):
        if methods.count(method) > 1:
            raise EUAError(
                f"The method {method} was named {methods.count(method)} times, but its trials are the same each time: name it "
                "once."
            )


def methods_on(task: Task, names: Sequence[str] | None = None) -> list[str]:
    """The methods to compare on a task: those that are named, or all that can train on its rows.

    AltPO trains on other answers to the rows to forget, which not every task has.

    Raises:
        EUAError: see :func:`check_methods`; if a method is named that cannot train on the task's rows.
    """
    lacking = [method for method in GRIDS if METHODS[method].alternatives == "own" and not _has_alternatives(task)]
    if names is None:
        return [method for method in GRIDS if method not in lacking]
    check_methods(names)
    for method in names:
        if method in lacking:
            raise EUAError(
                f"{method} was asked for, but it trains on other answers to the rows to forget, and those of the task "
                f'{task.name} have no "alternatives": leave it out, or choose a task that has them, such as people or tofu.'
            )
    return list(names)


def _has_alternatives(task: Task) -> bool:
    return all(row.get("alternatives") for row in task.forget)


def axes(method: str, task: Task) -> dict[str, Sequence[Any]]:
    """Every setting that is tried for a method on a task, with its values."""
    grid = _KNOWN[method]
    settings = dict(grid.settings)
    if "layer" in settings:
        scaled = (max(1, round(block * task.blocks / PUBLISHED_BLOCKS)) for block in settings["layer"])
        settings["layer"] = tuple(dict.fromkeys(min(block, task.blocks - 1) for block in scaled))
    if METHODS[unlearning_method(method)].retain_loss is not None:
        settings["retain_per_forget"] = _RETAIN_PER_FORGET
    return {
        "learning_rate": tuple(rate * task.rate_factor for rate in grid.learning_rates),
        "num_train_epochs": task.epochs,
        **settings,
    }


def trials_of(method: str, task: Task, count: int) -> list[Settings]:
    """``count`` different settings of a method, spread over its grid: the same ones wherever and whenever they are drawn.

    They begin with those of every smaller count, so a benchmark can be given more trials later.

    Raises:
        EUAError: if the grid has fewer.
    """
    values = axes(method, task)
    size = math.prod(map(len, values.values()))
    if count > size:
        raise EUAError(
            f"{count} trials were asked for, but the grid of {method} on the task {task.name} has {size} settings, and "
            f"every method gets as many as the others: ask for at most {size}, or leave {method} out."
        )
    drawn = itertools.islice(_in_order(values, random.Random(method)), count)
    grid = _KNOWN[method]
    return [
        point | {name: share * point["num_train_epochs"] for name, share in grid.of_epochs.items()} | dict(grid.always)
        for point in drawn
    ]


def settings_key(settings: Mapping[str, Any]) -> str:
    """A short text that equal settings, and no others, have in common."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """Settings for people to read.

    >>> settings_in_words({"learning_rate": 2e-05, "layer": 3})
    'learning_rate 2e-05, layer 3'
    """
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items())


def _in_order(values: Mapping[str, Sequence[Any]], rng: random.Random) -> Iterator[Settings]:
    """All settings of a grid in random order, each once.

    No value of a setting comes again before every other one has come, as long as there are such settings.
    """
    rest = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    left: dict[str, list[Any]] = {name: [] for name in values}  # the values that have to come before another comes again
    while rest:
        for name, of_name in left.items():
            of_name += () if of_name else values[name]
        due = [point for point in rest if all(point[name] in of_name for name, of_name in left.items())]
        point = rng.choice(due or rest)
        rest.remove(point)
        for name, of_name in left.items():
            if point[name] in of_name:
                of_name.remove(point[name])
        yield point
