"""Evaluation on held-out rows while EUATrainer trains, and what is chosen by it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from eua import EUAError, EUATrainer
from eua.guard.scores import prompt_scores
from eua.statistics import auroc
from eua.training.boundaries import compute_boundaries
from eua.training.checkpoints import last_checkpoint
from eua.training.config import EVAL_METRICS
from tests.conftest import tiny_llama
from tests.methods.test_d2 import transcription
from tests.training.test_trainer import LORA, add_dropout, config, make, weights


def evaluated(model, tokenizer, rows, folder, peft_config=None, **options) -> EUATrainer:
    """A trainer with held-out rows: other ones than it trains on."""
    held_out = {"eval_forget_dataset": rows["forget"][6:], "eval_retain_dataset": rows["retain"][9:14]}
    return make(model, tokenizer, rows, folder, peft_config, passed=held_out, **options)


def test_evaluation_is_the_method_on_held_out_rows(model, tokenizer, rows, tmp_path):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4
    settings = {"alpha": 0.5, "gamma": 0.2, "temperature": 2.0, "rho": 0.3, "per_device_eval_batch_size": 2}
    trainer = evaluated(model, tokenizer, rows, tmp_path, **settings)
    trainer._find_boundaries(resuming=False)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    add_dropout(model, 0.5)
    model.train()
    found = trainer.evaluate()
    assert model.training
    model.eval()

    logits, ref_logits, targets, forget, energies = [], [], [], [], {"forget": [], "retain": []}
    for kind, of_kind in energies.items():
        for row in trainer.encoded_rows[f"eval_{kind}"]:
            ids = torch.tensor([row.input_ids])
            answer = slice(row.prompt_length - 1, len(row.input_ids) - 1)
            logits.append(model(ids).logits[0, answer].double().detach())
            ref_logits.append(reference(ids).logits[0, answer].double().detach())
            targets += row.answer_ids
            forget += [kind == "forget"] * len(row.answer_ids)
            of_kind.append(-2 * torch.logsumexp(logits[-1] / 2, -1))
    expected = transcription(
        torch.cat(logits), torch.cat(ref_logits), torch.tensor(targets), torch.tensor(forget), 0.3, 2.0, 0.2, 0.5
    )
    assert found["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    parts = 0.2 * (found["eval_loss_forget"] + found["eval_loss_retain"]) + 0.5 * found["eval_nll_retain"]
    assert found["eval_loss"] == pytest.approx(parts)
    for kind, of_kind in energies.items():
        assert found[f"eval_energy_{kind}"] == pytest.approx(float(torch.cat(of_kind).mean()), rel=1e-5)
    scores = {
        kind: prompt_scores(
            model, [row.input_ids[: row.prompt_length] for row in trainer.encoded_rows[f"eval_{kind}"]], temperature=2.0
        )
        for kind in energies
    }
    assert found["eval_auroc"] == auroc(scores["forget"], scores["retain"])
    assert "eval_kl_retain" not in found
    others = {"eval_runtime", "eval_samples_per_second", "epoch"}
    left_out = {name for name in EVAL_METRICS if name in ("kl_retain", "hidden_retain") or "_prompt_" in name}
    assert {f"eval_{name}" for name in EVAL_METRICS.keys() - left_out} == set(found) - others
    assert len(trainer.state.log_history) == 1


def test_shares_met_are_those_of_the_held_out_rows(model, tokenizer, rows, tmp_path):
    """Boundaries that every token, or none, lies beyond."""
    for m_in, m_out, forget, retain in ((100.0, 100.0, 0, 1), (-100.0, -100.0, 1, 0)):
        trainer = evaluated(model, tokenizer, rows, tmp_path, m_in=m_in, m_out=m_out)
        found = trainer.evaluate(metric_key_prefix="test")
        assert (found["test_beyond_boundary_forget"], found["test_beyond_boundary_retain"]) == (forget, retain)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_run_with_evaluation_ends_with_the_weights_of_one_without(tokenizer, rows, tmp_path, peft_config):
    trained, logs = [], []
    for strategy in ("no", "steps", "epoch"):
        model = tiny_llama(len(tokenizer))
        add_dropout(model, 0.1)
        set_seed(5)
        how = {"eval_strategy": strategy, "eval_steps": 1, "logging_steps": 2}
        trainer = evaluated(model, tokenizer, rows, tmp_path / strategy, copy.deepcopy(peft_config), **how)
        trainer.train()
        trained.append(weights(trainer.model))
        logs.append([{k: v for k, v in line.items() if "loss" in line and k != "epoch"} for line in trainer.state.log_history])
        assert sum("eval_loss" in line for line in trainer.state.log_history) == {"no": 0, "steps": 6, "epoch": 2}[strategy]
    for other in trained[1:]:
        assert all(torch.equal(parameter, other[name]) for name, parameter in trained[0].items())
    training_lines = [
        [line for line in log if line] for log in logs
    ]  # nor does a window of the log lose steps to an evaluation
    assert training_lines[0] == training_lines[1] == training_lines[2]


def test_boundaries_of_held_out_rows_are_kept_with_the_others(model, tokenizer, rows, tmp_path, monkeypatch):
    computed = []

    def counting(*args, **kwargs):
        computed.append(args[2])
        return compute_boundaries(*args, **kwargs)

    monkeypatch.setattr("eua.training.boundaries.compute_boundaries", counting)
    first = evaluated(model, tokenizer, rows, tmp_path)._find_boundaries(resuming=False)
    again = evaluated(model, tokenizer, rows, tmp_path)._find_boundaries(resuming=True)
    assert computed == ["forget", "retain", "eval_forget", "eval_retain"]
    assert all(torch.equal(a, b) for kind in first for a, b in zip(first[kind], again[kind], strict=True))
    with pytest.raises(EUAError, match="belongs to another model, other rows or other settings"):
        make(model, tokenizer, rows, tmp_path)._find_boundaries(resuming=True)


class Metric(TrainerCallback):
    """Replaces the AUROC of each evaluation by the next of ``values``, and may interrupt a step."""

    def __init__(self, monkeypatch, values: list[float], interrupt_at: int | None = None) -> None:
        self.values, self.interrupt_at = list(values), interrupt_at
        monkeypatch.setattr("eua.training.evaluation.auroc", lambda forget, retain: self.values.pop(0))

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)


class Weights(TrainerCallback):
    """Keeps the weights of every step."""

    def __init__(self) -> None:
        self.of: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.of[state.global_step] = weights(model)


BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_auroc",
    "eval_strategy": "steps",
    "save_strategy": "steps",
}


def is_those(model, kept: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_the_best_model_is_kept_and_loaded(tokenizer, rows, tmp_path, monkeypatch, peft_config):
    """Step 3 is best. Checkpoints are due at 2, 4 and 6 only, and only the newest and the best are kept."""
    how = BEST | {"eval_steps": 1, "save_steps": 2, "save_total_limit": 1}
    trainer = evaluated(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, copy.deepcopy(peft_config), **how)
    seen: list[list[str]] = []
    kept = Weights()
    trainer.add_callback(kept)
    trainer.add_callback(Metric(monkeypatch, [0.5, 0.4, 0.9, 0.8, 0.7, 0.6]))
    save = EUATrainer._save_checkpoint

    def listing(self, model, trial):
        save(self, model, trial)
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        state = json.loads((tmp_path / f"checkpoint-{self.state.global_step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / seen[-1][0])

    monkeypatch.setattr(EUATrainer, "_save_checkpoint", listing)
    trainer.train()
    assert seen == [
        ["checkpoint-1"],
        ["checkpoint-1", "checkpoint-2"],
        ["checkpoint-3"],
        ["checkpoint-3", "checkpoint-4"],
        ["checkpoint-3", "checkpoint-6"],
    ]
    assert trainer.state.best_global_step == 3
    assert is_those(trainer.model, kept.of[3])
    assert not is_those(trainer.model, kept.of[6])
    assert not trainer.model.training


@pytest.mark.parametrize("stop", [3, 4])
def test_an_interrupted_run_resumes_to_the_same_best_model(tokenizer, rows, tmp_path, monkeypatch, stop):
    """Step 2 is best. The interruption neither loads it nor deletes the checkpoint that the resumed run needs; step 3 ends an
    epoch, whose evaluation comes after the checkpoint that the interruption asked for."""
    how = BEST | {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 3, "save_total_limit": 1}
    values = [0.9, 0.5, 0.7]

    def fresh(folder: Path) -> EUATrainer:
        return evaluated(tiny_llama(len(tokenizer)), tokenizer, rows, folder, **how)

    whole = fresh(tmp_path / "whole")
    whole.add_callback(Metric(monkeypatch, values))
    whole.train()
    assert whole.state.best_global_step == 3

    broken, metric = fresh(tmp_path / "broken"), Metric(monkeypatch, values, interrupt_at=stop)
    broken.add_callback(metric)
    with pytest.raises(KeyboardInterrupt, match=f"after step {stop}"):
        broken.train()
    assert last_checkpoint(tmp_path / "broken") == tmp_path / "broken" / f"checkpoint-{stop}"
    shutil.move(tmp_path / "broken", tmp_path / "moved")  # what is best is found by its step, wherever the run lies
    resumed = fresh(tmp_path / "moved")
    resumed.add_callback(Metric(monkeypatch, metric.values))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_metric == 0.9
    assert is_those(resumed.model, weights(whole.model))


@pytest.mark.parametrize(
    ("metric", "best"), [("eval_loss_forget", 1), ("eval_energy_retain", 1), ("eval_beyond_boundary_forget", 2)]
)
def test_it_is_known_which_way_a_metric_is_better(metric, best, tmp_path):
    settings = config(tmp_path, metric_for_best_model=metric)
    assert settings.greater_is_better == (best == 2)
    assert config(tmp_path, metric_for_best_model=metric, greater_is_better=best == 1).greater_is_better == (best == 1)


@pytest.mark.parametrize(
    ("options", "passed", "text"),
    [
        (
            {"eval_strategy": "epoch"},
            (),
            "eval_strategy = 'epoch' was set, but there are no rows .* pass eval_forget_dataset and eval_retain_dataset",
        ),
        ({"eval_on_start": True}, (), "eval_on_start = True was set, but there are no rows to evaluate on: pass"),
        ({}, ("forget",), "eval_forget_dataset was given without eval_retain_dataset, but .* compares .* pass both"),
        ({}, ("retain",), "eval_retain_dataset was given without eval_forget_dataset, but .* compares .* pass both"),
    ],
)
def test_evaluation_without_rows_is_told_what_to_pass(model, tokenizer, rows, tmp_path, options, passed, text):
    held_out = {f"eval_{kind}_dataset": rows[kind] for kind in passed}
    with pytest.raises(EUAError, match=text):
        make(model, tokenizer, rows, tmp_path, passed=held_out, **options)


def test_evaluate_says_what_it_cannot_work_on(model, tokenizer, rows, tmp_path):
    with pytest.raises(
        EUAError, match="no rows to evaluate on: pass eval_forget_dataset and eval_retain_dataset to EUATrainer"
    ):
        make(model, tokenizer, rows, tmp_path).evaluate()
    with pytest.raises(EUAError, match="was given a dataset, but boundaries .* come from the model before training: pass"):
        evaluated(model, tokenizer, rows, tmp_path).evaluate(rows["forget"])
    with pytest.raises(EUAError, match="Row 0 of the eval forget set has no answer"):
        make(
            model,
            tokenizer,
            rows,
            tmp_path,
            passed={"eval_forget_dataset": [{"question": "Who?", "answer": ""}], "eval_retain_dataset": rows["retain"]},
        )
