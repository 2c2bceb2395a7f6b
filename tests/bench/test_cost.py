"""What a trial costs is its own, not that of trials before it in the same process."""

from __future__ import annotations

import sys

import pytest
import torch

from eua.bench.cost import measured

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="is about the memory of a process on Linux")
def test_memory_that_an_earlier_block_has_freed_does_not_count():
    def blocks(count: int) -> list[torch.Tensor]:
        return [torch.ones(MIB // 64) for _ in range(count)]  # of 64 KiB, which the C library does not return by itself

    with measured() as little:
        kept = blocks(1)
    with measured() as much:
        freed = blocks(8192)
        kept += blocks(1)  # above all that is freed
        del freed
    with measured() as again:
        kept += blocks(1)
    assert much.peak_bytes - little.peak_bytes > 400 * MIB
    assert abs(again.peak_bytes - little.peak_bytes) < 50 * MIB
    assert again.seconds > 0
