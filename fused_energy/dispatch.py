"""Choice of the implementation: the rule behind ``implementation="auto"``, and the import of the chosen one."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from fused_energy.common import SCRATCH_BYTES

Implementation = Literal["auto", "reference", "streaming", "triton"]


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules holds a module of that name without a spec
        return False


# Looked up once, on import, so that torch.compile sees constants. Triton also reads the variable when it is imported.
HAS_TRITON = _installed("triton")
TRITON_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def choose(name: str, hidden: Tensor, weight: Tensor, sharded: bool) -> str:
    """The implementation that ``name`` stands for with these inputs. A named one runs or raises an error; it never falls back.

    ``"auto"`` is ``"triton"`` for float16 and bfloat16 on a supported GPU (NVIDIA from compute capability 8.0, AMD) if all
    logits together are larger than one tile of ``"streaming"``, and ``"streaming"`` otherwise.
    """
    _check_name(name, sharded)
    if name == "auto":
        large = hidden.shape[:-1].numel() * weight.shape[0] * 4 > SCRATCH_BYTES
        half = hidden.dtype in (torch.float16, torch.bfloat16)
        suits = large and half and hidden.is_cuda and HAS_TRITON and _gpu_is_supported(hidden.device)
        return "triton" if suits else "streaming"
    if name == "triton":
        _check_triton_can_run(hidden)
    return name


def choose_for_tails(name: str, sharded: bool) -> str:
    """Like ``choose``, for ``tail_energy``, which has no Triton kernel."""
    _check_name(name, sharded)
    if name == "triton":
        raise ValueError(
            'implementation is "triton", but tail_energy has no Triton kernel: choose "auto" or "streaming", which selects '
            "among rows of logits with PyTorch's kernels, also on a GPU."
        )
    return "streaming" if name == "auto" else name


def load(name: str) -> ModuleType:
    """Import the implementation: a module with ``forward``, ``hidden_gradient`` and ``head_gradient``."""
    if name == "triton":
        from fused_energy import triton

        return triton
    from fused_energy import streaming

    return streaming


def _check_name(name: str, sharded: bool) -> None:
    if name not in get_args(Implementation):
        raise ValueError(
            f'implementation is {name!r}, which does not exist: choose "auto", "streaming", "triton" or "reference".'
        )
    if name == "reference" and sharded:
        raise ValueError(
            'implementation is "reference" and the head is sharded, but the reference needs the full head: gather it, or '
            'pass implementation="streaming".'
        )


def _check_triton_can_run(hidden: Tensor) -> None:
    if not HAS_TRITON:
        raise RuntimeError(
            'implementation is "triton", but the triton package is not installed: install it (CUDA builds of PyTorch include '
            'it), or pass implementation="streaming".'
        )
    if hidden.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(
            f'implementation is "triton" and hidden is {hidden.dtype}, but its kernels take float16, bfloat16 and float32: '
            'cast the inputs, or pass implementation="streaming".'
        )
    if hidden.is_cuda and not _gpu_is_supported(hidden.device):
        raise RuntimeError(
            f'implementation is "triton", but {torch.cuda.get_device_name(hidden.device)} is older than compute '
            'capability 8.0, which its kernels need: pass implementation="streaming".'
        )
    if not hidden.is_cuda and not TRITON_IS_INTERPRETED:
        raise ValueError(
            f'implementation is "triton" and hidden is on {hidden.device}, but its kernels run on a GPU: move the inputs to '
            'one, or pass implementation="streaming".'
        )


def _gpu_is_supported(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


# As torch.compiler.assume_constant_result does; but that imports the compiler, which more than doubles the import time.
_gpu_is_supported._dynamo_marked_constant = True  # type: ignore[attr-defined]
