"""Times launch settings of the Triton kernels, one kind of tile at a time, and gives the fastest as a Python literal."""

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

# Which loss is slowed by which tile; ``logits_with_softcap`` tiles are those of a softcap.
WORK = {
    "logits": (FORWARD, None),
    "logits_with_softcap": (FORWARD, 30.0),
    "by_head": (FROZEN, None),
    "by_tokens": (TRAINABLE, None),
}


def candidates(which: str, rehearse: bool) -> Iterator[Config]:
    """Tiles that tensor cores like. Those that do not fit a GPU fail when compiled, and are passed over."""
    if rehearse:
        tiny = configs.TINY.logits
        yield from (tiny, tiny._replace(group=4))
        return
    sizes = [(128, 256, 64), (128, 128, 64), (256, 128, 64), (64, 256, 64), (128, 128, 128)]
    for (rows, columns, depth), warps, stages, group in product(sizes, (4, 8), (3, 4), (8, 16)):
        if rows * columns < 128 * 256 or warps == 8:  # 4 warps have no registers for a large tile
            yield Config(rows, columns, depth, warps, stages, group)


def tune(head: Head, table: dict[str, Configs], key: str, until: float, rehearse: bool, say: Callable[[str], None]) -> Configs:
    """The fastest of each kind for these inputs, found one after the other; ``table[key]`` is set to it.

    ``until`` (``time.monotonic``) ends the search, each kind having its share of the time: what was not tried is left as it is.
    """
    device = head.hidden.device.type
    for position, (which, (what, softcap)) in enumerate(WORK.items()):
        now = time.monotonic()
        ends = now + (until - now) / (len(WORK) - position)
        best, fastest = table[key], math.inf
        for config in (getattr(best, which), *candidates(which, rehearse)):
            if time.monotonic() > ends:
                say(f"{which}: out of time, the rest was not tried")
                break
            tried = best._replace(**{which: config})
            if not _fits(tried):
                continue
            table[key] = tried
            step, _ = head.step(partial(ours, "triton"), what, softcap)
            try:
                seconds = medians({which: step}, device, rounds=3)[which]
            except Exception as error:  # too large for this GPU: that is what is being found out
                say(f"{which} {tuple(config)}: {type(error).__name__}")
                continue
            say(f"{which} {tuple(config)}: {seconds * 1e3:.2f} ms for {what}")
            if seconds < fastest:
                fastest, winner = seconds, tried
        table[key] = winner if fastest < math.inf else best
        say(f"{which}: the fastest is {getattr(table[key], which)}")
    return table[key]


def _fits(tried: Configs) -> bool:
    """What the products read is padded to tiles of logits, see ``fused_energy/triton/product.py``."""
    tiles = tried.logits, tried.logits_with_softcap
    return all(
        t.columns % tried.by_head.depth == 0
        and t.columns % tried.by_tokens.rows == 0
        and t.rows % tried.by_tokens.depth == 0
        and t.rows % tried.by_head.rows == 0
        for t in tiles
    )
