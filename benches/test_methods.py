"""Benchmark of one training step of every method, on the same model and rows, through ``EUATrainer``.

    pytest benches/test_methods.py --benchmark-only

Methods that need answers in place of the forgotten ones run these rows, too, and those that compare with the model before
unlearning run or keep it: that is what they cost. GradAscent and CE-U have no rows to retain. Quantities of the model before
unlearning that are computed once, at the start of a training, are not part of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

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
COMPARED = "grad_diff"  # one forward and one backward pass of the rows to forget and of those to retain, nothing else


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    yield from filled(request, f"methods-{DEVICE}", "pytest benches/test_methods.py --benchmark-only")


def steps_of(folder: Path) -> dict[str, tuple[EUATrainer, Callable[[], Tensor]]]:
    """A trainer of every method that has taken one step, and a function that computes the gradients of another one."""
    world = make_world(40)
    facts = [fact.row() for fact in world.all()]
    tokenizer = train_tokenizer(facts, 1024)
    base = make_model(VOCABULARY, HIDDEN_SIZE, LAYERS, lora=False, device=DEVICE)
    forget = [row | {"alternatives": [other["answer"]]} for row, other in zip(facts[:ROWS], facts[ROWS:], strict=False)]
    made = {}
    for method in METHODS:
        options = {"per_device_train_batch_size": ROWS, "max_steps": 1, "learning_rate": 0.0, "report_to": "none"}
        options |= {"layer": LAYERS // 2} if "layer" in METHODS[method].settings else {}
        config = EUAConfig(output_dir=str(folder / method), method=method, save_strategy="no", disable_tqdm=True, **options)
        trainer = EUATrainer(
            copy.deepcopy(base),
            config,
            forget_dataset=forget,
            retain_dataset=facts[-4 * ROWS :],
            processing_class=tokenizer,
            ref_model=base if config.needs_model_before else None,
        )
        trainer.train()
        made[method] = (trainer, _step(trainer))
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
    for method, (trainer, step) in made.items():
        trained = list(trainer.model.parameters())
        report.add(title, method, f"time / that of {COMPARED}", times[method] / times[COMPARED])
        report.add(title, method, "peak MiB", measure.peak_bytes(step, trained, DEVICE) / 2**20)
    assert times["grad_ascent"] < times[COMPARED]  # it runs half of the rows
