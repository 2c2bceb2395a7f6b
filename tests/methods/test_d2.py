"""Tests of d2_loss against a direct transcription of the method, on random logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eua import d2_loss
from fused_energy import linear_energy, tail_energy


def transcription(
    z: Tensor, ref: Tensor, y: Tensor, forget: Tensor, rho: float, t: float, gamma: float, alpha: float, fill: str = "zero"
) -> Tensor:
    """method.md §3–4, one token at a time, from logits (N, V) of the model and of the reference."""
    v = z.shape[1]
    k = int(rho * v)
    others = v - k if fill == "zero" else 0
    retain_terms, forget_terms, nll_terms = [], [], []
    for i in range(len(z)):
        energy = -t * torch.logsumexp(z[i] / t, 0)
        ordered = ref[i].sort().values
        if forget[i]:
            m_out = -t * math.log(float((ordered[:k] / t).exp().sum()) + others)
            forget_terms.append(torch.clamp(m_out - energy, min=0) ** 2)
        else:
            m_in = -t * math.log(float((ordered[-k:] / t).exp().sum()) + others)
            retain_terms.append(torch.clamp(energy - m_in, min=0) ** 2)
            nll_terms.append(torch.logsumexp(z[i], 0) - z[i, y[i]])
    mean = lambda terms: sum(terms) / len(terms)  # noqa: E731
    return gamma * (mean(retain_terms) + mean(forget_terms)) + alpha * mean(nll_terms)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_are_the_method(seed, temperature):
    torch.manual_seed(seed)
    n, v = 12, 30
    z = (3 * torch.randn(n, v, dtype=torch.float64)).requires_grad_()
    ref = 3 * torch.randn(n, v, dtype=torch.float64)
    y, forget = torch.randint(0, v, (n,)), torch.arange(n) % 3 == 0
    expected = transcription(z, ref, y, forget, 0.1, temperature, 0.05, 0.7)
    (expected_gradient,) = torch.autograd.grad(expected, z)

    head = torch.eye(v, dtype=torch.float64)  # makes the hidden states the logits
    tails = {side: tail_energy(ref, head, 0.1, side, temperature=temperature) for side in ("top", "bottom")}
    energy, nll = linear_energy(z, head, y, temperature=temperature)
    boundary = torch.where(forget, tails["bottom"], tails["top"])
    loss = d2_loss(energy, nll, boundary, forget, torch.ones(n, dtype=torch.bool), gamma=0.05, alpha=0.7).loss
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_no_gradient_beyond_boundaries_or_for_uncounted_tokens():
    energy = torch.tensor([-1.0, -9.0, -9.0, -1.0, 7.0], requires_grad=True)
    forget = torch.tensor([True, True, False, False, True])
    counted = torch.tensor([True, True, True, True, False])
    parts = d2_loss(energy, torch.zeros(5), (-5.0, -4.0), forget, counted, gamma=1.0, alpha=0.0)
    assert parts.forget.item() == 5.0**2 / 2
    assert parts.retain.item() == 4.0**2 / 2
    parts.loss.backward()
    assert energy.grad.tolist() == [0.0, -5.0, 0.0, 4.0, 0.0]


def test_parts_of_an_accumulation_window_add_up():
    torch.manual_seed(0)
    energy, nll, forget = torch.randn(10), torch.rand(10), torch.rand(10) < 0.4
    everything = torch.ones(10, dtype=torch.bool)
    whole = d2_loss(energy, nll, (-1.0, 1.0), forget, everything).loss
    counts = {"forget_count": forget.sum(), "retain_count": (~forget).sum()}
    parts = [d2_loss(energy[s], nll[s], (-1.0, 1.0), forget[s], everything[s], **counts).loss for s in (slice(3), slice(3, 10))]
    torch.testing.assert_close(sum(parts), whole)


def test_a_batch_without_one_kind_is_finite():
    parts = d2_loss(torch.ones(2), torch.ones(2), (0.0, 0.0), torch.tensor([True, True]), torch.tensor([True, True]))
    assert torch.isfinite(parts.loss)
    assert parts.retain == parts.nll == 0
