"""Tuning of the Triton kernels: time launch settings, one kind of tile at a time, and return the fastest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

from heads import FORWARD, FROZEN, TRAINABLE, Head
from measure import medians
from peers import ours

from fused_energy.triton import configs
from fused_energy.triton.configs import Config, Configs

# The work whose time depends most on a kind of tile, and its softcap.
WORK = {
    "logits": (FORWARD, None),
    "logits_with_softcap": (FORWARD, 30.0),
    "by_head": (FROZEN, None),
    "by_tokens": (TRAINABLE, None),
}


def candidates(which: str, rehearse: bool) -> Iterator[Config]:
    """Tiles that suit tensor cores. Those that do not fit a GPU fail to compile and are skipped."""
    if rehearse:
        tiny = configs.TINY.logits
        yield from (tiny, tiny._replace(group=4))
        return
    sizes = [(128, 256, 64), (128, 128, 64), (256, 128, 64), (64, 256, 64), (128, 128, 128)]
    for (rows, columns, depth), warps, stages, group in product(sizes, (4, 8), (3, 4), (8, 16)):
        if rows * columns < 128 * 256 or warps == 8:  # 4 warps have too few registers for a large tile
            yield Config(rows, columns, depth, warps, stages, group)


def tune(head: Head, table: dict[str, Configs], key: str, until: float, rehearse: bool, say: Callable[[str], None]) -> Configs:
    """The fastest tile of each kind for these inputs, found one after the other; ``table[key]`` is set to them.

    The search ends at ``until`` (``time.monotonic``), and each kind gets an equal share of the time: a kind for which none was
    tried keeps its setting.
    """
    device = head.hidden.device.type
    for position, (which, (what, softcap)) in enumerate(WORK.items()):
        now = time.monotonic()
        ends = now + (until - now) / (len(WORK) - position)
        best, fastest = table[key], math.inf
        for config in (getattr(best, which), *candidates(which, rehearse)):
            if time.monotonic() > ends:
                say(f"{which}: out of time, the remaining settings were not tried")
                break
            tried = best._replace(**{which: config})
            if not _fits(tried):
                continue
            table[key] = tried
            step, _ = head.step(partial(ours, "triton"), what, softcap)
            try:
                seconds = medians({which: step}, device, rounds=3)[which]
            except Exception as error:  # too large for this GPU
                say(f"{which} {tuple(config)}: {type(error).__name__}")
                continue
            say(f"{which} {tuple(config)}: {seconds * 1e3:.2f} ms for {what}")
            if seconds < fastest:
                fastest, winner = seconds, tried
        table[key] = winner if fastest < math.inf else best
        say(f"{which}: the fastest is {getattr(table[key], which)}")
    return table[key]


def _fits(tried: Configs) -> bool:
    """Whether the products read only whole tiles of logits, see ``fused_energy/triton/product.py``."""
    tiles = tried.logits, tried.logits_with_softcap
    return all(
        t.columns % tried.by_head.depth == 0
        and t.columns % tried.by_tokens.rows == 0
        and t.rows % tried.by_tokens.depth == 0
        and t.rows % tried.by_head.rows == 0
        for t in tiles
    )
