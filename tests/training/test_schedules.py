"""How strongly EUATrainer pushes at which step, and when it has pushed enough."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from eua import EUATrainer
from eua.methods.objective import scheduled
from eua.training.checkpoints import last_checkpoint
from tests.conftest import tiny_llama
from tests.training.test_evaluation import evaluated
from tests.training.test_trainer import add_dropout, make, weights


def test_gamma_rises_then_stays_or_falls():
    def of_steps(schedule, warmup_ratio):
        return [scheduled(2.0, schedule, warmup_ratio, step, 8) for step in range(8)]

    assert of_steps("constant", 0.0) == [2.0] * 8
    assert of_steps("constant", 0.5) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert of_steps("linear", 0.0) == [2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]
    assert of_steps("linear", 0.5) == [0.0, 0.5, 1.0, 1.5, 2.0, 1.5, 1.0, 0.5]
    assert of_steps("cosine", 0.0) == pytest.approx([1 + math.cos(math.pi * step / 8) for step in range(8)])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_scheduled_training_resumes_to_the_same_weights(tokenizer, rows, tmp_path, schedule):
    """Each step uses the γ that is logged, and a resumed run goes on with it."""
    how = {"gamma": 3.0, "gamma_schedule": schedule, "gamma_warmup_ratio": 0.4, "save_strategy": "steps", "save_steps": 4}
    whole = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, **how)
    whole.train()
    lines = whole.state.log_history[:6]
    assert [line["gamma"] for line in lines] == [scheduled(3.0, schedule, 0.4, step, 6) for step in range(6)]
    for line in lines:
        assert line["loss"] == pytest.approx(line["gamma"] * (line["loss_forget"] + line["loss_retain"]) + line["nll_retain"])

    resumed = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [line["gamma"] for line in resumed.state.log_history[4:6]] == [line["gamma"] for line in lines[4:]]
    assert all(torch.equal(p, weights(resumed.model)[name]) for name, p in weights(whole.model).items())


def test_the_margin_rises_as_it_is_set(tokenizer, rows, tmp_path):
    """Each step's loss is that of its share of the margin, whose NLLs no batch of this model reaches."""
    how = {"margin": 50.0, "answer_energy": 0.0, "gamma": 1e-4, "forget_warmup_ratio": 0.5, "alpha": 0.0}
    trainer = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, **how)
    trainer.train()
    lines = trainer.state.log_history[:6]
    for step, line in enumerate(lines):
        margin = 50.0 * min(1.0, step / 3)
        if margin:
            assert line["loss_forget"] == pytest.approx((margin - line["nll_forget"]) ** 2, rel=0.05)
        else:
            assert line["loss_forget"] == 0


SURE = {"learning_rate": 5e-4, "num_train_epochs": 8, "save_strategy": "steps", "save_steps": 100, "logging_steps": 7}


def stopping(tokenizer, rows, folder: Path, **options) -> EUATrainer:
    model = tiny_llama(len(tokenizer))
    add_dropout(model, 0.1)
    torch.manual_seed(5)
    return evaluated(model, tokenizer, rows, folder, **SURE | options)


@pytest.fixture(scope="module")
def shares(tokenizer, rows, tmp_path_factory) -> list[float]:
    """The share of forget tokens met in each of eight epochs, as a run that logs once an epoch reports it."""
    trainer = stopping(tokenizer, rows, tmp_path_factory.mktemp("shares"), logging_steps=3, save_strategy="no")
    trainer.train()
    return [line["beyond_boundary_forget"] for line in trainer.state.log_history if "beyond_boundary_forget" in line]


def test_training_ends_after_the_epoch_that_met_enough(tokenizer, rows, tmp_path, shares):
    wanted = shares[3]
    ends = next(epoch for epoch, share in enumerate(shares, 1) if share >= wanted)
    assert 1 < ends < 8
    trainer = stopping(tokenizer, rows, tmp_path, stop_when_beyond_boundary=wanted, eval_strategy="steps", eval_steps=100)
    trainer.train()
    assert trainer.state.global_step == 3 * ends
    assert last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{3 * ends}"
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [3 * ends]

    again = stopping(tokenizer, rows, tmp_path, stop_when_beyond_boundary=wanted)  # it had ended: nothing is trained on
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 * ends
    assert all(torch.equal(p, weights(again.model)[name]) for name, p in weights(trainer.model).items())


@pytest.mark.parametrize("before", [1, 2, 3], ids=["two steps before", "a step before", "an epoch before"])
def test_a_resumed_run_ends_after_the_same_epoch(tokenizer, rows, tmp_path, shares, before):
    """The epoch is counted whole, though its first steps were made before the interruption."""
    wanted = shares[3]
    ends = next(epoch for epoch, share in enumerate(shares, 1) if share >= wanted)
    whole = stopping(tokenizer, rows, tmp_path, stop_when_beyond_boundary=wanted, save_steps=1)
    whole.train()
    resumed = stopping(tokenizer, rows, tmp_path, stop_when_beyond_boundary=wanted, save_steps=100)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{3 * ends - before}"))
    assert resumed.state.global_step == whole.state.global_step == 3 * ends
    assert resumed._stop_when_beyond_boundary.last_epoch == pytest.approx(wanted)
    assert all(torch.equal(p, weights(resumed.model)[name]) for name, p in weights(whole.model).items())


def test_training_that_never_meets_enough_runs_to_its_end(tokenizer, rows, tmp_path):
    trainer = stopping(tokenizer, rows, tmp_path, stop_when_beyond_boundary=1.0, m_in=0.0, m_out=1e6, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 6


def test_tensorboard_shows_the_parts_of_the_loss(tokenizer, rows, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = evaluated(
        tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, report_to="tensorboard", eval_strategy="epoch", logging_steps=2
    )
    trainer.train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    shown = accumulator.EventAccumulator(str(events)).Reload()
    logged = [line for line in trainer.state.log_history if "loss_forget" in line]
    for name in ("loss", "loss_forget", "loss_retain", "nll_retain", "beyond_boundary_forget", "energy_forget", "gamma"):
        points = shown.Scalars(f"train/{name}")
        assert [(point.step, point.value) for point in points] == [(line["step"], pytest.approx(line[name])) for line in logged]
    assert [point.step for point in shown.Scalars("eval/auroc")] == [3, 6]
