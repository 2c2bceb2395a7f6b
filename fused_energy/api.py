"""The public functions: validate, then hand to exactly one implementation."""

from __future__ import annotations

from types import ModuleType
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fused_energy import validation
from fused_energy.shared import HeadOptions, accumulation_dtype

Implementation = Literal["auto", "reference", "streaming"]


class EnergyNLL(NamedTuple):
    """Per-token energy and negative log-likelihood, both (...,), in nats."""

    energy: Tensor
    nll: Tensor


@overload
def linear_energy(
    hidden: Tensor,
    weight: Tensor,
    targets: None = None,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    implementation: Implementation = ...,
) -> Tensor: ...


@overload
def linear_energy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    implementation: Implementation = ...,
) -> EnergyNLL: ...


def linear_energy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor | None = None,  # (...,)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    implementation: Implementation = "auto",
) -> Tensor | EnergyNLL:
    """Energy of every token, and with ``targets`` its negative log-likelihood from the same pass.

    With logits ``z = softcap(logit_scale · (h Wᵀ) + b)``, where ``softcap(x) = c · tanh(x/c)``:

    - ``energy = −T · logsumexp(z / T)`` (LeCun et al. 2006; Liu et al. 2020, energy-based out-of-distribution detection);
    - ``nll = logsumexp(z) − z_target``, always at temperature 1.

    Both are differentiable in hidden, weight and bias, with any upstream gradient, on their own or together.

    Args:
        hidden: hidden states (..., H), float16, bfloat16, float32 or float64.
        weight: the head's matrix (V, H), of the same dtype (under ``torch.autocast`` both are cast as a matmul would).
        targets: token ids (...,), int64 or int32. Where a target is ``ignore_index``, energy and NLL are 0 and carry
            no gradient, whatever the hidden state holds.
        bias: the head's bias (V,).
        temperature: T > 0, of the energy alone.
        logit_scale: multiplies the projection, before the bias.
        softcap: c > 0, or None.
        ignore_index: the target that marks a token to leave out.
        implementation: ``"reference"`` materializes the logits and is the definition; ``"streaming"`` holds a bounded
            tile of them; ``"auto"`` picks streaming. A named one is used or raises; it never falls back.

    Returns:
        energy (...,), or ``EnergyNLL(energy, nll)`` with targets; nats; float32, or float64 for float64 input.

    Raises:
        TypeError, ValueError: on shapes, dtypes, devices, labels or options that do not fit, saying which and why.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    validation.check_tensors(hidden, weight, bias)
    validation.check_options(temperature, logit_scale, softcap)
    options = HeadOptions(temperature, logit_scale, softcap)
    implemented = _implementation(implementation)
    shape = hidden.shape[:-1]
    rows = hidden.reshape(-1, hidden.shape[-1])
    if targets is None:
        return implemented.linear_energy(rows, weight, None, bias, options)[0].view(shape)

    validation.check_targets(targets, hidden, weight.shape[0], ignore_index)
    # Ignored tokens are taken out before anything is computed: they cost nothing, and a NaN in one reaches no gradient.
    flat_targets = targets.reshape(-1).long()
    counted = (flat_targets != ignore_index).nonzero()[:, 0]
    energy, nll = implemented.linear_energy(rows[counted], weight, flat_targets[counted], bias, options)
    zeros = rows.new_zeros(rows.shape[0], dtype=accumulation_dtype(rows.dtype))
    return EnergyNLL(zeros.index_put((counted,), energy).view(shape), zeros.index_put((counted,), nll).view(shape))


@torch.no_grad()
def tail_energy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    fraction: float,
    side: Literal["top", "bottom"],
    *,
    fill: Literal["zero", "none"] = "zero",
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Energy of the top or bottom share of each token's logits: the boundaries m_in and m_out of D².

    ``−T · log( Σ_{v in tail} exp(z_v/T) + (V−k) )`` with ``k = floor(fraction · V)`` logits in the tail; ``fill="none"``
    drops the ``V−k`` that stands for every other logit set to 0. Exact; takes no gradient.

    Args:
        hidden, weight, bias, temperature, logit_scale, softcap, implementation: as in :func:`linear_energy`.
        fraction: share of the vocabulary in the tail, in (0, 1]; at least one logit.
        side: ``"top"`` for the largest logits (m_in), ``"bottom"`` for the smallest (m_out).
        fill: ``"zero"`` (as released by the authors of D²) or ``"none"``.

    Returns:
        (...,) nats, float32, or float64 for float64 input.

    Raises:
        TypeError, ValueError: as :func:`linear_energy`; also for an empty tail.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    validation.check_tensors(hidden, weight, bias)
    validation.check_options(temperature, logit_scale, softcap)
    k = validation.check_tail(fraction, side, fill, weight.shape[0])
    options = HeadOptions(temperature, logit_scale, softcap)
    rows = hidden.reshape(-1, hidden.shape[-1])
    energy = _implementation(implementation).tail_energy(rows, weight, k, side, fill, bias, options)
    return energy.view(hidden.shape[:-1])


def _implementation(name: str) -> ModuleType:
    """The module that implements ``name``, imported only when it is chosen."""
    if name in ("auto", "streaming"):
        from fused_energy import streaming

        return streaming
    if name == "reference":
        from fused_energy import reference

        return reference
    raise ValueError(f'implementation is {name!r}, which does not exist: choose "auto", "streaming" or "reference".')


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast, cast what a matmul would cast: a float32 head then meets the half-precision hidden states."""
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor)):
        return hidden, weight, bias
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (hidden.dtype, weight.dtype):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
