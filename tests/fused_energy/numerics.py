"""Test problems for the energy op, and the error bound that every implementation must keep.

An implementation may be at most twice as far from float64 as plain PyTorch in the same dtype, on the same input. Added to that
is the rounding of a result, because plain PyTorch may be exact by luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fused_energy import EnergyNLL, linear_energy

IGNORED = -100


@dataclass
class Problem:
    """Tensors, options and upstream gradients, and which of hidden, weight and bias need a gradient."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    targets: Tensor | None = None  # (N,)
    options: dict[str, Any] = field(default_factory=dict)
    needs: tuple[bool, bool, bool] = (True, True, True)
    upstream: Tensor | None = None  # (2, N), of energy and NLL

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Problem:
        hidden, weight, bias = (None if x is None else copy_of(x, dtype, device) for x in (self.hidden, self.weight, self.bias))
        targets = None if self.targets is None else self.targets.to(device)
        return replace(self, hidden=hidden, weight=weight, bias=bias, targets=targets)

    def run(self, function: Callable[..., Any]) -> dict[str, Tensor]:
        """Outputs, and gradients of Σ upstream · output."""
        tensors = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        leaves = {
            name: None if x is None else copy_of(x, x.dtype, x.device).requires_grad_(needed)
            for (name, x), needed in zip(tensors.items(), self.needs, strict=True)
        }
        result = function(leaves["hidden"], leaves["weight"], self.targets, bias=leaves["bias"], **self.options)
        outputs = list(result) if isinstance(result, tuple) else [result]
        upstream = torch.ones(2, *outputs[0].shape) if self.upstream is None else self.upstream
        loss = sum((g.to(x) * x).sum() for g, x in zip(upstream.to(self.hidden.device), outputs, strict=False))
        if loss.requires_grad:
            loss.backward()
        named = dict(zip(("energy", "nll"), (x.detach() for x in outputs), strict=False))
        return named | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}


def copy_of(x: Tensor, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A copy with the strides of ``x``, which ``to`` and ``clone`` do not always keep."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    bias: Tensor | None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Any:
    """What people write today: logits in the dtype of the model, then energy and NLL by definition in float32."""
    z = (hidden @ weight.T) * logit_scale
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z if z.dtype == torch.float64 else z.float()
    energy = -temperature * torch.logsumexp(z / temperature, dim=-1)
    if targets is None:
        return energy
    counted = targets != IGNORED
    nll = torch.logsumexp(z, dim=-1) - z.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return EnergyNLL(energy.where(counted, 0.0), nll.where(counted, 0.0))


def assert_no_worse_than_plain(problem: Problem, implementation: str, bound: float = 2.0) -> None:
    """At most ``bound`` times the error of plain PyTorch, for energy, NLL and every gradient."""

    def ours(*arguments: Any, **options: Any) -> Any:
        return linear_energy(*arguments, implementation=implementation, **options)

    device = str(problem.hidden.device)
    exact, theirs, found = (
        x.run(f) for x, f in ((problem.to(torch.float64, device), plain), (problem, plain), (problem, ours))
    )
    assert exact.keys() == found.keys()
    z_scale = max(1.0, exact["energy"].abs().max().item()) if len(problem.hidden) else 1.0
    # On a CPU, PyTorch's half-precision matmul returns half precision: streaming's logits are rounded like the plain ones.
    half_on_cpu = implementation == "streaming" and device == "cpu" and problem.hidden.dtype != torch.float32
    rounded_logits = torch.finfo(problem.hidden.dtype).eps / 2 * z_scale if half_on_cpu else 0.0
    # The rounding of float32 sums scales with their terms, which may cancel: |h|·|W|ᵀ.
    terms = problem.hidden.double().abs() @ problem.weight.double().abs().T * abs(problem.options.get("logit_scale", 1.0))
    sum_scale = max(z_scale, terms.max().item() if terms.numel() else 0.0)
    # A probability is exp(z/T − lse): both are rounded, and z is computed twice, not always in the same order of summation.
    rounded_exponents = 4 * torch.finfo(torch.float32).eps / 2 * sum_scale / problem.options.get("temperature", 1.0)
    upstream = 1.0 if problem.upstream is None or not len(problem.hidden) else problem.upstream.abs().max().item()
    largest = {
        "energy": sum_scale,
        "nll": sum_scale,
        "dhidden": upstream * problem.weight.double().abs().max().item(),
        "dweight": upstream * (problem.hidden.double().abs().max().item() if len(problem.hidden) else 0.0),
        "dbias": upstream,
    }
    for name, truth in exact.items():
        assert found[name].shape == truth.shape, name
        if not truth.numel():
            continue
        error, of_plain = ((x[name].double() - truth).abs().max().item() for x in (found, theirs))
        rounding = bound * torch.finfo(found[name].dtype).eps / 4 * truth.abs().max().item()
        of_logits = rounded_logits if name in ("energy", "nll") else (rounded_logits + rounded_exponents) * largest[name]
        slack = rounding + 4 * torch.finfo(torch.float32).eps * largest[name] + of_logits
        assert error <= bound * of_plain + slack, (
            f"{name}: {error:.3g} from float64, plain PyTorch {of_plain:.3g}, slack {slack:.3g}"
        )


def assert_exact_at_a_small_temperature(implementation: str, device: str) -> None:
    """Every token has all of its probability on one word, so the head's gradient is minus the hidden states, whatever T is.

    ``exp(z/T − logsumexp(z/T))`` rounds two numbers of the size of z/T, so its error grows as T shrinks.
    """
    hidden = (torch.eye(8) * (163 / 16 + torch.arange(8.0))).to(device)
    weight = torch.eye(40, 8, device=device).requires_grad_()
    energy = linear_energy(hidden, weight, temperature=0.007, implementation=implementation)  # type: ignore[call-overload]
    energy.sum().backward()
    expected = torch.zeros_like(weight)
    expected[:8] = -hidden
    assert torch.equal(weight.grad, expected), implementation
    assert torch.equal(energy, -hidden.diagonal())


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def some_targets(seed: int, tokens: int, vocabulary: int) -> Tensor:
    """Random targets, every fifth of them ignored."""
    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    return targets.where(torch.arange(tokens) % 5 != 4, IGNORED)


def named_problems() -> dict[str, Problem]:
    """Shapes and values that are known to cause trouble."""

    def problem(n: int, h: int, v: int, with_bias: bool = False, **options: Any) -> Problem:
        return Problem(
            normal(0, n, h),
            normal(1, v, h, scale=h**-0.5),
            normal(2, v) if with_bias else None,
            some_targets(3, n, v),
            options,
            upstream=normal(4, 2, n),
        )

    cases = {
        "one token": problem(1, 16, 40),
        "one word": problem(9, 16, 1),
        "one dimension": problem(9, 1, 40),
        "primes": problem(31, 37, 101, with_bias=True),
        "softcap": problem(31, 37, 101, softcap=3.0),
        "temperature": problem(31, 37, 101, temperature=0.7),
        "scaled head": problem(31, 37, 101, logit_scale=1 / 16),
        "everything": problem(31, 37, 101, with_bias=True, temperature=2.5, logit_scale=-2.0, softcap=4.0),
        "energy alone": replace(problem(31, 37, 101), targets=None),
        "no tokens": problem(0, 16, 40, with_bias=True),
        "frozen head": replace(problem(31, 37, 101, with_bias=True), needs=(True, False, False)),
        "frozen hidden states": replace(problem(31, 37, 101, with_bias=True), needs=(False, True, True)),
        "bias alone": replace(problem(31, 37, 101, with_bias=True), needs=(False, False, True)),
        "nothing to train": replace(problem(31, 37, 101), needs=(False, False, False)),
        "all ignored": replace(problem(9, 16, 40, with_bias=True), targets=torch.full((9,), IGNORED)),
    }
    cases["everything, frozen hidden states"] = replace(cases["everything"], needs=(False, True, True))
    cases["flat rows"] = replace(problem(31, 37, 101), weight=torch.zeros(101, 37))
    # Every row has all of its probability on one word; for half of the tokens that word is the target, so that the gradient of
    # the NLL is almost zero while the energy has its full gradient.
    rows = torch.eye(40)
    one_hot = replace(problem(20, 40, 40), weight=rows, hidden=20 * rows[:20])
    cases["one-hot rows"] = replace(one_hot, targets=torch.arange(20).where(torch.arange(20) % 2 == 0, 39))
    cases["confident targets, NLL alone"] = replace(
        cases["one-hot rows"],
        hidden=9 * rows[:20] + normal(5, 20, 40),
        targets=torch.arange(20),
        upstream=torch.stack([torch.zeros(20), normal(4, 20)]),
    )
    # Integers, whose products are exact: this case tests the range, not the order in which a product is summed.
    cases["logits of ±1e4"] = replace(
        problem(31, 37, 101), weight=100 * normal(5, 101, 37).sign(), hidden=(16 * normal(0, 31, 37)).round()
    )
    gaps = torch.randperm(31, generator=torch.Generator().manual_seed(6)) % 3 == 0
    cases["zero upstream"] = replace(problem(31, 37, 101, with_bias=True), upstream=normal(4, 2, 31).masked_fill(gaps, 0.0))
    return cases


@st.composite
def problems(draw: st.DrawFn, dtypes: list[torch.dtype], largest: tuple[int, int, int]) -> Problem:
    """Random shapes, strides, dtypes, options, and sets of tensors that need a gradient."""
    n, h, v = draw(st.integers(0, largest[0])), draw(st.integers(1, largest[1])), draw(st.integers(1, largest[2]))
    seed, scale = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.1, 1.0, 10.0]))

    def strided(seed: int, rows: int, columns: int) -> Tensor:
        layout = draw(st.sampled_from(["contiguous", "transposed", "every other"]))
        if layout == "transposed":
            return normal(seed, columns, rows).T
        return normal(seed, rows, columns) if layout == "contiguous" else normal(seed, rows, 2 * columns)[:, ::2]

    upstream = normal(seed + 4, 2, n)
    if draw(st.booleans()):
        upstream = upstream.masked_fill(normal(seed + 5, n) < 0, 0.0)
    problem = Problem(
        strided(seed, n, h) * scale,
        strided(seed + 1, v, h),
        draw(st.sampled_from([None, normal(seed + 2, v), normal(seed + 2, 2 * v)[::2]])),
        some_targets(seed + 3, n, v) if draw(st.booleans()) else None,
        {
            "temperature": draw(st.sampled_from([0.3, 1.0, 2.5])),
            "logit_scale": draw(st.sampled_from([1.0, 0.25, -2.0])),
            "softcap": draw(st.sampled_from([None, 5.0])),
        },
        (draw(st.booleans()), draw(st.booleans()), draw(st.booleans())),
        upstream,
    )
    return problem.to(draw(st.sampled_from(dtypes)))
