"""Benchmark of energy and NLL from hidden states: time in multiples of the bare matmul ``h @ Wᵀ``, and peak memory.

    pytest benches --benchmark-only

All peers do equal work in one process. The matmul is timed before each round, so that both see the same state of the machine.
Figures are ratios of medians. Absolute times on a CPU are not worth quoting.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE
from heads import FORWARD, FROZEN, TRAINABLE, WHATS, Head, random_head, trained_head
from measure import peak_bytes, seconds
from peers import peers
from report import Report

from fused_energy import linear_energy

N, H, V = (8192, 4096, 128256) if DEVICE == "cuda" else (1024, 1024, 32000)
MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATES = {"random": random_head, "trained": trained_head}
PEERS = {peer.name: peer for peer in peers(DEVICE)}
FIRST_TIMES: dict[str, float] = {}  # by implementation: seconds per token and vocabulary entry
IMPLEMENTATIONS = ["streaming", "triton"] if DEVICE == "cuda" else ["streaming"]


@pytest.fixture(scope="module")
def head() -> Callable[[str, str], Head]:
    """Heads of the shape above, one at a time: they are large."""
    held: dict[tuple[str, str], Head] = {}

    def get(states: str, dtype: str) -> Head:
        if (states, dtype) not in held:
            held.clear()
            held[states, dtype] = STATES[states](N, H, V, DTYPES[dtype], DEVICE)
        return held[states, dtype]

    return get


def multiple_of_matmul(benchmark: Any, head: Head, step: Callable[..., Any], prepare: Callable[[], tuple] = tuple) -> float:
    """Median time divided by the median time of the matmul before it. ``prepare`` makes the arguments of each run, untimed."""
    matmul = []

    def setup() -> tuple[tuple, dict]:
        arguments = prepare()
        matmul.append(seconds(head.matmul, DEVICE))
        return arguments, {}

    def timed(*arguments: Any) -> None:
        step(*arguments)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    warm_up = seconds(lambda: timed(*prepare()), DEVICE)
    benchmark.pedantic(timed, setup=setup, rounds=5 if warm_up < 1.0 else 3 if warm_up < 2.0 else 1)
    return benchmark.stats.stats.median / statistics.median(matmul)


CASES = [
    (states, dtype, peer, what)
    for states, dtype in (("random", "float32"), ("random", "bfloat16"), ("trained", "bfloat16"))
    for peer in PEERS
    for what in WHATS
    # If the sparsity of the softmax makes no difference, random hidden states are enough.
    if states == "random" or (what != FORWARD and peer in ("streaming", "triton", "plain"))
]


@pytest.mark.parametrize(("states", "dtype", "peer", "what"), CASES)
def test_peers(benchmark, report: Report, head, states, dtype, peer, what):
    tables = [f"{x}, {states} hidden states, {dtype}, N, H, V = {N}, {H}, {V}" for x in ("Time / matmul", "Peak MiB")]
    if PEERS[peer].run is None:
        for table in tables:
            report.add(table, peer, what, PEERS[peer].reason)
        pytest.skip(PEERS[peer].reason)
    inputs = head(states, dtype)
    step, leaves = inputs.step(PEERS[peer].run, what)
    report.add(tables[0], peer, what, multiple_of_matmul(benchmark, inputs, step))
    report.add(tables[1], peer, what, peak_bytes(step, leaves, DEVICE) / MIB)
    if states == "trained":
        note = f"The trained head's softmax has a mean entropy of {inputs.entropy():.1f} nats, see heads.py."
        report.notes = [note]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.0])
def test_ignored_tokens(benchmark, report: Report, head, implementation, share):
    """Forward and backward if only a share of the tokens has a target."""
    inputs = head("random", "bfloat16")
    targets = torch.where(torch.rand(N, device=DEVICE) < share, inputs.targets, -100)
    step, _ = inputs._replace(targets=targets).step(PEERS[implementation].run, TRAINABLE)
    table = "Time / matmul of all tokens, by share of active tokens, trainable head, bfloat16"
    row = f"{implementation}: {TRAINABLE}, the others ignored"
    report.add(table, row, f"{share:.0%}".rjust(6), multiple_of_matmul(benchmark, inputs, step))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.0])
def test_tokens_without_upstream_gradient(benchmark, report: Report, head, implementation, share):
    """Backward alone if only a share of the tokens has a nonzero upstream gradient."""
    inputs = head("random", "bfloat16")
    hidden, weight = (x.detach().requires_grad_() for x in inputs[:2])
    upstream = (torch.rand(N, device=DEVICE) < share).float()

    def forward() -> tuple:
        hidden.grad = weight.grad = None
        return (linear_energy(hidden, weight, implementation=implementation),)

    table = "Time / matmul of all tokens, by share of active tokens, trainable head, bfloat16"
    row = f"{implementation}: backward, the others with an upstream gradient of 0"
    ratio = multiple_of_matmul(benchmark, inputs, lambda energy: energy.backward(upstream), forward)
    report.add(table, row, f"{share:.0%}".rjust(6), ratio)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n", "v"), [(256, 8192), (256, 32768), (256, 131072), (512, 32768), (1024, 32768)])
def test_growth(benchmark, report: Report, implementation, n, v):
    """Time per token and vocabulary entry relative to the first row, which is 1 if time grows linearly; and peak memory."""
    inputs = random_head(n, 256, v, torch.float32, DEVICE)
    step, leaves = inputs.step(PEERS[implementation].run, TRAINABLE)
    table, row = f"Growth of {implementation}: {TRAINABLE}, float32, H = 256", f"N = {n:4}, V = {v:6}"
    report.add(table, row, "time / matmul", multiple_of_matmul(benchmark, inputs, step))
    FIRST_TIMES.setdefault(implementation, benchmark.stats.stats.median / (n * v))
    relative = benchmark.stats.stats.median / (n * v) / FIRST_TIMES[implementation]
    report.add(table, row, "time / (N V), relative to the first", relative)
    report.add(table, row, "peak MiB", peak_bytes(step, leaves, DEVICE) / MIB)


@pytest.mark.parametrize("n", [1024, 8192])
@pytest.mark.parametrize("what", [FROZEN, TRAINABLE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch(benchmark, report: Report, dtype, what, n):
    """Peak memory of streaming; it stores one tensor (N, H) in the dtype of the hidden states for the backward."""
    inputs = random_head(n, 1024, 32000, DTYPES[dtype], DEVICE)
    step, leaves = inputs.step(PEERS["streaming"].run, what)
    peak = benchmark.pedantic(peak_bytes, args=(step, leaves, DEVICE), rounds=1)
    table, row = "Peak MiB of streaming, H, V = 1024, 32000", f"N = {n}, {dtype}, {what}"
    report.add(table, row, "beyond inputs, outputs and gradients", peak / MIB)
    report.add(table, row, "and beyond what is stored for backward", (peak - inputs.hidden.nbytes) / MIB)
