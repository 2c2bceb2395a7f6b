"""Helpers for training in several processes, and for weights that are sharded over them.

Under FSDP2 a parameter outside its module's forward is a ``DTensor``, under DeepSpeed ZeRO-3 an empty tensor. The energy reads
the head's weight where no forward runs, so the weight is gathered: here for FSDP2, in :class:`eua.model.head.Head` for ZeRO-3.

Functions that need to know the processes ask accelerate's ``PartialState``, which a trainer creates.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import reduce
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

T = TypeVar("T")


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true in at least one process; all processes call this."""
    return bool(reduce(torch.tensor(float(flag), device=device), "sum"))


def has_other_processes() -> bool:
    """Whether this process is one of several, which must then agree on whether to run the model or gather its weights."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def end_process_group() -> None:
    """End this process's part in the group of processes, if there is one.

    A thread of gloo takes the interpreter's lock to release the tensors of its last exchange. Where the interpreter ends first,
    the process aborts after its work is done, and its launcher reports a failure. The threads end with the group, and the
    group with the last object that holds it: delete the trainer first.
    """
    gc.collect()  # the trainer's parts refer to each other
    PartialState().destroy_process_group()


def own_part(items: Sequence[T]) -> list[T]:
    """This process's part of ``items``: every n-th of them, and equally many in each of the n processes.

    Where n does not divide their number, the last item is repeated. accelerate's ``split_between_processes`` makes contiguous
    parts instead, and one process would get all the longest rows of a list that is sorted by length.
    """
    state = PartialState()
    padding = -len(items) % state.num_processes
    return [*items, *[*items[-1:]] * padding][state.process_index :: state.num_processes]


# ---- sharded weights ------------------------------------------------------------------------------------------------


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether training shards the weights over the processes, so that the model works only once it is wrapped."""
    return bool(accelerator.is_fsdp2) or zero_stage(accelerator) == 3


def zero_stage(accelerator: Accelerator) -> int:
    """The stage of DeepSpeed ZeRO, or 0."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else plugin.zero_stage


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned this parameter."""
    return hasattr(parameter, "ds_id")


def full_tensor(parameter: Tensor) -> Tensor:
    """The full parameter where it is sharded, else the parameter itself; all processes call this.

    Under FSDP2 the gradient that reaches the parameter is the mean over the processes, as FSDP's own gradients are. Under
    ZeRO-3 the result is a copy without a gradient.
    """
    if is_partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    full = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # the gradients of all processes are summed
    if full.requires_grad:
        full.register_hook(lambda grad: grad / mesh.size())
    return full


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the full parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local_shard(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: its shard, or all of it."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


class _AttachedToOutput(torch.autograd.Function):
    """Returns ``hidden``; the backward pass gives ``logits`` a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def attached_to_output(model: torch.nn.Module, hidden: Tensor, logits: Tensor) -> Tensor:
    """``hidden``, with a backward pass that also goes through the model's output where FSDP2 needs that.

    FSDP2 gathers a module's weights for the backward pass when a gradient reaches the module's output. The loss is computed
    from hidden states, so no gradient would reach the output of the outermost module.
    """
    return cast(Tensor, _AttachedToOutput.apply(hidden, logits)) if isinstance(model, FSDPModule) else hidden
