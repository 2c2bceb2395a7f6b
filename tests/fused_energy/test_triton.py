"""Tests that run the Triton kernels: on a GPU if there is one, otherwise in the interpreter, which needs its own process:

TRITON_INTERPRET=1 pytest tests/fused_energy/test_triton.py
"""

from __future__ import annotations

import json
import math
import mmap
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fused_energy import dispatch, linear_energy, tail_energy
from tests.fused_energy import numerics
from tests.fused_energy.numerics import IGNORED, Problem, assert_no_worse_than_plain, named_problems, normal

if not (dispatch.HAS_TRITON and (torch.cuda.is_available() or dispatch.TRITON_IS_INTERPRETED)):
    pytest.skip("needs triton and a GPU, or TRITON_INTERPRET=1 before Python starts", allow_module_level=True)

from fused_energy.triton import configs, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def bound(dtype: torch.dtype) -> float:
    """The interpreter truncates bfloat16 while a GPU rounds it, which doubles every such error."""
    return 4.0 if dispatch.TRITON_IS_INTERPRETED and dtype == torch.bfloat16 else 2.0


@pytest.fixture(autouse=True, scope="module")
def _several_of_everything_and_poison() -> Iterator[None]:
    """Tokens and vocabulary in several blocks, several tiles per program; uninitialized memory is NaN."""
    few = {"FORWARD_BYTES": 2**12, "BACKWARD_BYTES": 2**10, "PROGRAMS": 4, "TOKENS_AT_ONCE": 12, "LONGEST_ROW": 16, "STEP": 4}
    saved = {name: getattr(launch, name) for name in few}
    launch.__dict__.update(few)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    launch.__dict__.update(saved)


def run(problem: Problem) -> dict[str, torch.Tensor]:
    return problem.run(lambda *arguments, **options: linear_energy(*arguments, implementation="triton", **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", named_problems())
def test_no_worse_than_plain_pytorch(name, dtype):
    assert_no_worse_than_plain(named_problems()[name].to(dtype, DEVICE), "triton", bound(dtype))


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(numerics.problems(DTYPES, largest=(40, 40, 70)))
def test_random_problems_are_no_worse_than_plain_pytorch(problem):
    assert_no_worse_than_plain(problem.to(problem.hidden.dtype, DEVICE), "triton", bound(problem.hidden.dtype))


def test_large_vocabulary(monkeypatch):
    monkeypatch.setattr(configs, "TINY", configs.TINY._replace(columns=8192))
    monkeypatch.setattr(launch, "FORWARD_BYTES", 2**17)
    monkeypatch.setattr(launch, "LONGEST_ROW", 8192)
    large = Problem(normal(0, 2, 16), normal(1, 256_000, 16), None, torch.tensor([255_999, 77_777]), needs=(True, False, False))
    for needs in ((False, False, False), (True, False, False)):
        assert_no_worse_than_plain(replace(large, needs=needs).to(torch.float16, DEVICE), "triton")


@pytest.mark.parametrize("name", ["primes", "everything", "zero upstream"])
def test_two_runs_give_the_same_bits(name):
    first, second = (run(named_problems()[name].to(torch.bfloat16, DEVICE)) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_ignored_tokens_affect_nothing():
    """Ignored tokens and, in backward, tokens without upstream gradient may hold NaN: no sum includes their values."""
    clean = named_problems()["primes"].to(torch.float32, DEVICE)
    clean.targets[0] = IGNORED  # an empty slot points at token 0
    dirty = clean.to(torch.float32, DEVICE)
    ignored = (clean.targets == IGNORED).nonzero()[:, 0]
    dirty.hidden[ignored] = math.nan
    expected, found = run(clean), run(dirty)
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key

    # Tokens with a zero upstream gradient: their energy is NaN, but no gradient is.
    idle = torch.tensor([1, 3])
    clean.upstream[:, idle] = 0.0
    dirty.upstream, dirty.hidden = clean.upstream, clean.hidden.clone()
    dirty.hidden[idle] = math.nan
    expected, found = run(clean), run(dirty)
    assert found["energy"][idle].isnan().all()
    for key in ("dhidden", "dweight", "dbias"):
        assert torch.equal(expected[key], found[key]), key


@pytest.mark.parametrize("name", ["primes", "everything", "zero upstream"])
def test_in_a_cuda_graph_all_tokens_are_computed(name, monkeypatch):
    """The host cannot ask there how many tokens count. Those that do not may hold NaN, and still affect nothing."""
    problem = named_problems()[name].to(torch.float32, DEVICE)
    ignored = problem.targets == IGNORED
    expected = run(problem)
    monkeypatch.setattr(launch, "in_graph", lambda _: True)
    problem.hidden = problem.hidden.masked_fill(ignored[:, None], math.nan)
    found = run(problem)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)


def test_in_a_cuda_graph_a_token_without_upstream_gradient_may_have_any_energy(monkeypatch):
    problem = named_problems()["primes"].to(torch.float32, DEVICE)
    problem.targets, problem.bias = None, None
    problem.needs = (True, True, False)
    problem.weight.abs_()
    problem.hidden[2] = -100.0  # all logits are far below 0, so exp of the energy is infinite
    problem.upstream[:, 2] = 0.0
    expected = run(problem)
    monkeypatch.setattr(launch, "in_graph", lambda _: True)
    found = run(problem)
    for key in ("dhidden", "dweight"):
        assert found[key].isfinite().all()
        torch.testing.assert_close(found[key], expected[key], msg=key)


def test_the_setting_of_tf32_by_the_new_interface_is_read():
    """transformers sets it with tf32=True, and PyTorch then raises an error where the old one is read."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            backend.fp32_precision = precision
            assert configs.constants(configs.TINY, torch.device("cpu"))["PRECISION"] == precision
            assert (
                linear_energy(normal(0, 2, 4).to(DEVICE), normal(1, 9, 4).to(DEVICE), implementation="triton").isfinite().all()
            )
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_reach_the_output_as_in_the_reference(value, dtype):
    hidden = torch.ones(3, 2, dtype=dtype, device=DEVICE)
    hidden[1, 0] = value
    weight = torch.cat([torch.ones(9, 2), torch.full((9, 2), 0.5)]).to(DEVICE, dtype)
    targets = torch.tensor([0, 1, 2], device=DEVICE)
    for store in (False, True):
        leaf = hidden.clone().requires_grad_(store)
        reference, found = (linear_energy(leaf, weight, targets, implementation=name) for name in ("reference", "triton"))
        torch.testing.assert_close(found, reference, equal_nan=True)
        assert not torch.isfinite(found.energy[1])
    bias = torch.full((18,), -math.inf, device=DEVICE, dtype=dtype)
    bias[-1] = 0.0
    results = [linear_energy(hidden[:1], weight, bias=bias, implementation=name) for name in ("reference", "triton")]
    torch.testing.assert_close(*results)


def test_a_small_temperature_loses_no_digits():
    numerics.assert_exact_at_a_small_temperature("triton", DEVICE)


def test_a_target_out_of_range_makes_its_nll_nan(monkeypatch):
    """If labels are not checked beforehand, as on a GPU; also in the last, partly filled tile of the vocabulary."""
    monkeypatch.setattr("fused_energy.validation.check_labels", lambda *_: None)
    hidden, weight = normal(0, 5, 8).to(DEVICE), normal(1, 101, 8).to(DEVICE)
    for requires_grad in (False, True):
        targets = torch.tensor([100, 101, 127, 128, -1], device=DEVICE)
        energy, nll = linear_energy(hidden.requires_grad_(requires_grad), weight, targets, implementation="triton")
        assert nll.isnan().tolist() == [False, True, True, True, True]
        assert torch.isfinite(energy).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="needs memory that is reserved but not allocated, which a GPU does not have")
def test_offsets_past_two_to_the_31(monkeypatch):
    """2100 rows that lie 2**20 elements apart, in memory that is mostly never touched: 32-bit offsets would wrap around."""
    # After every launch the interpreter copies each storage onto itself, including untouched pages.
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: None)
    rows, apart, width = 2100, 2**20, 8
    untouched = mmap.mmap(-1, 2 * rows * apart)
    untouched.madvise(mmap.MADV_NOHUGEPAGE)
    sparse = torch.frombuffer(untouched, dtype=torch.float16)
    far = sparse.as_strided((rows, width), (apart, 1))
    far.copy_(normal(0, rows, width))
    near = normal(1, 5, width).half()
    last = torch.full((rows,), IGNORED)
    last[-3:] = torch.tensor([0, 4, 2])

    for hidden, weight, targets in ((far, near, last), (near, far, torch.tensor([2099, 2098, 0, 1, 2097]))):
        results = []
        for leaves in ((hidden, weight), (hidden.contiguous(), weight.contiguous())):
            h, w = (leaf.detach().requires_grad_() for leaf in leaves)
            energy, nll = linear_energy(h, w, targets, implementation="triton")
            (energy - 2 * nll).sum().backward()
            results.append((energy, nll, h.grad, w.grad))
        for strided, dense in zip(*results, strict=True):
            assert torch.equal(strided, dense)
        assert results[0][1].count_nonzero() == (targets != IGNORED).sum()


def test_a_named_implementation_never_falls_back():
    with pytest.raises(TypeError, match="hidden is torch.float64, but its kernels take float16, bfloat16 and float32"):
        linear_energy(normal(0, 2, 4).double(), normal(1, 9, 4).double(), implementation="triton")
    with pytest.raises(ValueError, match="tail_energy has no Triton kernel"):
        tail_energy(normal(0, 2, 4), normal(1, 9, 4), 0.5, "top", implementation="triton")


@pytest.mark.skipif(DEVICE != "cpu", reason="with a GPU, the script itself can be run")
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("probe", ("correctness: 0 failures in 12 of 12 cases", "kept logits: z", "the fastest is Config")),
        ("benchmark", ("correctness: 0 failures in 4 of 4 cases", "second: N, H, V", "cut-cross-entropy, exact")),
    ],
)
def test_gpu_script_rehearses(command, expected, tmp_path):
    """GPU time is expensive, so the script that uses it is first run from end to end, tiny and interpreted."""
    script = Path(__file__).parents[2] / "benches" / "gpu.py"
    arguments = [sys.executable, script, command, "--rehearse", "--out", tmp_path]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in expected:
        assert text in done.stdout
    results = json.loads((tmp_path / f"{command}-rehearsal.json").read_text())
    assert any(title.startswith(("Prototypes", "Time / matmul")) for title in results["tables"])


@pytest.mark.skipif(DEVICE != "cpu", reason="with a GPU, the script itself can be run")
def test_gpu_script_keeps_results_and_ends_in_time(tmp_path):
    """With a second for everything, what was measured by then is written, and what was not reached is named."""
    script = Path(__file__).parents[2] / "benches" / "gpu.py"
    arguments = [sys.executable, script, "probe", "--rehearse", "--out", tmp_path, "--limit", "1"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    results = json.loads((tmp_path / "probe-rehearsal.json").read_text())
    assert any("out of time" in note for note in results["notes"]), done.stdout + done.stderr
