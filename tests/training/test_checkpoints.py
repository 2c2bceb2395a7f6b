"""Checkpoints are whole or absent whatever the moment of a kill, and what had ended is not trained on."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eua import EUAError, EUATrainer
from eua.training.checkpoints import CheckpointingTrainer, last_checkpoint
from tests.conftest import tiny_llama
from tests.test_files import locked_elsewhere
from tests.training.test_evaluation import BEST, Metric, evaluated
from tests.training.test_trainer import make, weights

OF_FILES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.unlink", "os.replace")


def killed_at(moment: int, call) -> bool:
    """Run ``call`` in a fork that dies, with no time to clean up, before its ``moment``-th operation on files."""
    child = os.fork()
    if child == 0:
        operations = itertools.count(1)

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event in OF_FILES and next(operations) == moment:
                os._exit(9)

        sys.addaudithook(hook)
        code = 1
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def assert_whole(checkpoint: Path, names: set[str], step: int) -> None:
    assert {path.name for path in checkpoint.iterdir()} == names
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
    assert load_file(checkpoint / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        assert torch.load(checkpoint / name, weights_only=True)


def assert_whole_at_any_moment(folder: Path, call, steps: set[int]) -> int:
    """Kill ``call`` at each of its operations on files in turn; return how many there are."""
    names = {path.name for path in last_checkpoint(folder).iterdir()}
    before, after = folder.with_name("before"), set()
    shutil.copytree(folder, before)
    for moment in itertools.count(1):
        is_killed = killed_at(moment, call)
        found = {int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")}
        assert found, moment
        for step in found:
            assert_whole(folder / f"checkpoint-{step}", names, step)
        assert last_checkpoint(folder) == folder / f"checkpoint-{max(found)}"
        after |= found
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        if not is_killed:
            break
    assert after == steps
    return moment - 1


def test_a_kill_at_any_moment_of_saving(model, tokenizer, rows, tmp_path, monkeypatch):
    save, counted = CheckpointingTrainer._save_checkpoint, []

    def saving(self, model, trial):
        if self.state.global_step == 4:
            counted.append(assert_whole_at_any_moment(self.output_folder, lambda: save(self, model, trial), {2, 4}))
        save(self, model, trial)

    monkeypatch.setattr(EUATrainer, "_save_checkpoint", saving)
    trainer = make(model, tokenizer, rows, tmp_path / "run", save_strategy="steps", save_steps=2, save_total_limit=1)
    trainer.train()
    assert counted[0] > 30
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_kill_at_any_moment_of_the_end(model, tokenizer, rows, tmp_path, monkeypatch):
    """With save_total_limit=1 the best checkpoint alone stays in the end."""
    log, counted = EUATrainer.log, []

    def logging(self, logs, start_time=None):
        if "train_runtime" in logs:
            counted.append(assert_whole_at_any_moment(self.output_folder, lambda: log(self, logs, start_time), {2, 6}))
        log(self, logs, start_time)

    monkeypatch.setattr(EUATrainer, "log", logging)
    trainer = evaluated(model, tokenizer, rows, tmp_path / "run", **BEST, eval_steps=2, save_steps=2, save_total_limit=1)
    trainer.add_callback(Metric(monkeypatch, [0.9, 0.5, 0.4]))
    monkeypatch.setattr("transformers.trainer.shutil", None)  # Trainer itself deletes nothing
    trainer.train()
    assert counted[0] > 3
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("steps", [4, 6], ids=["in an epoch", "with an epoch"])
def test_a_run_that_had_ended_makes_no_step_more(tokenizer, rows, tmp_path, steps):
    how = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole, again = (make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, **how) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == again.state.max_steps == steps
    assert all(torch.equal(p, weights(again.model)[name]) for name, p in weights(whole.model).items())


@pytest.mark.parametrize("change", ["missing", "cut", "other"])
def test_a_checkpoint_with_a_damaged_file_is_not_resumed_from(model, tokenizer, rows, tmp_path, change):
    """Trainer would go on without an optimizer or a scheduler, and end with other weights."""
    make(model, tokenizer, rows, tmp_path, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-6"
    again = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path)
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        if change == "missing":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] + (b"" if change == "cut" else content[: -(len(content) // 2)]))
        what = "has no files.json" if (change, path.name) == ("missing", "files.json") else f"{path.name} is missing or damaged"
        with pytest.raises(EUAError, match=rf"checkpoint-6.{what}.*: delete .*checkpoint-4.*, which is"):
            again.train(resume_from_checkpoint=True)
        path.write_bytes(content)
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-2" / "files.json").unlink()
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(EUAError, match=r"optimizer.pt is missing or damaged .*: put the file back, or start again"):
        again.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_a_list_of_files_may_be_from_an_earlier_version(model, tokenizer, rows, tmp_path):
    make(model, tokenizer, rows, tmp_path, save_strategy="steps", save_steps=2).train()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        (checkpoint / "files.json").unlink()
    again = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path)
    text = (
        r"checkpoint-6 has no files.json, .*earlier version, and such a checkpoint cannot be resumed with this one: resume it"
    )
    with pytest.raises(EUAError, match=text):
        again.train(resume_from_checkpoint=True)
    with pytest.raises(EUAError, match=r"nowhere/files.json is missing or damaged"):
        again.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_what_cannot_be_resumed_says_so(model, tokenizer, rows, tmp_path):
    with pytest.raises(EUAError, match="has no checkpoint to resume from"):
        make(model, tokenizer, rows, tmp_path).train(resume_from_checkpoint=True)
    make(model, tokenizer, rows, tmp_path, save_strategy="steps", save_steps=6, save_only_model=True).train()
    with pytest.raises(EUAError, match="has only the model, since it was saved with save_only_model"):
        make(model, tokenizer, rows, tmp_path).train(resume_from_checkpoint=True)


def test_two_processes_do_not_train_into_one_folder(model, tokenizer, rows, tmp_path):
    trainer = make(model, tokenizer, rows, tmp_path)
    with locked_elsewhere(tmp_path), pytest.raises(EUAError, match="Another process is writing into"):
        trainer.train()
    trainer.train()


def test_trainer_may_restore_callbacks(tokenizer, rows, tmp_path):
    how = {"save_strategy": "steps", "save_steps": 4, "stop_when_beyond_boundary": 1.0}
    how["restore_callback_states_from_checkpoint"] = True
    make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, **how).train()
    again = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 6
