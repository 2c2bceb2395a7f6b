"""Several processes: what they agree on, and weights of which each holds a part.

Under FSDP2 a parameter outside its module's forward is a ``DTensor``, under DeepSpeed ZeRO-3 an empty tensor. The energy reads
the head where no forward runs, so it is gathered: here for FSDP2, in :class:`eua.model.head.Head` for ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set in one process at least; all processes call this."""
    if world_size() == 1:
        return flag
    raised = torch.tensor(float(flag), device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def from_first(value: T) -> T:
    """The first process's ``value``; all processes call this."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def share(items: Sequence[T]) -> list[T]:
    """This process's part of ``items``, as long in every process: the last item comes more than once where need be."""
    count = world_size()
    if count == 1 or not items:
        return list(items)
    padded = [*items, *[items[-1]] * (-len(items) % count)]
    return padded[rank() :: count]


def gather(items: list[T]) -> list[T]:
    """The items of all processes, in no particular order; all processes call this."""
    if world_size() == 1:
        return items
    parts: list[list[T]] = [[]] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


# ---- sharded weights ------------------------------------------------------------------------------------------------


class _Gathered(torch.autograd.Function):
    """A sharded parameter, whole; its gradient is the mean over processes, as FSDP's own is."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = parameter.device_mesh, parameter.placements
        return cast(DTensor, parameter.detach()).full_tensor()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> DTensor:
        summed = DTensor.from_local(grad / ctx.mesh.size(), ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return summed.redistribute(placements=ctx.placements)


def gathered(parameter: Tensor) -> Tensor:
    """An FSDP2 parameter whole, any other as it is; all processes call this. Gradients reach the parameter."""
    return _Gathered.apply(parameter) if isinstance(parameter, DTensor) else parameter


class _Joined(torch.autograd.Function):
    """``hidden``, and with its gradient one of zero for ``logits``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def joined(model: torch.nn.Module, hidden: Tensor, logits: Tensor) -> Tensor:
    """``hidden``, which FSDP2 must not take for something apart from the model's output.

    It gathers weights again for the backward pass when a gradient reaches the output of the module that they are part of,
    and the loss is made of hidden states, not of the output.
    """
    return cast(Tensor, _Joined.apply(hidden, logits)) if isinstance(model, FSDPModule) else hidden


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 keeps this parameter in parts."""
    return hasattr(parameter, "ds_id")


def whole(parameter: Tensor) -> Tensor:
    """A parameter whole, without a gradient; all processes call this."""
    if is_partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return gathered(parameter.detach())


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether training puts a part of each weight into each process, so that the model works only once it is wrapped."""
    return bool(accelerator.is_fsdp2) or zero_stage(accelerator) == 3


def zero_stage(accelerator: Accelerator) -> int:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else plugin.zero_stage
