"""Energy and NLL from hidden states, in ratios to the bare matmul ``h @ Wᵀ`` of the same run.

    pytest benches --benchmark-only

Compared on equal work (one float32 or bfloat16 head, hidden states with gradient): ours, the plain path that materializes
the logits, and PyTorch's chunked ``linear_cross_entropy``, which gives the NLL alone. The table at the end, and
``benches/results/``, hold medians; absolute times of a CPU are not worth quoting.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_energy import linear_energy

N, H, V = 1024, 1024, 32000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def streaming(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return sum(x.sum() for x in linear_energy(hidden, weight, targets, implementation="streaming"))


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    lse = torch.logsumexp(logits, dim=-1)
    return -lse.sum() + (lse - logits.gather(1, targets[:, None])[:, 0]).sum()


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="sum")


def matmul(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        return hidden @ weight.T


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"streaming": streaming, "plain": plain}
if hasattr(torch.nn.functional, "linear_cross_entropy"):
    PEERS["torch chunked (NLL only)"] = chunked


def cases() -> list[tuple[str, str]]:
    whats = ("forward", "forward+backward, frozen head", "forward+backward, trainable head")
    return [("matmul", "forward"), *((peer, what) for what in whats for peer in PEERS)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("peer", "what"), cases())
def test_energy(benchmark, ratios, dtype, peer, what):
    torch.manual_seed(0)
    backward = what != "forward"
    hidden = torch.randn(N, H, dtype=DTYPES[dtype], requires_grad=backward)
    weight = (torch.randn(V, H) / H**0.5).to(DTYPES[dtype]).requires_grad_(what.endswith("trainable head"))
    targets = torch.randint(0, V, (N,))
    function = matmul if peer == "matmul" else PEERS[peer]

    def step() -> None:
        hidden.grad = weight.grad = None
        result = function(hidden, weight, targets)
        if backward:
            result.backward()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    ratios.add(dtype, what, peer, benchmark.stats.stats.median)
