"""Benchmark of one training step: ours against the step that the authors of D² released, on the same model and batch.

    pytest benches/test_training_step.py --benchmark-only

The released step (written here from the method's definition, only for this comparison) runs the retain rows twice, once for
their energy and once for their likelihood, and the reference on both kinds of rows: five forwards, three of them with a
backward, all with logits, and two models in memory. Ours runs forget and retain rows together, once, without logits, with
boundaries that were computed before. Loss and gradients must be equal before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import measure
import pytest
import torch
from conftest import DEVICE, filled
from report import Report
from steps import ALPHA, GAMMA, ROWS, TOKENS, TRAINED, Batch, check_equal, counted_logits, make_batch, make_model, our_step
from torch import Tensor, nn

from eua.model.forward import hidden_states
from eua.model.head import output_head

HIDDEN_SIZE, LAYERS, VOCABULARY, RHO = 384, 6, 32000, 0.1


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    yield from filled(request, f"training-step-{DEVICE}", "pytest benches/test_training_step.py --benchmark-only")


def released_step(model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
    """Five forwards with logits, and a separate backward for each part of the loss."""
    counted = batch["labels"][:, 1:] != -100

    def boundary(rows: Tensor, largest: bool) -> Tensor:
        with torch.no_grad():
            z = counted_logits(reference, batch, rows)
            k = int(RHO * VOCABULARY)
            kept = z.topk(k, largest=largest).values
            return -torch.logsumexp(torch.cat([kept, kept.new_zeros(len(z), VOCABULARY - k)], dim=1), dim=1)

    forget, retain = batch["forget"][:, 0], ~batch["forget"][:, 0]
    m_out, m_in = boundary(forget, largest=False), boundary(retain, largest=True)
    part_forget = GAMMA * (m_out + torch.logsumexp(counted_logits(model, batch, forget), dim=1)).relu().square().mean()
    part_forget.backward()
    part_retain = GAMMA * (-torch.logsumexp(counted_logits(model, batch, retain), dim=1) - m_in).relu().square().mean()
    part_retain.backward()
    targets = batch["labels"][:, 1:][counted & retain[:, None]]
    part_nll = ALPHA * nn.functional.cross_entropy(counted_logits(model, batch, retain), targets)
    part_nll.backward()
    return (part_forget + part_retain + part_nll).detach()


@torch.no_grad()
def boundaries_of(model: nn.Module, batch: Batch) -> Tensor:
    hidden, head = hidden_states(model, batch)[:, :-1], output_head(model)
    sides = [head.tail_energy(hidden, RHO, side, "zero", 1.0) for side in ("bottom", "top")]
    return torch.where(batch["forget"][:, 1:], *sides)


@pytest.mark.parametrize("lora", TRAINED, ids=TRAINED.values())
def test_step(benchmark, report: Report, lora: bool):
    model, batch = make_model(VOCABULARY, HIDDEN_SIZE, LAYERS, lora, DEVICE), make_batch(VOCABULARY, DEVICE)
    reference = copy.deepcopy(model).requires_grad_(False)
    boundary = boundaries_of(reference, batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def with_clean_gradients(step: Callable[[], Tensor]) -> Tensor:
        model.zero_grad()
        return step()

    steps = {
        "ours": lambda: with_clean_gradients(lambda: our_step(model, boundary, batch)),
        "released, five forwards": lambda: with_clean_gradients(lambda: released_step(model, reference, batch)),
    }
    check_equal(model, steps.values())
    times = measure.medians(steps, DEVICE)
    benchmark.pedantic(steps["ours"], rounds=1)
    row, model_name = TRAINED[lora], f"Llama of {HIDDEN_SIZE} × {LAYERS}"
    title = f"One step, {ROWS} + {ROWS} rows of {TOKENS} tokens, {model_name}, V = {VOCABULARY}, float32"
    ratio = times["released, five forwards"] / times["ours"]
    report.add(title, row, "released time / our time", ratio)
    for name, step in steps.items():
        report.add(title, row, f"peak MiB, {name}", measure.peak_bytes(step, trained, DEVICE) / 2**20)
    weights = sum(parameter.nbytes for parameter in reference.parameters()) / 2**20
    report.add(title, row, "MiB of a second model, theirs alone", weights)
