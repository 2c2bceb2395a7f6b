"""Checks of the arguments of ``fused_energy``. Each error says what was passed, why it cannot work and what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_energy.common import NO_VMAP, tail_size

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


def check_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None, sharded: bool) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless hidden (..., H), weight (V, H) and bias (V,) match."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, but a torch.Tensor is needed: convert it first.")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, but energies need floating point in float16, bfloat16, float32 or float64: "
                "cast it, e.g. .float()."
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}, but the products need dense tensors: use {name}.to_dense().")
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device, where a tensor has no values, so there is nothing to compute: load the weights "
                "first; if they are offloaded, call the model, which fetches them."
            )
    if hidden.ndim < 1:
        raise ValueError("hidden is a scalar, but its last dimension must be the hidden size H: pass (..., H).")
    if weight.ndim != 2 or (weight.shape[0] < 1 and not sharded):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but the head's matrix must be (V, H) with V ≥ 1.")
    if weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but a hidden size of 0 makes no logits: pass (V, H), H ≥ 1.")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has H = {hidden.shape[-1]} and weight (V, H) = {tuple(weight.shape)}, so they cannot be multiplied: "
            "pass the hidden states that this head takes as input (a common mistake is a transposed weight)."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, but one value per vocabulary entry is needed: ({weight.shape[0]},)."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != hidden.dtype:
            raise TypeError(
                f"hidden is {hidden.dtype} and {name} is {tensor.dtype}, and mixing them would hide a cast of the whole "
                f"head: cast one of them, e.g. hidden.to({tensor.dtype}), or run under torch.autocast."
            )
        if tensor.device != hidden.device:
            raise ValueError(
                f"hidden is on {hidden.device} and {name} on {tensor.device}: move both to one device before the call."
            )


def check_options(temperature: float, logit_scale: float, softcap: float | None) -> None:
    """Raise ``TypeError`` for what is no number, ``ValueError`` for numbers for which the energy is undefined."""
    for name, value in (("temperature", temperature), ("logit_scale", logit_scale), ("softcap", softcap)):
        check_number(name, value, optional=name == "softcap")
    # Comparisons instead of math.isfinite, which torch.compile cannot trace; NaN fails all of them.
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, but E = −T·logsumexp(z/T) needs a finite T > 0.")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale is {logit_scale}, but logits must stay finite: pass the model's scale (1.0 if none).")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}, but c·tanh(x/c) needs a finite c > 0: pass None for no cap.")


def check_number(name: str, value: object, optional: bool = False) -> None:
    """Raise ``TypeError`` unless ``value`` is a Python number, or None where that is an option."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or optional and value is None):
        raise TypeError(
            f"{name} is a {type(value).__name__}, but it must be a Python number, because no gradient is computed for it: "
            f"pass float({name})."
        )


def check_targets(targets: Tensor, hidden: Tensor) -> None:
    """Raise an error unless targets are integers (...,), one per token."""
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        found = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets are {found}, but token ids must be int64 or int32 tensors: use targets.long().")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and hidden {tuple(hidden.shape)}, but there must be one target "
            f"per token: {tuple(hidden.shape[:-1])}."
        )
    if targets.device != hidden.device:
        raise ValueError(f"targets are on {targets.device} and hidden on {hidden.device}: move them to one device.")


def check_labels(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise ``ValueError`` unless every target is within the vocabulary or equal to ``ignore_index``."""
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    try:
        any_wrong = bool(wrong.any())
    except RuntimeError as error:  # nothing public says that a transform such as vmap is active
        raise NotImplementedError(NO_VMAP) from error
    if any_wrong:
        raise ValueError(
            f"targets hold {int(targets[wrong][0])} ({int(wrong.sum())} such labels), which is out of range for a vocabulary "
            f"of {vocabulary} and is not ignore_index ({ignore_index}): check that the tokenizer fits the model, or mask them."
        )


def check_tail(fraction: float, side: str, fill: str, vocabulary: int) -> int:
    """Return the size k of a tail; raise ``ValueError`` if there is no such tail."""
    check_number("fraction", fraction)
    if side not in ("top", "bottom"):
        raise ValueError(f'side is {side!r}, but a tail is "top" (the largest logits) or "bottom" (the smallest).')
    if fill not in ("zero", "none"):
        raise ValueError(f'fill is {fill!r}, but logits outside the tail either count as 0 ("zero") or not ("none").')
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, but a fraction of the vocabulary must be above 0 and at most 1.")
    k = tail_size(fraction, vocabulary)
    if k < 1:
        raise ValueError(
            f"fraction {fraction} of a vocabulary of {vocabulary} is less than one logit, so the tail is empty: use a "
            f"fraction of at least {1 / vocabulary:.3g}."
        )
    return k
