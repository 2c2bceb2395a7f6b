"""Medians of time, and peak memory beyond inputs, outputs and gradients, on a CPU or a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[], Any]  # one run of the work; what it returns is its output


def seconds(step: Step, device: str) -> float:
    """Seconds of one run. On a GPU, between two events, so that delays of the host only count if the device waits for them."""
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def medians(steps: Mapping[str, Step], device: str, rounds: int = 5) -> dict[str, float]:
    """Median seconds of each step. Every round runs all steps once, so that all see the same state of the machine."""
    for step in steps.values():
        step()
    times = [{name: seconds(step, device) for name, step in steps.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in steps}


class Peak(NamedTuple):
    """Bytes that one run allocates."""

    given_back: int  # peak of the blocks that are freed by the end of the run: without its output and the gradients
    whole: int  # peak of all blocks, possibly at another time
    left: int  # blocks that are not freed


def peak_bytes(step: Step, gradients_of: list[Tensor], device: str) -> int:
    """Peak memory of one run, without earlier allocations, its output and the gradients."""
    return peak(step, gradients_of, device).given_back


def peak(step: Step, gradients_of: list[Tensor], device: str) -> Peak:
    """Peak memory of one run, and what it leaves allocated.

    The figures are exact: they come from the allocator's record of every block. Blocks that still exist at the end never count
    in ``given_back``. Run the step once before, so that memory that is allocated on first use and kept does not count.
    """
    for tensor in gradients_of:
        tensor.grad = None
    blocks = _blocks_on_gpu(step) if device == "cuda" else _blocks_on_cpu(step)
    for tensor in gradients_of:
        tensor.grad = None
    return _peak(blocks)


def _peak(events: list[tuple[int, int]]) -> Peak:
    """Compute the peaks from (address, bytes); bytes < 0 free a block."""
    freed_at: dict[int, list[int]] = {}
    for when, (address, size) in enumerate(events):
        if size < 0:
            freed_at.setdefault(address, []).append(when)
    whole = given_back = most = most_given_back = 0
    held: dict[int, bool] = {}  # by address: whether the block is freed later
    for when, (address, size) in enumerate(events):
        if size > 0:
            held[address] = any(later > when for later in freed_at.get(address, ()))
        elif address not in held:  # allocated before
            continue
        whole += size
        if held[address] if size > 0 else held.pop(address):
            given_back += size
        most, most_given_back = max(most, whole), max(most_given_back, given_back)
    return Peak(most_given_back, most, left=whole)


def _blocks_on_cpu(step: Step) -> list[tuple[int, int]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = step()
    del kept
    found = []

    def walk(events: list[Any]) -> Iterator[Any]:
        for event in events:
            yield event
            yield from walk(event.children)

    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    for event in walk(results.experimental_event_tree()):
        if event.tag == torch._C._profiler._EventType.Allocation and event.extra_fields.device.type == "cpu":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda one: one[0])]


def _blocks_on_gpu(step: Step) -> list[tuple[int, int]]:
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python", context=None)
    before = len(_trace())  # some versions keep earlier records
    kept = step()
    torch.cuda.synchronize()
    trace = _trace()[before:]
    torch.cuda.memory._record_memory_history(enabled=None)
    del kept
    sign = {"alloc": 1, "free_requested": -1}
    return [(entry["addr"], sign[entry["action"]] * entry["size"]) for entry in trace if entry["action"] in sign]


def _trace() -> list[dict[str, Any]]:
    return torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]


def check(device: str) -> None:
    """Check the measurement with blocks of known sizes. Raise an error if it is off, so that no wrong figure is printed."""
    mib = 2**20
    leaf = torch.zeros(mib, dtype=torch.uint8, device=device)

    def step() -> Tensor:
        stays = torch.zeros(3 * mib, dtype=torch.uint8, device=device)
        first = torch.zeros(8 * mib, dtype=torch.uint8, device=device)
        second = torch.zeros(4 * mib, dtype=torch.uint8, device=device)
        del first
        third = torch.zeros(6 * mib, dtype=torch.uint8, device=device)
        del second, third
        return stays

    for found, expected in zip(peak(step, [leaf], device), Peak(12, 15, 3), strict=True):
        if not 0 <= found - expected * mib <= 4096:
            raise RuntimeError(
                f"{expected} MiB were measured as {found / mib:.3f} MiB: this PyTorch records memory differently."
            )
