"""A run trains on the same tokens on whatever day it is resumed, although its chat template writes the date."""

from __future__ import annotations

import json
import shutil
from datetime import datetime

import pytest
import torch
from transformers import TrainerCallback

from eua import EUAError
from eua.cli.main import main
from eua.data.dates import at_date
from eua.data.rows import encode_rows, rows_digest
from eua.files import write_jsonl
from tests.conftest import tiny_llama
from tests.data.test_dates import CHAT, DATED, THEN, clock, with_template  # noqa: F401
from tests.training.test_trainer import make, weights


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == 2


@pytest.fixture
def dated(tokenizer, clock, monkeypatch):  # noqa: F811
    """A tokenizer whose template writes the date of ``clock``."""
    monkeypatch.setattr("eua.training.run_date.datetime", clock)
    return with_template(tokenizer, DATED + CHAT)


@pytest.mark.parametrize("boundaries", [{}, {"m_in": -6.0, "m_out": -5.0}], ids=["computed", "constant"])
def test_a_run_resumes_on_the_next_day(dated, rows, tmp_path, clock, boundaries):  # noqa: F811
    def run(folder, callbacks=(), **how):
        trainer = make(tiny_llama(len(dated)), dated, rows, tmp_path / folder, **boundaries, passed={"callbacks": [*callbacks]})
        trainer.train(**how)
        return trainer

    whole = run("whole")
    run("broken", [Stop()])
    clock.moment = datetime(2026, 3, 2)
    again = run("broken", resume_from_checkpoint=True)
    assert again.encoded_rows == whole.encoded_rows
    assert all(torch.equal(p, weights(whole.model)[name]) for name, p in weights(again.model).items())
    assert run("another day").encoded_rows != whole.encoded_rows
    digest = rows_digest(encode_rows(rows["forget"][:6], at_date(dated, THEN), 1024))
    card = again.model_card()
    assert digest in card
    assert 'read_rows("forget.jsonl"), at_date(tokenizer, datetime.fromisoformat("2026-03-01T04:05:06")), 1024)' in card


def test_a_checkpoint_in_another_folder_brings_its_date(dated, rows, tmp_path, clock):  # noqa: F811
    first = make(tiny_llama(len(dated)), dated, rows, tmp_path / "first", passed={"callbacks": [Stop()]})
    first.train()
    clock.moment = datetime(2026, 3, 2)
    second = make(tiny_llama(len(dated)), dated, rows, tmp_path / "second")
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert second.encoded_rows == first.encoded_rows
    assert read_date(tmp_path / "second") == THEN


def read_date(folder) -> datetime:
    return datetime.fromisoformat(json.loads((folder / "run_date.json").read_text())["began"])


def test_a_new_run_in_an_old_folder_begins_today(dated, rows, tmp_path, clock):  # noqa: F811
    make(tiny_llama(len(dated)), dated, rows, tmp_path, passed={"callbacks": [Stop()]}).train()
    clock.moment = datetime(2026, 3, 2)
    today = encode_rows(rows["forget"][:6], dated, 1024)
    trainer = make(tiny_llama(len(dated)), dated, rows, tmp_path)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    trainer.train()
    assert trainer.encoded_rows["forget"] == today
    assert read_date(tmp_path) == trainer.date == clock.moment


def test_the_command_overwrites_the_date(dated, rows, tmp_path, clock):  # noqa: F811
    tiny_llama(len(dated)).save_pretrained(tmp_path / "model")
    dated.save_pretrained(tmp_path / "model")
    command = ["unlearn", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--max-steps", "1"]
    for name in ("forget", "retain"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows[name][:6])
        command += [f"--{name}", str(tmp_path / f"{name}.jsonl")]
    assert main(command) == 0
    clock.moment = datetime(2026, 3, 2)
    assert main([*command, "--overwrite", "--rho", "2"]) == 2
    assert read_date(tmp_path / "out" / "checkpoints") == THEN
    assert main([*command, "--overwrite"]) == 0
    assert read_date(tmp_path / "out" / "checkpoints") == clock.moment


def test_evaluation_before_resuming_keeps_the_date(dated, rows, tmp_path, clock):  # noqa: F811
    held_out = {"eval_forget_dataset": rows["forget"][6:], "eval_retain_dataset": rows["retain"][9:12]}
    make(tiny_llama(len(dated)), dated, rows, tmp_path, passed={"callbacks": [Stop()]} | held_out).train()
    clock.moment = datetime(2026, 3, 2)
    again = make(tiny_llama(len(dated)), dated, rows, tmp_path, passed=held_out)
    again.evaluate()
    assert read_date(tmp_path) == again.date == THEN
    again.train(resume_from_checkpoint=True)


def test_a_run_date_that_cannot_be_read_is_not_guessed(dated, rows, tmp_path):
    make(tiny_llama(len(dated)), dated, rows, tmp_path, passed={"callbacks": [Stop()]}).train()
    (tmp_path / "run_date.json").write_text('{"began": "yest')
    trainer = make(tiny_llama(len(dated)), dated, rows, tmp_path)
    with pytest.raises(EUAError, match=r"run_date.json, which holds the date .* cannot be read .* put it back, or write"):
        trainer.train(resume_from_checkpoint=True)


def test_other_templates_leave_no_date(tokenizer, rows, tmp_path):
    make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, max_steps=1).train()
    assert not (tmp_path / "run_date.json").exists()
