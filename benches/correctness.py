"""Correctness of Triton on a real GPU against float64: at most twice the error of plain PyTorch in the same dtype.

The tests check the same in the interpreter; this part needs neither pytest nor hypothesis, and uses shapes and dtypes that only
a GPU can handle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_energy import linear_energy

BOUND = 2.0
SHAPES = [(257, 96, 1031), (1024, 1024, 32000), (515, 1000, 5003), (1, 64, 300)]
TINY_SHAPES = [(5, 16, 70), (3, 8, 40)]  # for a rehearsal
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "softcap": {"softcap": 5.0},
    "scale, temperature": {"logit_scale": 0.7, "temperature": 0.5},
    "all of them, bias": {"softcap": 5.0, "logit_scale": 1.3, "temperature": 2.0, "bias": True},
}
NAMES = ("energy", "nll", "d hidden", "d weight", "d bias")


class Case(NamedTuple):
    shape: tuple[int, int, int]  # N, H, V
    dtype: torch.dtype
    options: str  # a key of OPTIONS

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}, {self.options}"


def cases(rehearse: bool = False) -> list[Case]:
    """Every dtype with all options on the first shape, then on the second, and so on: the first dozen is a smoke test."""
    if rehearse:  # the interpreter truncates bfloat16
        return [
            Case(shape, dtype, name) for shape in TINY_SHAPES for dtype in (torch.float32, torch.float16) for name in OPTIONS
        ]
    dtypes = torch.bfloat16, torch.float16, torch.float32
    return [Case(shape, dtype, name) for shape in SHAPES for dtype in dtypes for name in OPTIONS]


def check(case: Case, device: str) -> tuple[float, list[str]]:
    """The worst error in multiples of that of plain PyTorch, and one line for each failure."""
    options = dict(OPTIONS[case.options])
    inputs = _inputs(*case.shape, case.dtype, device, options.pop("bias", False))
    exact = _run("reference", [x if x is None else x.double() for x in inputs[:3]], *inputs[3:], options)
    theirs = _run("plain", inputs[:3], *inputs[3:], options)
    found, again = (_run("triton", inputs[:3], *inputs[3:], options) for _ in range(2))
    worst, wrong = 0.0, []
    of_exponents = _rounding_of_exponents(*inputs, **options)
    for what, truth, plain, ours, same in zip(NAMES, exact, theirs, found, again, strict=False):
        error = _error(ours, truth)
        allowed = BOUND * max(_error(plain, truth), _rounding(ours, truth) + of_exponents.get(what, 0.0))
        worst = max(worst, error / allowed * BOUND)
        if not error <= allowed:  # also true for NaN
            wrong.append(f"{case}: {what} is {error:.3g} from float64, but only {allowed:.3g} is allowed")
        if not torch.equal(ours, same):
            wrong.append(f"{case}: {what} has different bits in a second run")
    return worst, wrong


def leaks(device: str, rehearse: bool = False) -> list[str]:
    """Tokens without a target or without an upstream gradient must not affect the result, even if they hold NaN."""
    shape = (TINY_SHAPES if rehearse else SHAPES)[0]
    wrong = []
    hidden, weight, _, targets, upstream = _inputs(*shape, torch.float16, device, False)
    ignored = targets == -100
    poisoned = hidden.masked_fill(ignored[:, None], torch.nan)
    clean, dirty = (_run("triton", [x, weight, None], targets, upstream, {}) for x in (hidden, poisoned))
    if not all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True)):
        wrong.append("ignored tokens that hold NaN change the result")
    without = _run("triton", [hidden, weight, None], targets, torch.zeros_like(upstream), {})
    if any(x.any() for x in without[2:]):
        wrong.append("upstream gradients of zero give a nonzero gradient")
    return wrong


def _inputs(n: int, h: int, v: int, dtype: torch.dtype, device: str, bias: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(n + h + v)
    hidden = torch.randn(n, h, generator=generator).to(device, dtype)
    weight = (torch.randn(v, h, generator=generator) * 2 / h**0.5).to(device, dtype)
    targets = torch.randint(0, v, (n,), generator=generator).where(torch.arange(n) % 5 != 4, -100).to(device)
    upstream = torch.randn(2, n, generator=generator).to(device)
    upstream[:, n // 2 : n // 2 + n // 4] = 0.0
    return hidden, weight, torch.randn(v, generator=generator).to(device, dtype) if bias else None, targets, upstream


def _run(implementation: str, tensors: list[Tensor | None], targets: Tensor, upstream: Tensor, options: Any) -> list[Tensor]:
    """Energy, NLL, and the gradients of Σ upstream · output with respect to hidden, weight and bias."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    hidden, weight, bias = leaves
    assert hidden is not None
    assert weight is not None
    if implementation == "plain":
        energy, nll = _plain(hidden, weight, bias, targets, **options)
    else:
        energy, nll = linear_energy(hidden, weight, targets, bias=bias, implementation=implementation, **options)  # type: ignore
    (upstream[0] * energy + upstream[1] * nll).sum().backward()
    return [energy.detach(), nll.detach(), *(x.grad for x in leaves if x is not None and x.grad is not None)]


def _plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What people write today: logits in the dtype of the model, then float32."""
    z = (hidden @ weight.T) * logit_scale
    z = z if bias is None else z + bias
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)).float()
    counted = targets != -100
    energy = -temperature * torch.logsumexp(z / temperature, dim=-1)
    nll = torch.logsumexp(z, dim=-1) - z.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return energy.where(counted, 0.0), nll.where(counted, 0.0)


def _rounding_of_exponents(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, upstream: Tensor,
    temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """What rounding the exponent (z + E)/T may change in the gradients, where z and E are float32 sums of |h|·|W| terms.

    Plain PyTorch rounds as much, but uses the same logits in forward and backward, so that its errors often cancel.
    """
    terms = float((hidden.double().abs() @ weight.double().abs().T).max()) * abs(logit_scale)
    relative = torch.finfo(torch.float32).eps * terms / temperature * float(upstream.abs().max())
    largest = {"d hidden": weight, "d weight": hidden, "d bias": torch.ones(1)}
    return {what: relative * float(x.double().abs().max()) for what, x in largest.items()}


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max())


def _rounding(found: Tensor, truth: Tensor) -> float:
    """Half a unit in the last place of the largest number, and a few for sums, because plain PyTorch may be exact by luck."""
    return 4 * torch.finfo(torch.float32).eps * max(1.0, float(truth.abs().max())) + (
        torch.finfo(found.dtype).eps / 4 * float(truth.abs().max())
    )
