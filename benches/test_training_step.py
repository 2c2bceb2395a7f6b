"""One training step: ours against the step that the authors of D² released, on the same model and batch.

    pytest benches/test_training_step.py --benchmark-only

The released step (written here from the method's definition, for this comparison alone) runs the retain rows twice, once for
their energy and once for their likelihood, and the reference on both: five forwards, three of them with a backward, all with
logits, and two models in memory. Ours runs forget and retain rows together, once, without logits, against boundaries that were
computed before. Loss and gradients must be equal before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import measure
import pytest
import torch
from conftest import DEVICE
from peft import LoraConfig, get_peft_model
from report import Report
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from eua.hidden import hidden_states, output_head
from eua.losses import d2_loss
from eua.scoring import token_energies

ROWS, TOKENS, PROMPT, VOCABULARY = 8, 64, 16, 32000
RHO, GAMMA, ALPHA = 0.1, 0.05, 1.0
Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    report = Report(f"training-step-{DEVICE}", "pytest benches/test_training_step.py --benchmark-only", DEVICE)
    yield report
    report.write()
    print(f"\n\n{report}\n\nWritten to {report.path}.")


def make_model(lora: bool) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(DEVICE)
    with torch.no_grad():
        model.lm_head.weight *= 10.0  # logits of some size, so that boundaries are violated on both sides
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")) if lora else model


def make_batch() -> Batch:
    """Forget rows, then retain rows; the prompt's tokens do not count."""
    ids = torch.randint(0, VOCABULARY, (2 * ROWS, TOKENS), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels = ids.masked_fill(torch.arange(TOKENS, device=DEVICE) < PROMPT, -100)
    forget = torch.arange(2 * ROWS, device=DEVICE) < ROWS
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "forget": forget}


def released_step(model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
    """Five forwards with logits; each part of the loss is carried backward on its own."""
    counted = batch["labels"][:, 1:] != -100

    def logits(model: nn.Module, rows: Tensor) -> Tensor:
        """Of the counted tokens of these rows, (tokens, V)."""
        output = model(input_ids=batch["input_ids"][rows], attention_mask=batch["attention_mask"][rows], use_cache=False)
        return output.logits[:, :-1][counted[rows]].float()

    def boundary(rows: Tensor, largest: bool) -> Tensor:
        with torch.no_grad():
            z = logits(reference, rows)
            k = int(RHO * VOCABULARY)
            kept = z.topk(k, largest=largest).values
            return -torch.logsumexp(torch.cat([kept, kept.new_zeros(len(z), VOCABULARY - k)], dim=1), dim=1)

    forget, retain = batch["forget"], ~batch["forget"]
    m_out, m_in = boundary(forget, largest=False), boundary(retain, largest=True)
    part_forget = GAMMA * (m_out + torch.logsumexp(logits(model, forget), dim=1)).relu().square().mean()
    part_forget.backward()
    part_retain = GAMMA * (-torch.logsumexp(logits(model, retain), dim=1) - m_in).relu().square().mean()
    part_retain.backward()
    targets = batch["labels"][:, 1:][counted & retain[:, None]]
    part_nll = ALPHA * nn.functional.cross_entropy(logits(model, retain), targets)
    part_nll.backward()
    return (part_forget + part_retain + part_nll).detach()


def our_step(model: nn.Module, boundary: Tensor, batch: Batch) -> Tensor:
    """What EUATrainer.compute_loss does, and its backward."""
    energy, nll = token_energies(model, batch, 1.0)
    counted = batch["labels"][:, 1:] != -100
    loss = d2_loss(energy, nll, boundary, batch["forget"][:, None], counted, gamma=GAMMA, alpha=ALPHA).loss
    loss.backward()
    return loss.detach()


@torch.no_grad()
def boundaries_of(model: nn.Module, batch: Batch) -> Tensor:
    hidden, head = hidden_states(model, batch)[:, :-1], output_head(model)
    sides = [head.tail_energy(hidden, RHO, side, "zero", 1.0) for side in ("bottom", "top")]
    return torch.where(batch["forget"][:, None], *sides)


@pytest.mark.parametrize("lora", [False, True], ids=["everything trainable", "LoRA, frozen head"])
def test_step(benchmark, report: Report, lora: bool):
    model, batch = make_model(lora), make_batch()
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
    results = {}
    for name, step in steps.items():
        loss = step()
        results[name] = [loss, *(parameter.grad.clone() for parameter in trained if parameter.grad is not None)]
    for ours, theirs in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert any(gradient.any() for gradient in results["ours"][1:])

    times = measure.medians(steps, DEVICE)
    benchmark.pedantic(steps["ours"], rounds=1)
    row = "LoRA on all inner layers, frozen head" if lora else "everything trainable"
    title = f"One step, {ROWS} + {ROWS} rows of {TOKENS} tokens, Llama of 384 × 6, V = {VOCABULARY}, float32"
    ratio = times["released, five forwards"] / times["ours"]
    report.add(title, row, "released time / our time", ratio)
    for name, step in steps.items():
        report.add(title, row, f"peak MiB, {name}", measure.peak_bytes(step, trained, DEVICE) / 2**20)
    weights = sum(parameter.nbytes for parameter in reference.parameters()) / 2**20
    report.add(title, row, "MiB of a second model, theirs alone", weights)
