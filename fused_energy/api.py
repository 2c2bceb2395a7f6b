"""The public functions. Each validates its arguments, then calls exactly one implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from einops import rearrange
from torch import Tensor

from fused_energy import autograd, dispatch, reference, streaming, validation
from fused_energy.common import LEFT_OUT, OUT_OF_RANGE, HeadOptions
from fused_energy.dispatch import Implementation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    process_group: ProcessGroup | None = ...,
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
    process_group: ProcessGroup | None = ...,
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
    process_group: ProcessGroup | None = None,
) -> Tensor | EnergyNLL:
    """Energy of every token and, with ``targets``, its negative log-likelihood from the same pass.

    With logits ``z = softcap(logit_scale · (h Wᵀ) + b)``, where ``softcap(x) = c · tanh(x/c)``:

    - ``energy = −T · logsumexp(z / T)`` (LeCun et al. 2006; Liu et al. 2020, energy-based out-of-distribution detection);
    - ``nll = logsumexp(z) − z_target``, always at temperature 1.

    Both are differentiable with respect to hidden, weight and bias, with any upstream gradient, separately or together.

    Args:
        hidden: hidden states (..., H), float16, bfloat16, float32 or float64.
        weight: the head's matrix (V, H), in the same dtype (under ``torch.autocast`` both are cast as a matmul would cast
            them). With ``process_group``, or as a ``DTensor`` sharded on dim 0: the rows that this rank holds.
        targets: token ids (...,), int64 or int32. If a target is ``ignore_index``, energy and NLL are 0 and carry no
            gradient, whatever the hidden state holds. On the CPU a label out of range raises an error; on other devices and
            under ``torch.compile``, where the check would force a synchronization, the NLL of that token is NaN.
        bias: the head's bias (V,).
        temperature: T > 0, used for the energy only. This, ``logit_scale`` and ``softcap`` are numbers, not tensors: they get
            no gradient.
        logit_scale: multiplies the projection, before the bias is added.
        softcap: c > 0, or None.
        ignore_index: the target that marks a token to ignore.
        implementation: ``"reference"`` materializes the logits and is the definition; ``"streaming"`` holds one bounded
            tile of them at a time, on any device; ``"triton"`` keeps them on the chip of a GPU. A named implementation runs
            or raises an error; it never falls back. ``"auto"`` is ``"triton"`` for float16 and bfloat16 on a supported GPU
            (NVIDIA from compute capability 8.0, AMD) unless the logits fit into one 8 MiB tile, and ``"streaming"`` otherwise.
        process_group: the ranks that hold consecutive stretches of the head's rows, in rank order and of any size. Every
            rank passes the same tokens and gets all energies and the full gradient of ``hidden``.

    Returns:
        energy (...,), or ``EnergyNLL(energy, nll)`` with targets; nats; float32, or float64 for float64 input.

    Raises:
        TypeError, ValueError: for invalid shapes, dtypes, devices, labels or options; the message says which and why.
        RuntimeError: if ``"triton"`` is named but cannot run.
        NotImplementedError: for a second derivative, which only ``"reference"`` has; under ``torch.vmap``.
    """
    hidden, weight, bias, group = _local(hidden, weight, bias, process_group)
    validation.check_tensors(hidden, weight, bias, sharded=group is not None)
    validation.check_options(temperature, logit_scale, softcap)
    options = HeadOptions(temperature, logit_scale, softcap)
    chosen = dispatch.choose(implementation, hidden, weight, sharded=group is not None)
    rows = hidden.reshape(-1, hidden.shape[-1])  # einops.pack would copy them
    flat_targets = counted = None
    if targets is not None:
        validation.check_targets(targets, hidden)
        # Reading the labels would synchronize a GPU and break a graph, so there the NLL of a label out of range is NaN.
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            validation.check_labels(targets, _vocabulary(weight, group), ignore_index)
        flat_targets = rearrange(targets, "... -> (...)").long()
        counted = flat_targets != ignore_index
        flat_targets = torch.where(counted, torch.where(flat_targets < 0, OUT_OF_RANGE, flat_targets), LEFT_OUT)

    if chosen == "reference":
        energy, nll = reference.linear_energy(rows, weight, flat_targets, bias, options)
    else:
        energies, target_logit = autograd.energy_and_target(rows, weight, bias, flat_targets, options, chosen, group)
        energy, nll = energies[0], -energies[-1] - target_logit if counted is not None else None
        if counted is not None and nll is not None:
            energy, nll = torch.where(counted, energy, 0.0), torch.where(counted, nll, 0.0)
    shape = hidden.shape[:-1]
    return energy.reshape(shape) if nll is None else EnergyNLL(energy.reshape(shape), nll.reshape(shape))


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
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Energy of the top or bottom fraction of each token's logits: the boundaries m_in and m_out of D².

    ``−T · log( Σ_{v in tail} exp(z_v/T) + (V−k) )`` with ``k = floor(fraction · V)`` logits in the tail. ``V−k`` counts every
    other logit as 0; ``fill="none"`` drops it. The result is exact and has no gradient.

    Args:
        hidden, weight, bias, temperature, logit_scale, softcap, process_group: as in :func:`linear_energy`.
        implementation: ``"reference"`` or ``"streaming"``; ``"auto"`` is ``"streaming"``, which computes full rows of logits
            for a few tokens at a time and selects among them with PyTorch's ``topk``.
        fraction: fraction of the vocabulary in the tail, in (0, 1]; at least one logit.
        side: ``"top"`` for the largest logits (m_in), ``"bottom"`` for the smallest (m_out).
        fill: ``"zero"`` (as in the code released by the authors of D²) or ``"none"``.

    Returns:
        (...,) nats, float32, or float64 for float64 input.

    Raises:
        TypeError, ValueError: as :func:`linear_energy`; also for an empty tail.
    """
    hidden, weight, bias, group = _local(hidden, weight, bias, process_group)
    validation.check_tensors(hidden, weight, bias, sharded=group is not None)
    validation.check_options(temperature, logit_scale, softcap)
    k = validation.check_tail(fraction, side, fill, _vocabulary(weight, group))
    options = HeadOptions(temperature, logit_scale, softcap)
    rows = hidden.reshape(-1, hidden.shape[-1])  # einops.pack would copy them
    chosen = dispatch.choose_for_tails(implementation, sharded=group is not None)
    if group is not None:
        from fused_energy import parallel

        energy = parallel.tail_energy(rows, weight, k, side, fill, bias, options, group)
    else:
        module = reference if chosen == "reference" else streaming
        energy = module.tail_energy(rows, weight, k, side, fill, bias, options)
    return energy.reshape(hidden.shape[:-1])


def _local(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor | None, ProcessGroup | None]:
    """Plain tensors in the dtype that a matmul would use, and the group over which the head is sharded, if any."""
    if any(type(x).__name__ == "DTensor" for x in (hidden, weight, bias)):
        from fused_energy import parallel

        hidden, weight, bias, group = parallel.unwrap(hidden, weight, bias, group)
    return *_autocast(hidden, weight, bias), group


def _vocabulary(weight: Tensor, group: ProcessGroup | None) -> int:
    if group is None:
        return weight.shape[0]
    from fused_energy import parallel

    return parallel.VocabularyShard.of(weight, group).vocabulary


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast, cast what a matmul would cast, so that a float32 head works with half-precision hidden states."""
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor)):
        return hidden, weight, bias
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or torch.float64 in (hidden.dtype, weight.dtype):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
