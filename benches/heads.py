"""Hidden states and heads for benchmarks: random ones, and ones whose softmax is as sparse as that of a trained model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from measure import Step
from peers import Run
from torch import Tensor

from fused_energy import linear_energy

CACHE = Path(__file__).parents[1] / ".cache" / "benches"
STEPS = 40
FORWARD, FROZEN, TRAINABLE = WHATS = ("forward", "forward + backward, frozen head", "forward + backward, trainable head")


class Head(NamedTuple):
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)

    def step(self, run: Run, what: str, softcap: float | None = None) -> tuple[Step, list[Tensor]]:
        """One run of ``what``, and the leaves that get gradients."""
        hidden = self.hidden.detach().requires_grad_(what != FORWARD)
        weight = self.weight.detach().requires_grad_(what == TRAINABLE)

        def step() -> Tensor:
            hidden.grad = weight.grad = None
            result = run(hidden, weight, self.targets, softcap)
            if what != FORWARD:
                result.backward()
            return result

        return step, [hidden, weight]

    def matmul(self) -> Tensor:
        """The unit of all measurements."""
        return self.hidden @ self.weight.T

    def entropy(self) -> float:
        """Mean entropy of the softmax of the first 512 tokens, in nats."""
        log_p = torch.log_softmax(self.hidden[:512].float() @ self.weight.float().T, dim=-1)
        return float(-(log_p.exp() * log_p).sum(dim=-1).mean())


def random_head(n: int, h: int, v: int, dtype: torch.dtype, device: str) -> Head:
    """Logits of variance 1: the softmax is nearly flat, with an entropy of log V − 1/2."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, h, device=device, generator=generator).to(dtype)
    weight = (torch.randn(v, h, device=device, generator=generator) / h**0.5).to(dtype)
    return Head(hidden, weight, torch.randint(0, v, (n,), device=device, generator=generator))


def trained_head(n: int, h: int, v: int, dtype: torch.dtype, device: str) -> Head:
    """A log-bilinear model of next tokens, fitted by Adam to a synthetic source; every context is one hidden state.

    In the source, each context ranks tokens in a different order, by Zipf's law with an exponent between 1.2 and 3: some
    contexts almost determine the next token, others leave thousands open, as in text. It is not a language model, but its
    softmax results from training with the gradient of the NLL, as a model's does. On a CPU it takes half a minute and is cached
    under ``.cache/``.
    """
    if device == "cuda":  # takes seconds, and the file would be gigabytes
        return Head(*(x if x.dtype == torch.int64 else x.to(dtype) for x in _train(n, h, v, device)))
    path = CACHE / f"trained-{n}-{h}-{v}-{STEPS}.pt"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(_train(n, h, v, device), part)
        part.rename(path)
    return Head(*(x if x.dtype == torch.int64 else x.to(dtype) for x in torch.load(path)))


def _train(n: int, h: int, v: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    exponents = 1.2 + 1.8 * torch.rand(n, 1, device=device, generator=generator)
    starts = torch.randint(0, v, (n, 1), device=device, generator=generator)

    def sample() -> Tensor:
        """Draw a rank by Zipf's law (as the continuous Pareto distribution), then take the context's token of that rank."""
        uniform = torch.rand(n, 1, device=device, generator=generator).clamp_min(1e-6)
        rank = (uniform ** (-1 / (exponents - 1))).clamp_max(v).long() - 1
        return ((starts + rank * 7919) % v)[:, 0]  # a prime step visits the whole vocabulary

    hidden = torch.randn(n, h, device=device, generator=generator).requires_grad_()
    weight = (0.02 * torch.randn(v, h, device=device, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([{"params": [hidden], "lr": 0.05}, {"params": [weight], "lr": 0.005}])
    for _ in range(STEPS):
        optimizer.zero_grad()
        nll = linear_energy(hidden.bfloat16(), weight.bfloat16(), sample()).nll
        nll.mean().backward()
        optimizer.step()
    return hidden.detach().bfloat16(), weight.detach().bfloat16(), sample()
