"""The differentiable operator behind ``linear_energy``, as PyTorch custom ops that ``torch.compile`` does not break up.

``energy_and_target`` returns ``energy`` and ``target_logit``; the NLL follows by plain arithmetic. The gradients work the
same way for every implementation: that of the hidden states uses what the forward stored, that of the head makes a second pass
over the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_energy import common as shared
from fused_energy import dispatch
from fused_energy.common import NO_VMAP, HeadOptions, Pass

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def energy_and_target(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor | None,  # (N,)
    options: HeadOptions,
    implementation: str,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """``−T_k · logsumexp(z/T_k)`` (K, N) and the target's logit (N,), differentiable in hidden, weight and bias."""
    store = hidden.requires_grad and torch.is_grad_enabled()
    name = "" if group is None else group.group_name
    energy, target_logit, _ = _EnergyAndTarget.apply(hidden, weight, bias, targets, *options, implementation, name, store)
    return energy, target_logit


def _implemented(implementation: str, group: str, weight: Tensor) -> Any:
    """An object with ``forward``, ``hidden_gradient`` and ``head_gradient``: a module, or one applied to a sharded head."""
    if not group:
        return dispatch.load(implementation)
    from fused_energy.parallel import ShardedHead  # not every build of PyTorch has torch.distributed

    return ShardedHead(dispatch.load(implementation), group, weight)


@torch.library.custom_op("fused_energy::forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    implementation: str,
    group: str,
    store: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = HeadOptions(temperature, logit_scale, softcap)
    return _implemented(implementation, group, weight).forward(hidden, weight, bias, targets, options, store)


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return shared.empty_pass(hidden, targets, HeadOptions(*others[:3]), store=others[-1])


@torch.library.custom_op("fused_energy::backward", mutates_args=())
def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    implementation: str,
    group: str,
    energy: Tensor,
    target_logit: Tensor,
    weighted: Tensor,
    grad_energy: Tensor,
    grad_target: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options, done = HeadOptions(temperature, logit_scale, softcap), Pass(energy, target_logit, weighted)
    implemented = _implemented(implementation, group, weight)
    grad_hidden = grad_weight = grad_bias = None
    if needs_hidden:
        grad_hidden = implemented.hidden_gradient(hidden, weight, targets, options, done, grad_energy, grad_target)
    if needs_weight or needs_bias:
        grad_weight, grad_bias = implemented.head_gradient(
            hidden, weight, bias, targets, options, energy, grad_energy, grad_target, (needs_weight, needs_bias)
        )
    return tuple(hidden.new_empty(0) if x is None else x for x in (grad_hidden, grad_weight, grad_bias))  # type: ignore


@_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    likes = zip((hidden, weight, bias), others[-3:], strict=True)
    return tuple(torch.empty_like(x) if needed else hidden.new_empty(0) for x, needed in likes)  # type: ignore


class _EnergyAndTarget(torch.autograd.Function):
    """Connects the two ops. ``torch.func.grad`` and ``vjp`` need the static ``setup_context``."""

    # torch.compile counts these parameters to find out whether the first is a context, so *inputs would mislead it.
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor | None,
        temperature: float,
        logit_scale: float,
        softcap: float | None,
        implementation: str,
        group: str,
        store: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(hidden, weight, bias, targets, temperature, logit_scale, softcap, implementation, group, store)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        tensors, ctx.arguments = inputs[:4], inputs[4:9]
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_energy: Tensor | None, grad_target: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, energy, target_logit, weighted = ctx.saved_tensors
        grad_energy = torch.zeros_like(energy) if grad_energy is None else grad_energy
        grad_target = torch.zeros_like(target_logit) if grad_target is None else grad_target
        needs = ctx.needs_input_grad[:3]
        # A compiled graph rejects second derivatives itself and does not support nested autograd Functions.
        differentiate = _backward if torch.compiler.is_compiling() else _Gradients.apply
        gradients = differentiate(
            hidden, weight, bias, targets, *ctx.arguments, energy, target_logit, weighted, grad_energy, grad_target, *needs
        )
        return *(x if needed else None for x, needed in zip(gradients, needs, strict=True)), *(None,) * 7

    @staticmethod
    def vmap(*_: Any) -> None:
        raise NotImplementedError(NO_VMAP)


class _Gradients(torch.autograd.Function):
    """The gradients. They are not differentiable: a second derivative raises an error instead of being zero."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            "A second derivative of linear_energy was requested (create_graph=True), which this implementation does not have: "
            'pass implementation="reference", which is plain PyTorch.'
        )
