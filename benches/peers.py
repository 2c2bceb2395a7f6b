"""The implementations that are compared: ours, those of PyTorch, and other libraries if they are installed.

Each takes (hidden, weight, targets, softcap) and returns one number to differentiate: the sum of energy and NLL, or of the NLL
alone if it computes nothing else. A peer that cannot run has a reason.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_energy import linear_energy

Run = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


class Peer(NamedTuple):
    name: str
    run: Run | None
    reason: str = ""  # why it does not run


def ours(implementation: str, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    energy, nll = linear_energy(hidden, weight, targets, softcap=softcap, implementation=implementation)  # type: ignore
    return energy.sum() + nll.sum()


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Logits in the dtype of the head, then float32, as in a model's own forward and loss."""
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits, dim=-1)
    return -lse.sum() + (lse - logits.gather(1, targets[:, None])[:, 0]).sum()


def torch_linear_cross_entropy(options: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def peers(device: str, softcap: float | None = None) -> list[Peer]:
    """All peers, in the order of the tables. A new list compiles ``torch.compile`` again, for one shape."""
    torch._dynamo.reset()
    return [
        Peer("reference", partial(ours, "reference")),
        Peer("streaming", partial(ours, "streaming")),
        Peer("triton", partial(ours, "triton")) if device == "cuda" else Peer("triton", None, "needs a GPU"),
        Peer("plain", plain),
        Peer("plain, torch.compile", torch.compile(plain, dynamic=False)),
        *_torch_peers(softcap),
        *_cut_cross_entropy(device),
        *_liger(device, softcap),
        _quack(device, softcap),
    ]


def _torch_peers(softcap: float | None) -> list[Peer]:
    names = "torch linear_cross_entropy, not chunked (NLL only)", "torch linear_cross_entropy, chunked (NLL only)"
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return [Peer(name, None, f"not in torch {torch.__version__}") for name in names]
    if softcap is not None:
        return [Peer(name, None, "has no softcap") for name in names]
    # Every option of the chunked path is "auto": the choice of PyTorch's authors for the device and dtype.
    options = None, torch.nn.LinearCrossEntropyOptions()
    return [Peer(name, partial(torch_linear_cross_entropy, one)) for name, one in zip(names, options, strict=True)]


def _cut_cross_entropy(device: str) -> list[Peer]:
    label = "cut-cross-entropy"
    module, reason = _library("cut_cross_entropy")
    kernels = [f"{label}, exact", f"{label}, default: drops small gradients"]
    compiled = f"{label}, torch_compile (NLL only)"
    if module is None:
        return [Peer(name, None, reason) for name in (*kernels, compiled)]
    function = module.linear_cross_entropy
    with_lse = "return_lse" in inspect.signature(function).parameters  # newer than release 25.1.1

    def run(options: dict[str, Any], hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        if not with_lse or "impl" in options:
            return function(hidden, weight, targets, softcap=softcap, reduction="sum", **options)
        nll, lse = function(hidden, weight, targets, softcap=softcap, reduction="sum", return_lse=True, **options)
        return nll - lse.sum()

    gives = "" if with_lse else " (NLL only)"
    found = [Peer(kernels[0] + gives, partial(run, {"filter_eps": None})), Peer(kernels[1] + gives, partial(run, {}))]
    if device != "cuda":
        found = [Peer(name, None, "needs a GPU") for name in kernels]
    return [*found, Peer(compiled, partial(run, {"impl": "torch_compile"}))]


def _liger(device: str, softcap: float | None) -> list[Peer]:
    """The Triton kernel, whose forward makes the gradients, and the kernel for Hopper, which takes any upstream gradient."""
    names = "Liger (NLL only)", "Liger scaled CE, with the target's logit for the energy"
    found = [
        _library(f"liger_kernel.{name}", device)
        for name in ("transformers.fused_linear_cross_entropy", "ops.fused_linear_scaled_cross_entropy")
    ]

    def fused(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        loss = found[0][0].LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=softcap)
        return loss(weight, hidden, targets)

    def scaled(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        nll = found[1][0].LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)
        target_logit = (hidden.float() * weight[targets].float()).sum(dim=-1)
        return nll.sum() - (nll + target_logit).sum()

    reasons = found[0][1], found[1][1] or ("has no softcap" if softcap is not None else "")
    return [
        Peer(name, None, reason) if reason else Peer(name, run)
        for name, run, reason in zip(names, (fused, scaled), reasons, strict=True)
    ]


def _quack(device: str, softcap: float | None) -> Peer:
    name = "quack (NLL only)"
    module, reason = _library("quack.linear_cross_entropy", device)
    if reason or softcap is not None:
        return Peer(name, None, reason or "has no softcap")

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        return module.chunked_linear_cross_entropy(hidden, weight, targets, reduction="sum")

    return Peer(name, run)


def _library(name: str, device: str = "cuda") -> tuple[Any, str]:
    """The module, or None and the reason."""
    if device != "cuda":
        return None, "needs a GPU"
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # a peer built for other versions may raise anything
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
