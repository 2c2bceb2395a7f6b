"""Tests of fused_energy: the definition, its properties, and the streaming implementation compared with it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_energy import EnergyNLL, linear_energy, streaming, tail_energy
from fused_energy import common as shared
from fused_energy.common import HeadOptions
from tests.fused_energy import numerics
from tests.fused_energy.numerics import Problem, assert_no_worse_than_plain, named_problems, normal

IMPLEMENTATIONS = ("reference", "streaming")


@pytest.fixture(autouse=True, scope="module")
def _small_tiles():
    """Tiles so small that every case below crosses several of them, in both directions."""
    saved = shared.SCRATCH_BYTES, streaming.VOCABULARY_TILE
    shared.SCRATCH_BYTES, streaming.VOCABULARY_TILE = 4 * 3 * 7, 7
    yield
    shared.SCRATCH_BYTES, streaming.VOCABULARY_TILE = saved


@st.composite
def problems(draw: st.DrawFn) -> dict:
    """Random shapes, options and float64 tensors."""
    n, h, v = draw(st.integers(0, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 23))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 100.0]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    targets = torch.randint(0, v, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < 0.3] = -100
    return {
        "hidden": normal(n, h) * scale,
        "weight": normal(v, h),
        "bias": normal(v) if draw(st.booleans()) else None,
        "targets": targets if draw(st.booleans()) else None,
        "upstream": (normal(n), normal(n)),
        "options": {
            "temperature": draw(st.sampled_from([0.3, 1.0, 2.5])),
            "logit_scale": draw(st.sampled_from([1.0, 0.25, -2.0])),
            "softcap": draw(st.sampled_from([None, 5.0])),
        },
    }


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, logit_scale: float, softcap: float | None
):
    z = logit_scale * hidden @ weight.T + (0 if bias is None else bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def run(problem: dict, implementation: str, needs: tuple[bool, bool, bool] = (True, True, True)) -> list[Tensor]:
    """Outputs and gradients of Σ upstream · output."""
    leaves = []
    for tensor, needed in zip((problem["hidden"], problem["weight"], problem["bias"]), needs, strict=True):
        leaves.append(None if tensor is None else tensor.clone().requires_grad_(needed))
    hidden, weight, bias = leaves
    result = linear_energy(hidden, weight, problem["targets"], bias=bias, implementation=implementation, **problem["options"])
    outputs = list(result) if isinstance(result, EnergyNLL) else [result]
    loss = sum((g * x).sum() for g, x in zip(problem["upstream"], outputs, strict=False))
    if loss.requires_grad:
        loss.backward()
    return outputs + [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]


@given(problems())
def test_energy_is_the_definition(problem):
    z = logits_of(problem["hidden"], problem["weight"], problem["bias"], **problem["options"])
    t = problem["options"]["temperature"]
    for implementation in IMPLEMENTATIONS:
        result = linear_energy(
            problem["hidden"],
            problem["weight"],
            problem["targets"],
            bias=problem["bias"],
            implementation=implementation,
            **problem["options"],
        )
        expected = -t * torch.log(torch.exp(z / t - z.amax(-1, keepdim=True) / t).sum(-1)) - z.amax(-1)
        if problem["targets"] is None:
            torch.testing.assert_close(result, expected)
            continue
        counted = problem["targets"] != -100
        torch.testing.assert_close(result.energy, expected.where(counted, 0.0))
        expected_nll = torch.nn.functional.cross_entropy(z, problem["targets"], reduction="none", ignore_index=-100)
        torch.testing.assert_close(result.nll, expected_nll)


@given(problems(), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_streaming_equals_reference_with_gradients(problem, needs):
    """Each subset of inputs that need a gradient takes a different path through the streaming backward."""
    expected, found = (run(problem, implementation, needs) for implementation in IMPLEMENTATIONS)
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@given(problems())
def test_bounds_and_invariances(problem):
    """−max z − T·log V ≤ E ≤ −max z; permuting the vocabulary or splitting the tokens changes nothing."""
    hidden, weight, bias, options = (problem[key] for key in ("hidden", "weight", "bias", "options"))
    energy = linear_energy(hidden, weight, bias=bias, **options)
    top = logits_of(hidden, weight, bias, **options).amax(-1)
    assert (energy <= -top + 1e-9).all()
    assert (energy >= -top - options["temperature"] * math.log(weight.shape[0]) - 1e-9).all()

    order = torch.randperm(weight.shape[0])
    permuted = linear_energy(hidden, weight[order], bias=None if bias is None else bias[order], **options)
    torch.testing.assert_close(permuted, energy)
    halves = [linear_energy(part, weight, bias=bias, **options) for part in hidden.split(3)]
    torch.testing.assert_close(torch.cat(halves), energy)


@given(problems(), st.floats(-50, 50))
def test_shifting_every_logit_shifts_the_energy(problem, shift):
    options = problem["options"] | {"softcap": None}
    bias = torch.zeros(problem["weight"].shape[0], dtype=torch.float64) if problem["bias"] is None else problem["bias"]
    before = linear_energy(problem["hidden"], problem["weight"], bias=bias, **options)
    after = linear_energy(problem["hidden"], problem["weight"], bias=bias + shift, **options)
    torch.testing.assert_close(after, before - shift, rtol=1e-9, atol=1e-9)


@given(problems())
def test_energy_gradient_is_minus_softmax(problem):
    """dE/dz = −softmax(z/T), checked with an identity head."""
    t = problem["options"]["temperature"]
    z = problem["hidden"].clone().requires_grad_()
    linear_energy(z, torch.eye(z.shape[-1], dtype=torch.float64), temperature=t).sum().backward()
    torch.testing.assert_close(z.grad, -torch.softmax(z.detach() / t, dim=-1))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_gradcheck(temperature, softcap, frozen_head):
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 4, dtype=torch.float64, requires_grad=not frozen_head)
    bias = torch.randn(17, dtype=torch.float64, requires_grad=not frozen_head)
    targets = torch.tensor([0, 16, -100, 8, 3])

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        options = {"bias": bias, "temperature": temperature, "logit_scale": 0.5, "softcap": softcap}
        both = linear_energy(hidden, weight, targets, implementation="streaming", **options)
        return (*both, linear_energy(hidden, weight, implementation="streaming", **options))

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", named_problems())
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_worse_than_plain_pytorch(implementation, name, dtype):
    assert_no_worse_than_plain(named_problems()[name].to(dtype), implementation)


@given(numerics.problems([torch.float32, torch.bfloat16, torch.float16], largest=(40, 40, 60)))
def test_random_problems_are_no_worse_than_plain_pytorch(problem):
    assert_no_worse_than_plain(problem, "streaming")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_vocabulary(dtype, monkeypatch):
    monkeypatch.setattr(shared, "SCRATCH_BYTES", 2**20)
    monkeypatch.setattr(streaming, "VOCABULARY_TILE", 8192)
    problem = Problem(normal(0, 3, 8), normal(1, 256_000, 8), None, torch.tensor([0, 255_999, 77_777]))
    assert_no_worse_than_plain(problem.to(dtype), "streaming")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_logits_stay_finite(implementation):
    """Logits of ±1e4, a one-hot row and a flat row; the first stretch of the vocabulary may be all −∞."""
    weight = torch.tensor([1e4] + [-1e4] * 20)[:, None].requires_grad_()
    hidden = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    energy, nll = linear_energy(hidden, weight, torch.tensor([0, 5, 3]), implementation=implementation)
    torch.testing.assert_close(energy, torch.tensor([-1e4, -1e4 - math.log(20), -math.log(21)]))
    (energy + nll).sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()

    bias = torch.full((21,), -math.inf)
    bias[-1] = 0.0
    masked = linear_energy(torch.ones(1, 1), torch.full((21, 1), -1e4), bias=bias, implementation=implementation)
    torch.testing.assert_close(masked, torch.tensor([1e4]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_reach_the_output_as_in_the_reference(value):
    hidden = torch.ones(3, 2)
    hidden[1, 0] = value
    weight = torch.cat([torch.ones(9, 2), torch.full((9, 2), 0.5)])
    results = [linear_energy(hidden, weight, torch.tensor([0, 1, 2]), implementation=name) for name in IMPLEMENTATIONS]
    for reference, found in zip(*results, strict=True):
        torch.testing.assert_close(found, reference, equal_nan=True)
    assert not torch.isfinite(results[1].energy[1])


def test_ignored_tokens_cost_and_leak_nothing():
    hidden = torch.full((2, 3), math.nan)
    hidden[1] = 1.0
    hidden.requires_grad_()
    weight = torch.ones(5, 3, requires_grad=True)
    energy, nll = linear_energy(hidden, weight, torch.tensor([-100, 2]))
    assert energy[0] == nll[0] == 0
    (energy + nll).sum().backward()
    assert (hidden.grad[0] == 0).all()
    assert torch.isfinite(weight.grad).all()
    energy, nll = linear_energy(hidden, weight, torch.tensor([-100, -100]))
    assert energy.tolist() == nll.tolist() == [0, 0]


def test_confident_target_keeps_its_energy_gradient():
    """p(target) = 1 in float32: the NLL's gradient is zero, the energy's is not (gradient filters are known to drop it)."""
    hidden = torch.tensor([[50.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    energy, nll = linear_energy(hidden, weight, torch.tensor([0]))
    (energy + nll).sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[-1.0]]))


def test_shapes_strides_and_autocast():
    hidden, weight = torch.randn(2, 3, 8)[..., ::2], torch.randn(4, 11).T
    expected = linear_energy(hidden.contiguous(), weight.contiguous(), implementation="reference")
    assert expected.shape == (2, 3)
    torch.testing.assert_close(linear_energy(hidden, weight), expected)
    assert linear_energy(hidden[:0], weight).shape == (0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = linear_energy(hidden.bfloat16(), weight)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, expected, rtol=0.05, atol=0.05)


@given(problems(), st.sampled_from(["top", "bottom"]), st.sampled_from(["zero", "none"]), st.floats(0.05, 1))
def test_tail_energy_is_the_definition(problem, side, fill, fraction):
    v, t = problem["weight"].shape[0], problem["options"]["temperature"]
    k = math.floor(fraction * v + 1e-9)
    if k < 1:
        with pytest.raises(ValueError, match="less than one logit"):
            tail_energy(problem["hidden"], problem["weight"], fraction, side)
        return
    z = logits_of(problem["hidden"], problem["weight"], problem["bias"], **problem["options"]) / t
    kept = z.sort(descending=side == "top").values[:, :k]
    if fill == "zero":
        kept = torch.cat([kept, torch.zeros(len(z), v - k, dtype=z.dtype)], dim=1)
    for implementation in IMPLEMENTATIONS:
        found = tail_energy(
            problem["hidden"],
            problem["weight"],
            fraction,
            side,
            fill=fill,
            bias=problem["bias"],
            implementation=implementation,
            **problem["options"],
        )
        torch.testing.assert_close(found, -t * torch.logsumexp(kept, -1))


def test_tails_read_the_head_once_for_many_tokens(monkeypatch):
    """A block of full rows of logits fills the memory that is allowed: with fewer rows, reading the head takes the time."""
    monkeypatch.setattr(shared, "SCRATCH_BYTES", 8 * 2**20)
    blocks = []
    tile_logits = streaming.tile_logits
    monkeypatch.setattr(streaming, "tile_logits", lambda h, *rest: blocks.append(len(h)) or tile_logits(h, *rest))
    tail_energy(normal(0, 100, 2), normal(1, 128_000, 2), 0.01, "top")
    assert blocks == [98, 2]


def test_tail_size_counts_as_in_decimal():
    """floor(0.29 · 100) is 29, although it is less in binary; and each logit outside the tail counts as exp(0) = 1."""
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.arange(100, dtype=torch.float64)[:, None]
    expected = -math.log(sum(math.exp(z) for z in range(29)) + 71)
    torch.testing.assert_close(tail_energy(hidden, weight, 0.29, "bottom").item(), expected)


@pytest.mark.parametrize("options", [HeadOptions(1.0, 1.0, None), HeadOptions(0.7, 0.5, 3.0)], ids=["plain", "everything"])
def test_scratch_is_bounded(options, monkeypatch):
    """No tensor is larger than the documented scratch or the gradients. (A custom op hides its tensors: call the functions.)"""
    monkeypatch.setattr(shared, "SCRATCH_BYTES", 2**15)
    monkeypatch.setattr(streaming, "VOCABULARY_TILE", 512)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                    largest = max(largest, x.untyped_storage().nbytes())
            return result

    hidden, weight, targets = normal(0, 300, 8), normal(1, 5000, 8), torch.arange(300)
    given = {x.untyped_storage().data_ptr() for x in (hidden, weight, targets)}
    with Watch():
        done = streaming.forward(hidden, weight, None, targets, options, True)
        upstream = torch.ones_like(done.energy), torch.ones(300)
        streaming.hidden_gradient(hidden, weight, targets, options, done, *upstream)
    assert largest <= max(2**15, done.weighted.nbytes)
    with Watch():
        streaming.head_gradient(hidden, weight, None, targets, options, done.energy, *upstream, (True, False))
    assert largest <= weight.nbytes
    with Watch():
        streaming.tail_energy(hidden, weight, 500, "top", "zero", None, options)
    assert largest <= shared.TAIL_TILES * 2**15


HIDDEN, WEIGHT = torch.ones(2, 3), torch.ones(5, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((HIDDEN, torch.ones(5, 4)), {}, ValueError, "H = 3 and weight .* cannot be multiplied"),
        ((HIDDEN, torch.ones(5)), {}, ValueError, r"must be \(V, H\)"),
        ((torch.tensor(1.0), WEIGHT), {}, ValueError, "hidden is a scalar"),
        ((HIDDEN, WEIGHT.double()), {}, TypeError, "hidden is torch.float32 and weight is torch.float64"),
        ((HIDDEN.long(), WEIGHT), {}, TypeError, "energies need floating point"),
        (([1.0], WEIGHT), {}, TypeError, "hidden is a list"),
        ((HIDDEN, WEIGHT), {"bias": torch.ones(4)}, ValueError, r"one value per vocabulary entry is needed: \(5,\)"),
        ((HIDDEN, WEIGHT, torch.tensor([0, 5])), {}, ValueError, "targets hold 5 .* out of range for a vocabulary of 5"),
        ((HIDDEN, WEIGHT, torch.tensor([0, -1])), {}, ValueError, "targets hold -1 .* out of range"),
        ((HIDDEN, WEIGHT, torch.tensor([0])), {}, ValueError, "one target per token"),
        ((HIDDEN, WEIGHT, torch.tensor([0.0, 1.0])), {}, TypeError, "int64 or int32"),
        ((HIDDEN, WEIGHT), {"temperature": 0.0}, ValueError, "finite T > 0"),
        ((HIDDEN, WEIGHT), {"softcap": -1.0}, ValueError, "finite c > 0"),
        ((HIDDEN, WEIGHT), {"logit_scale": math.nan}, ValueError, "logit_scale is nan"),
        ((torch.ones(2, 0), torch.ones(5, 0)), {}, ValueError, "a hidden size of 0 makes no logits"),
        ((HIDDEN.to(torch.float8_e4m3fn), WEIGHT), {}, TypeError, "hidden has dtype torch.float8_e4m3fn, but energies need"),
        ((HIDDEN, WEIGHT.to_sparse()), {}, TypeError, "weight has layout torch.sparse_coo"),
        ((HIDDEN.to("meta"), WEIGHT.to("meta")), {}, ValueError, "hidden is on the meta device"),
        ((HIDDEN, WEIGHT.to("meta"), torch.tensor([0, 1])), {}, ValueError, "weight is on the meta device"),
        (
            (HIDDEN, WEIGHT),
            {"temperature": torch.tensor(0.5)},
            TypeError,
            r"temperature is a Tensor.*pass float\(temperature\)",
        ),
        ((HIDDEN, WEIGHT), {"logit_scale": torch.nn.Parameter(torch.tensor(0.5))}, TypeError, "logit_scale is a Parameter"),
        ((HIDDEN, WEIGHT), {"softcap": torch.tensor(0.5)}, TypeError, "softcap is a Tensor"),
        ((HIDDEN, WEIGHT), {"temperature": None}, TypeError, "temperature is a NoneType"),
        ((HIDDEN, WEIGHT), {"temperature": True}, TypeError, "temperature is a bool"),
        ((HIDDEN, WEIGHT), {"implementation": "cuda"}, ValueError, "implementation is 'cuda', which does not exist"),
    ],
)
def test_bad_input_raises_a_clear_error(arguments, options, error, text):
    with pytest.raises(error, match=text):
        linear_energy(*arguments, **options)


@pytest.mark.parametrize(
    ("fraction", "side", "fill", "text"),
    [
        (0.1, "top", "zero", "fraction 0.1 of a vocabulary of 5 is less than one logit"),
        (1.5, "top", "zero", "fraction is 1.5"),
        (0.5, "upper", "zero", "side is 'upper'"),
        (0.5, "top", "one", "fill is 'one'"),
    ],
)
def test_bad_tails_raise_a_clear_error(fraction, side, fill, text):
    with pytest.raises(ValueError, match=text):
        tail_energy(HIDDEN, WEIGHT, fraction, side, fill=fill)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_targets_under_vmap_raise_the_error_of_vmap(implementation):
    with pytest.raises(NotImplementedError, match=r"under torch.vmap.*Pass them all in one call"):
        torch.vmap(lambda h, y: linear_energy(h, WEIGHT, y, implementation=implementation))(HIDDEN, torch.tensor([0, 1]))


def test_a_small_temperature_loses_no_digits():
    numerics.assert_exact_at_a_small_temperature("streaming", "cpu")


@pytest.mark.parametrize("scale", [1 / 16, -0.3])
def test_float16_logits_are_scaled_before_they_overflow(scale):
    """The products are beyond float16's 65504, the logits are not: Granite and Cohere scale them down."""
    hidden, weight = (50 * normal(seed, n, 64).sign().half() for seed, n in ((0, 5), (1, 50)))
    hidden[0], weight[0] = 50.0, 50.0
    expected, found = ([] for _ in range(2))
    for results, implementation, dtype in ((expected, "reference", torch.float64), (found, "streaming", torch.float16)):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        energy = linear_energy(h, w, logit_scale=scale, temperature=1e4, implementation=implementation)
        energy.sum().backward()
        results += [energy, h.grad, w.grad]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b.double(), a, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-5])
def test_small_float16_hidden_states_keep_their_digits_under_a_small_scale(scale):
    """They would lose them if they were scaled where nothing overflows."""
    hidden, weight = (0.02 * normal(0, 5, 64)).half(), normal(1, 50, 64).half()
    options = HeadOptions(1.0, scale, None)
    exact = shared.tile_logits(hidden.double(), weight.double(), None, options)
    found = shared.tile_logits(hidden, weight, None, options)
    assert (found - exact).abs().max() <= 1e-3 * exact.abs().max()


def test_gpu_products_of_half_precision_are_not_rounded():
    """On a GPU the matmul returns tiles of logits in float32; fake tensors check its signature without a GPU."""
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, 8, dtype=torch.bfloat16, device="cuda") for n in (4, 5))
        assert shared.tile_logits(hidden, weight, None, HeadOptions(1.0, 0.5, 3.0)).dtype == torch.float32


def test_hidden_states_are_not_copied():
    """A copy would be as large as what is stored for the backward, and would be kept until then, too."""
    hidden = normal(0, 3, 5, 8)
    seen = []
    original = streaming.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "forward", lambda h, *rest: seen.append(h.data_ptr()) or original(h, *rest))
        linear_energy(hidden, normal(1, 20, 8), implementation="streaming")
    assert seen == [hidden.data_ptr()]
