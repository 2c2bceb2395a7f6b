"""Tuning of the Triton kernels: time launch settings one after the other, and name the fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

from heads import FORWARD, FROZEN, TRAINABLE, Head
from measure import medians
from peers import ours

from fused_energy.triton import configs, launch
from fused_energy.triton.configs import Config

SOFTCAP = {"HALF_PRECISION": None, "HALF_PRECISION_WITH_MORE": 30.0}  # of the work that a table of tiles is for


def tables(rehearse: bool) -> dict[str, dict[str, Config]]:
    """The tables of tiles in ``configs.py``, by name. The interpreter has one tile, which is not in a table."""
    return {name: {"TINY": configs.TINY} if rehearse else getattr(configs, name) for name in SOFTCAP}


def candidates(rehearse: bool) -> Iterator[Config]:
    """Tiles that suit tensor cores. Those that do not fit a GPU fail to compile and are skipped."""
    if rehearse:
        yield from (configs.TINY, configs.TINY._replace(group=4))
        return
    sizes = [(128, 256, 64), (256, 128, 64), (128, 128, 64), (128, 128, 128), (64, 256, 64)]
    for (rows, columns, depth), stages, group in product(sizes, (3, 4), (8, 16, 32)):
        yield Config(rows, columns, depth, 8, stages, group)


def tune_forward(
    head: Head,
    name: str,
    table: dict[str, Config],
    key: str,
    out_of_time: Callable[[], bool],
    rehearse: bool,
    say: Callable[[str], None],
) -> Config:
    """The fastest tile for these inputs, which ``table[key]`` is set to."""
    fastest, winner = math.inf, table[key]
    for tile in (table[key], *candidates(rehearse)):
        if out_of_time():
            say(f"{name}: out of time, the remaining tiles were not tried")
            break
        table[key] = tile
        step, _ = head.step(partial(ours, "triton"), FORWARD, SOFTCAP[name])
        try:
            seconds = medians({name: step}, head.hidden.device.type, rounds=5)[name]
        except Exception as error:  # too large for this GPU
            say(f"{name} {tuple(tile)}: {type(error).__name__}")
            continue
        say(f"{name} {tuple(tile)}: {seconds * 1e3:.2f} ms")
        if seconds < fastest:
            fastest, winner = seconds, tile
    table[key] = winner
    say(f"{name}: the fastest is {winner}")
    return winner


def scratch_sizes(head: Head, rehearse: bool) -> Iterator[tuple[str, str, float]]:
    """(size, what, time in multiples of the matmul) for other sizes of the chunks of logits."""
    usual = launch.FORWARD_BYTES, launch.BACKWARD_BYTES
    for factor in (1.0,) if rehearse else (0.5, 1.0, 2.0, 4.0):
        launch.FORWARD_BYTES, launch.BACKWARD_BYTES = (int(factor * size) for size in usual)
        for what in (FROZEN, TRAINABLE):
            times = medians({"matmul": head.matmul, what: head.step(partial(ours, "triton"), what)[0]}, head.hidden.device.type)
            yield f"{factor:g} × as much", what, times[what] / times["matmul"]
    launch.FORWARD_BYTES, launch.BACKWARD_BYTES = usual
