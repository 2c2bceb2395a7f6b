"""Benchmark of one training step of every method, and of EUA with each of its options that D² does not have, on the same
model and rows, through ``EUATrainer``.

    pytest benches/test_methods.py --benchmark-only

Methods that need answers in place of the forgotten ones run these rows, too, and those that compare with the model before
unlearning run or keep it: that is what they cost. GradAscent and CE-U have no rows to retain. Quantities of the model before
unlearning that are computed once, at the start of a training, are not part of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import pytest
from conftest import DEVICE, filled
from report import Report
from steps import ROWS, make_model
from torch import Tensor

from eua import EUAConfig, EUATrainer
from eua.demo.target import train_tokenizer
from eua.demo.world import make_world
from eua.methods.table import METHODS

HIDDEN_SIZE, LAYERS, VOCABULARY = 256, 4, 32000
# EUA's options that change a step. That of distinct_directions trains an adapter, the others train all weights.
OPTIONS: dict[str, dict[str, Any]] = {
    "eua, margin": {"margin": 4.0, "margin_excess": 1.0, "forget_warmup_ratio": 0.7},
    "eua, prompt_energy": {"prompt_energy": 1.0},
    "eua, forget_tokens": {"forget_tokens": "key"},
    "eua, retain_sampler": {"retain_sampler": "similar"},
    "eua, gradient_filter": {"gradient_filter": 4},
    "eua, sign_gate": {"sign_gate": True},
    "eua, distinct_directions": {"distinct_directions": 64},
}
COMPARED = "grad_diff"  # one forward and one backward pass of the rows to forget and of those to retain, nothing else


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    yield from filled(request, f"methods-{DEVICE}", "pytest benches/test_methods.py --benchmark-only")


def steps_of(folder: Path) -> dict[str, tuple[EUATrainer, Callable[[], Tensor]]]:
    """A trainer of every method and option that has taken one step, and a function that computes the gradients of another."""
    world = make_world(40)
    facts = [fact.row() | {"keys": [fact.value]} for fact in world.all()]
    tokenizer = train_tokenizer(facts, 1024)
    base = make_model(VOCABULARY, HIDDEN_SIZE, LAYERS, lora=False, device=DEVICE)
    forget = [row | {"alternatives": [other["answer"]]} for row, other in zip(facts[:ROWS], facts[ROWS:], strict=False)]
    made = {}
    for name in (*METHODS, *OPTIONS):
        method = "eua" if name in OPTIONS else name
        options = {"per_device_train_batch_size": ROWS, "max_steps": 1, "learning_rate": 0.0, "report_to": "none"}
        options |= {"layer": LAYERS // 2} if "layer" in METHODS[method].settings else OPTIONS.get(name, {})
        config = EUAConfig(output_dir=str(folder / name), method=method, save_strategy="no", disable_tqdm=True, **options)
        trainer = EUATrainer(
            copy.deepcopy(base),
            config,
            forget_dataset=forget,
            retain_dataset=facts[-4 * ROWS :],
            processing_class=tokenizer,
            ref_model=base if config.needs_model_before else None,
        )
        trainer.train()
        made[name] = (trainer, _step(trainer))
    return made


def _step(trainer: EUATrainer) -> Callable[[], Tensor]:
    batch = next(iter(trainer.get_train_dataloader()))

    def step() -> Tensor:
        trainer.model.zero_grad()
        return trainer.training_step(trainer.model, batch)

    return step


def test_methods(benchmark, report: Report, tmp_path: Path):
    made = steps_of(tmp_path)
    times = measure.medians({method: step for method, (_, step) in made.items()}, DEVICE)
    benchmark.pedantic(made["eua"][1], rounds=1)
    title = f"One step, {ROWS} + {ROWS} rows, Llama of {HIDDEN_SIZE} × {LAYERS}, V = {VOCABULARY}, float32"
    for name, (trainer, step) in made.items():
        trained = list(trainer.model.parameters())
        report.add(title, name, f"time / that of {COMPARED}", times[name] / times[COMPARED])
        report.add(title, name, "peak MiB", measure.peak_bytes(step, trained, DEVICE) / 2**20)
    assert times["grad_ascent"] < times[COMPARED]  # it runs half of the rows
