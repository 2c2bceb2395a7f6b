"""The command line: in this process if possible, and in a process to interrupt or kill if that is the subject."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eua
from eua import EnergyGuard, EUAConfig
from eua.cli import main as main_module
from eua.cli.main import COMMANDS, main
from eua.data.sources import read_rows
from eua.files import write_jsonl
from eua.guard.guard import DEFAULT_REFUSAL
from tests.conftest import tiny_llama
from tests.test_files import locked_elsewhere


@pytest.fixture(scope="module")
def data(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("forget", "retain", "calibration", "test"):
        write_jsonl(folder / f"{name}.jsonl", [vars(fact) for fact in getattr(world, name)])
    write_jsonl(folder / "held_out.jsonl", [vars(fact) for fact in world.calibration + world.retain])
    return folder


@pytest.fixture(scope="module")
def tiny_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def unlearn_command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    files = ["--forget", str(data / "forget.jsonl"), "--retain", str(data / "retain.jsonl")]
    return ["unlearn", "--model", str(model), *files, "--output", str(output), *more]


def test_unlearn_calibrate_ask_evaluate(trained_folder, data, world, tmp_path, capsys):
    """All commands on a model that knows the facts: they are forgotten, refused, and reported."""
    output = tmp_path / "unlearned"
    settings = (
        "--learning-rate",
        "5e-4",
        "--num-train-epochs",
        "12",
        "--retain-per-forget",
        "3",
        "--per-device-train-batch-size",
        "4",
    )
    assert main(unlearn_command(trained_folder, data, output, *settings)) == 0
    AutoModelForCausalLM.from_pretrained(output)

    held_out = ["--prompts", str(data / "held_out.jsonl"), "--forget", str(data / "forget.jsonl")]
    assert main(["calibrate", "--model", str(output), *held_out, "--tolerance", "0.1", "--group-by", "person"]) == 0
    shown = capsys.readouterr().out
    assert "14 groups of the calibration prompts" in shown
    assert "Refused of 8 forgotten prompts: 1.000 (95 % interval 0.158 to 1.000, in 2 groups)" in shown

    assert main(["ask", "--model", str(output), world.forget[0].question, world.retain[0].question]) == 0
    shown = capsys.readouterr().out
    assert DEFAULT_REFUSAL in shown
    assert world.retain[0].answer in shown
    assert main(["ask", "--model", str(output), "--no-guard", world.forget[0].question]) == 0
    assert world.forget[0].answer not in capsys.readouterr().out

    probe = ["--probe-window", "2", "--probe-tokens", "16", "--tolerance", "0.1"]
    assert main(["calibrate", "--model", str(output), *held_out, *probe, "--output", str(tmp_path / "probe")]) == 0
    assert "is stopped within its first 16 tokens" in capsys.readouterr().out
    assert EnergyGuard.from_pretrained(tmp_path / "probe").probe_window == 2
    assert main(["ask", "--model", str(output), "--guard", str(tmp_path / "probe"), world.forget[0].question]) == 0
    assert "(refused: energy" in capsys.readouterr().out

    report_folder = tmp_path / "report"
    sets = [
        "--forget",
        str(data / "forget.jsonl"),
        "--retain",
        str(data / "retain.jsonl"),
        "--also",
        f"unseen={data}/test.jsonl",
    ]
    assert (
        main(["evaluate", "--model", str(output), "--before", str(trained_folder), *sets, "--output", str(report_folder)]) == 0
    )
    report = json.loads((report_folder / "report.json").read_text())
    assert report["before"]["sets"]["forget"]["extraction_strength"] > 0.8
    assert report["after"]["sets"]["forget"]["extraction_strength"] < 0.2
    assert report["after"]["sets"]["retain"]["extraction_strength"] > 0.9
    assert report["after"]["sets"]["forget"]["refused"] == 1
    assert "unseen" in report["after"]["sets"]
    assert (report_folder / "energies.png").read_bytes().startswith(b"\x89PNG")


def test_stop_strings_of_the_model_are_honoured_or_refused(tiny_folder, data, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.generation_config.stop_strings = ["\n\n"]
    shutil.copytree(tiny_folder, tmp_path / "stops")
    model.generation_config.save_pretrained(tmp_path / "stops")
    assert main(["ask", "--model", str(tmp_path / "stops"), "--no-guard", "Who?", "--max-new-tokens", "2"]) == 0
    calibrate = ["calibrate", "--model", str(tmp_path / "stops"), "--prompts", str(data / "held_out.jsonl")]
    assert main(calibrate) == 0
    for option in ("--first-tokens", "--probe-window"):
        assert main([*calibrate, option, "1"]) == 2
        assert "sets stop_strings, which scores of generated tokens do not follow: remove it" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_user_without_a_home_can_use_every_command(command, monkeypatch, capsys):
    """A container may run under any user id, which has no home and no name."""

    def unknown(user):
        raise KeyError(user)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert command != "demo" or str(Path(tempfile.gettempdir(), "eua")) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("npo", ["--preset", "openunlearning"], "| preset | openunlearning |"),
        ("undial", ["--beta", "3"], "| beta | 3 |"),  # which compares with a second model
    ],
)
def test_unlearn_with_another_method(method, more, said, tiny_folder, data, tmp_path):
    command = unlearn_command(tiny_folder, data, tmp_path / "out", "--method", method, "--num-train-epochs", "2", *more)
    assert main(command) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_folder, tmp_path / "out"))
    assert any(not torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True))
    card = ModelCard.load(tmp_path / "out" / "README.md").text
    assert f"| method | {method} |" in card
    assert said in card


def test_unlearn_with_lora_writes_an_adapter(tiny_folder, data, tmp_path):
    assert main(unlearn_command(tiny_folder, data, tmp_path / "out", "--num-train-epochs", "1", "--lora-rank", "4")) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any("lora" in name for name, _ in loaded.named_parameters())
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "peft"

    bad = unlearn_command(tiny_folder, data, tmp_path / "out", "--overwrite", "--rho", "2")
    assert main(bad) == 2
    assert (tmp_path / "out" / "checkpoints" / "settings.json").exists()  # a run that cannot start deletes nothing
    full = unlearn_command(tiny_folder, data, tmp_path / "out", "--num-train-epochs", "1", "--overwrite", "--bf16")
    assert main(full) == 0
    assert not (tmp_path / "out" / "adapter_config.json").exists()  # or it would be loaded on top of the new weights
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert "all weights, in float32 (computing in bfloat16)" in card.text


def test_options_reach_the_trainer(tiny_folder, data, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("eua.training.trainer.EUATrainer.__init__", lambda self, model, args, **kwargs: seen.update(vars(args)))
    monkeypatch.setattr("eua.training.trainer.EUATrainer.train", lambda self, **kwargs: None)
    monkeypatch.setattr("eua.training.trainer.EUATrainer.save_model", lambda self, folder: None)
    options = {
        "gamma": 0.3,
        "alpha": 0.7,
        "rho": 0.2,
        "temperature": 1.5,
        "max_length": 77,
        "learning_rate": 0.5,
        "retain_per_forget": 4,
        "seed": 9,
        "save_steps": 3,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 2,
        "retain_loss": "kl",
        "optim_args": "eps=1e-7",  # a text with a number in it
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "include_for_metrics": ["loss"],
        "warmup_steps": 0.1,
        "stop_when_beyond_boundary": None,
    }
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", json.dumps(value).strip('"'))]
    assert main(unlearn_command(tiny_folder, data, tmp_path / "out", *flags, "--bf16")) == 0
    assert {key: seen[key] for key in options} == options
    assert seen["bf16"]
    assert (seen["save_strategy"], seen["save_total_limit"]) == ("steps", 1)


def run_process(arguments: list[str], stop_when: Path | None = None, how: int = signal.SIGINT) -> subprocess.CompletedProcess:
    """``eua`` in a separate process, which gets the signal ``how`` as soon as ``stop_when`` exists."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "eua", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if stop_when is not None:
        deadline = time.monotonic() + 120
        while not stop_when.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, "the process ended before it could be interrupted"
        process.send_signal(how)
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_interrupted_unlearning_resumes_to_the_same_weights(tiny_folder, data, tmp_path, how):
    steps = ("--num-train-epochs", "60", "--per-device-train-batch-size", "1", "--save-steps", "25", "--learning-rate", "1e-3")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(unlearn_command(tiny_folder, data, whole, *steps)) == 0

    stopped = run_process(unlearn_command(tiny_folder, data, broken, *steps), broken / "checkpoints" / "checkpoint-25", how)
    assert stopped.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    if how != signal.SIGKILL:
        assert "Run the same command with --resume" in stopped.stderr
    assert not (broken / "config.json").exists()
    checkpoints = [path for path in (broken / "checkpoints").iterdir() if path.name.startswith("checkpoint-")]
    assert checkpoints
    for checkpoint in checkpoints:
        assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == int(checkpoint.name.split("-")[1])

    assert main(unlearn_command(tiny_folder, data, broken, *steps)) == 2  # no resuming by accident
    assert (
        main(unlearn_command(tiny_folder, data, broken, *steps, "--resume", "--gamma", "0.1")) == 2
    )  # nor with other settings
    assert main(unlearn_command(tiny_folder, data, broken, *steps, "--resume")) == 0
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_two_runs_do_not_share_an_output(tiny_folder, data, tmp_path, capsys):
    command = unlearn_command(tiny_folder, data, tmp_path / "out", "--max-steps", "1")
    (tmp_path / "out").mkdir()
    with locked_elsewhere(tmp_path / "out"):
        assert main(command) == 2
        assert "Another process is writing into" in capsys.readouterr().err
    assert main(command) == 0


@pytest.mark.parametrize("place", ["{model}", "{model}/.", "{model}/checkpoints/.."])
def test_the_model_before_unlearning_is_not_overwritten(place, tiny_folder, data, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    (model / "checkpoints").mkdir()
    output = Path(place.format(model=model))
    assert main(unlearn_command(model, data, output, "--overwrite")) == 2
    assert "would replace or delete the model before unlearning" in capsys.readouterr().err
    inside = tmp_path / "out" / "checkpoints" / "checkpoint-5"
    shutil.copytree(tiny_folder, inside)
    assert main(unlearn_command(inside, data, tmp_path / "out", "--overwrite")) == 2
    assert (inside / "config.json").exists()


def test_a_report_does_not_replace_its_rows(tiny_folder, data, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    shutil.copy(data / "forget.jsonl", rows)
    report = ["report", "--model", str(tiny_folder), "--forget", str(rows), "--retain", str(data / "retain.jsonl")]
    assert main([*report, "--output", str(rows), "--overwrite"]) == 2
    assert "is a file that this command reads, and would be lost" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "3", "[" * 100_000, '"text"', "[1]"])
def test_broken_settings_of_a_run_are_one_line(content, tiny_folder, data, tmp_path, capsys):
    settings = tmp_path / "out" / "checkpoints" / "settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(content)
    assert main(unlearn_command(tiny_folder, data, tmp_path / "out", "--resume")) == 2
    error = capsys.readouterr().err
    assert "settings.json, which holds the settings of the run to resume, cannot be read" in error
    assert error.count("\n") == 1


ROWS = ["--forget", "{data}/forget.jsonl", "--retain", "{data}/retain.jsonl"]
MISSING = ["--forget", "none.jsonl", "--retain", "none.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["unlearn", "--model", "{tiny}", *MISSING, "--output", "{new}"], "The forget set none.jsonl is not a file"),
        (["unlearn", "--model", "{new}", *ROWS, "--output", "{new}"], "cannot be loaded as a causal language model"),
        (["unlearn", "--model", "{tiny}", *ROWS, "--output", "{data}"], "is not empty, and its files could be lost"),
        (["unlearn", "--model", "{tiny}", *ROWS, "--output", "{new}", "--rho", "0.001"], "less than one logit"),
        (["calibrate", "--model", "{tiny}", "--prompts", "{data}/forget.jsonl"], "8 calibration prompts are too few"),
        (["calibrate", "--model", "{tiny}", "--prompts", "{data}/retain.jsonl", "--group-by", "city"], "no 'city' to group by"),
        (["calibrate", "--model", "{tiny}", "--prompts", "{data}/retain.jsonl", "--group-by", "person"], "add 9 more"),
        (["calibrate", "--model", "{tiny}", "--prompts", "{data}/retain.jsonl", "--tolerance", "2"], "tolerance = 2.0"),
        (["ask", "--model", "{tiny}", "Who?"], "contains no energy_guard.json: calibrate a guard for this model first"),
        (["calibrate", "--model", "org/name", "--prompts", "{data}/retain.jsonl"], "pass --output"),
        (["unlearn", "--model", "{tiny}", *ROWS, "--output", "{data}", "--resume"], "no interrupted run to resume"),
        (["evaluate", "--model", "{tiny}", *ROWS, "--also", "forget={data}/test.jsonl"], "gives this name to a second set"),
        (["demo", "--output", "{new}", "--people", "20"], "people = 20, but calibration needs at least 100"),
        (["demo", "--output", "{data}"], "is not empty"),
        (["evaluate", "--model", "{tiny}", *ROWS, "--output", "{data}"], "is not empty"),
        (["report", "--model", "{tiny}", *ROWS, "--output", "{data}"], "is a folder, but the output must be a file"),
        (
            ["report", "--model", "{tiny}", *ROWS, "--also-forget", "retain={data}/test.jsonl"],
            "gives this name to a second set",
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, text, tiny_folder, data, tmp_path, capsys):
    filled = [part.format(tiny=tiny_folder, data=data, new=tmp_path / "new") for part in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith(f"eua {arguments[0]}: ")]) == 1
    assert text in error[-1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["unlearn"], "eua unlearn: the following arguments are required: --model, --forget, --retain, --output. `eua unlearn"),
        (["unlern"], "eua: There is no command 'unlern': did you mean 'unlearn'? `eua --help` lists the commands."),
        (["fly"], "eua: There is no command 'fly'. `eua --help` lists the commands."),
        (
            ["demo", "--people", "-3"],
            "eua demo: argument --people: '-3' is not a whole number above 0. `eua demo --help` explains",
        ),
        (["evaluate", "--also", "x"], "argument --also: 'x' is not NAME=ROWS."),
        (["calibrate", "--refusal", " "], "argument --refusal: ' ' has no words."),
        (["calibrate", "--temperature", "inf"], "argument --temperature: 'inf' is not a finite number above 0."),
        (["serve", "--timeout", "nan"], "argument --timeout: 'nan' is not a finite number above 0."),
        (["ask", "--modl", "x", "Who?"], "the following arguments are required: --model"),
        (["ask", "--model", "x", "Who?", "--gard", "y"], "--gard is not an option of `eua ask`: did you mean '--guard'?"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, text, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert text in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--epochs", "3"], "--epochs is not an option of `eua unlearn`: did you mean '--num-train-epochs'?"),
        (["--learning-rat=3"], "--learning-rat is not an option of `eua unlearn`: did you mean '--learning-rate'?"),
        (["--output-dir", "x"], "--output-dir is not an option of `eua unlearn`: did you mean '--output'?"),
        (["--learning-rate", "fast"], "argument --learning-rate: 'fast' is not a number."),
        (["--retain-loss", "mse"], "argument --retain-loss: 'mse' is not one of nll, kl, hidden or null."),
        (["--bf16", "maybe"], "argument --bf16: 'maybe' is not true or false."),
        (["--gamma", "-1"], "gamma = -1 cannot be used: it must be finite and at least 0."),
        (["--num-train-epochs", "0"], "num_train_epochs = 0 cannot be used: it must be above 0."),
        (["--learning-rate", "-1e-5"], "learning_rate = -1e-05 cannot be used: it must be finite and at least 0."),
        (["--seed", "-1"], "seed = -1 cannot be used: it must be a whole number from 0, below 2^32."),
        (["--adam-beta1", "2"], "adam_beta1 = 2 cannot be used: it must be at least 0 and below 1."),
        (["--dataloader-num-workers", "-1"], "dataloader_num_workers = -1 cannot be used: it must be at least 0."),
        (["--lora-rank", "-1"], "--lora-rank is -1, but a rank is above 0"),
        (["--lr-scheduler-kwargs", "{min_lr: 1e-6}"], "lr_scheduler_type = 'linear' cannot be used with lr_scheduler_kwargs"),
        (["--lr-scheduler-type", "cosine_with_min_lr"], "lr_scheduler_type = 'cosine_with_min_lr' cannot be used with"),
        (["--eval-forget", "x.jsonl"], "--eval-forget was given without --eval-retain"),
        (["--load-best-model-at-end"], "--load-best-model-at-end needs rows to compare models on"),
        (
            ["--resume-from-checkpoint", "x"],
            "--resume-from-checkpoint is not an option of `eua unlearn`: did you mean '--resume'",
        ),
        (["--dataloader-prefetch-factor", "2"], "These settings cannot be used: --dataloader_prefetch_factor can only be set"),
        (["--eval-strategy", "sometimes"], "These settings cannot be used: sometimes is not a valid IntervalStrategy"),
    ],
)
def test_settings_are_checked_before_a_model_is_loaded(options, text, tiny_folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eua.model.loading.AutoModelForCausalLM", None)
    assert main(unlearn_command(tiny_folder, data, tmp_path / "new", *options)) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_tracker_that_is_not_there_is_one_line(tiny_folder, data, tmp_path, capsys):
    assert main(unlearn_command(tiny_folder, data, tmp_path / "new", "--report-to", "tensorbord")) == 2
    assert "These settings cannot be used: tensorbord is not supported" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_tokens_are_not_written_and_may_change(tiny_folder, data, tmp_path):
    command = unlearn_command(tiny_folder, data, tmp_path / "out", "--max-steps", "1")
    assert main([*command, "--hub-token", "hf_secret"]) == 0
    texts = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [text for text in texts if b"hf_secret" in text]
    assert main([*command, "--hub-token", "hf_other", "--resume"]) == 0


def test_eval_steps_are_steps(tiny_folder, data, tmp_path):
    held_out = ["--eval-forget", str(data / "forget.jsonl"), "--eval-retain", str(data / "test.jsonl")]
    steps = ["--max-steps", "2", "--eval-steps", "1", "--per-device-train-batch-size", "2"]
    assert main(unlearn_command(tiny_folder, data, tmp_path / "out", *held_out, *steps)) == 0
    (state,) = (tmp_path / "out" / "checkpoints").glob("checkpoint-2/trainer_state.json")
    assert [line["step"] for line in json.loads(state.read_text())["log_history"] if "eval_auroc" in line] == [1, 2]


@pytest.mark.parametrize("command", ["unlearn", "calibrate", "evaluate", "report"])
def test_an_output_that_cannot_be_created_is_found_first(command, tiny_folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eua.model.loading.AutoModelForCausalLM", None)
    (tmp_path / "file").touch()
    rows = ["--prompts", str(data / "held_out.jsonl")] if command == "calibrate" else ROWS
    filled = [part.format(data=data) for part in rows]
    assert main([command, "--model", str(tiny_folder), *filled, "--output", str(tmp_path / "file" / "out")]) == 2
    assert f"cannot be created, since {tmp_path / 'file'} is not a folder" in capsys.readouterr().err


def test_rows_are_checked_before_a_model_is_loaded(tiny_folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eua.model.loading.AutoModelForCausalLM", None)
    write_jsonl(tmp_path / "bad.jsonl", [{"frage": "Wer?"}])
    command = unlearn_command(tiny_folder, data, tmp_path / "new", "--forget", str(tmp_path / "bad.jsonl"))
    assert main(command) == 2
    assert "Row 0 of the forget set has the keys ['frage'], which are not a known format" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["calibrate", "--prompts", "{data}/forget.jsonl"], "8 calibration prompts are too few"),
        (["calibrate", "--prompts", "{data}/held_out.jsonl", "--tolerance", "2"], "tolerance = 2.0, but a rate"),
        (
            ["calibrate", "--prompts", "{data}/held_out.jsonl", "--temperature", "0"],
            "--temperature: '0' is not a finite number above 0",
        ),
        (["calibrate", "--prompts", "{data}/held_out.jsonl", "--first-tokens", "-1"], "'-1' is not a whole number from 0"),
        (["calibrate", "--prompts", "{bad}"], "Row 0 of the calibration prompts has the keys"),
        (["calibrate", "--prompts", "{data}/held_out.jsonl", "--forget", "{bad}"], "Row 0 of the forget set has the keys"),
        (["calibrate", "--prompts", "{data}/held_out.jsonl", "--seen", "{bad}"], "Row 0 of the seen rows has the keys"),
        (
            ["calibrate", "--prompts", "{listed}", "--tolerance", "0.5", "--group-by", "people"],
            "Group 0 is a list, which cannot be compared with others",
        ),
        (
            ["calibrate", "--prompts", "{data}/held_out.jsonl", "--group-by", "people", "--tolerance", "0.5"],
            "Row 0 of the calibration prompts has no 'people' to group by",
        ),
        (
            ["calibrate", "--prompts", "{named}", "--forget", "{listed}", "--group-by", "people", "--tolerance", "0.5"],
            "Group 0 is a list, which cannot be compared with others",
        ),
        (["evaluate", "--forget", "{bad}", "--retain", "{data}/retain.jsonl"], "Row 0 of the forget set has the keys"),
        (["report", "--forget", "{data}/forget.jsonl", "--retain", "{empty}"], "Row 0 of the retain set has no answer"),
    ],
)
def test_what_measures_a_model_checks_its_input_before_loading_it(
    arguments, text, tiny_folder, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("eua.model.loading.AutoModelForCausalLM", None)
    bad, empty = tmp_path / "bad.jsonl", tmp_path / "empty.jsonl"
    write_jsonl(bad, [{"frage": "Wer?", "antwort": "Ann."}])
    write_jsonl(empty, [{"question": "Who?", "answer": " "}])
    listed, named = tmp_path / "listed.jsonl", tmp_path / "named.jsonl"
    write_jsonl(listed, [{"question": f"Who is {i}?", "answer": "x", "people": ["Ann", str(i)]} for i in range(4)])
    write_jsonl(named, [{"question": f"Who is {i}?", "answer": "x", "people": str(i)} for i in range(4)])
    filled = [part.format(data=data, bad=bad, empty=empty, listed=listed, named=named) for part in arguments]
    monkeypatch.chdir(tmp_path)  # where `eua report` would write
    assert main([*filled, "--model", str(tiny_folder)]) == 2
    assert text in capsys.readouterr().err


def test_calibration_runs_every_prompt_once(tiny_folder, data, tmp_path, capsys, forwards):
    """With groups, whose shares are printed, too. The head is checked once, in two forwards of three rows."""
    held_out, forget = data / "held_out.jsonl", data / "forget.jsonl"
    command = ["calibrate", "--model", str(tiny_folder), "--prompts", str(held_out), "--output", str(tmp_path)]
    assert main([*command, "--forget", str(forget), "--group-by", "person", "--tolerance", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert "Groups with prompts above the threshold" in shown
    prompts = sum(len(path.read_text().splitlines()) for path in (held_out, forget))
    assert sum(forwards) == prompts + 3
    assert main([*command, "--forget", str(forget), "--tolerance", "0.1"]) == 0
    assert "if all 8 that differ are independent; it is wider if several are about one person)" in capsys.readouterr().out


def test_every_field_of_the_config_is_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["unlearn", "--help-all"])
    shown = capsys.readouterr().out
    missing = [field.name for field in dataclasses.fields(EUAConfig) if f"--{field.name.replace('_', '-')} " not in shown]
    assert set(missing) == {"output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict"}
    with pytest.raises(SystemExit):
        main(["unlearn", "--help"])
    short = capsys.readouterr().out
    assert all(f"--{name} " in short for name in ("gamma", "learning-rate", "retain-loss", "save-steps"))
    assert "--torch-compile" not in short


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_overview_names_every_command(argv, capsys):
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    for name in COMMANDS:
        assert (Path(main_module.__file__).parent / f"{name}.py").is_file()


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"eua {eua.__version__} (torch {version('torch')}, ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "==SUPPRESS==" not in shown
    assert f"usage: eua {command}" in shown
    examples = shown.partition("examples:\n")[2].splitlines()
    assert len(examples) == 2
    assert all(example.startswith(f"  eua {command}") for example in examples)
    described = re.findall(r"\n  (?:-h, )?(--[a-z-]+)[^\n]*(?:\n {10,}| {2,})\S", shown)
    assert set(re.findall(r"\n  (?:-h, )?(--[a-z-]+)", shown)) == set(described)


def write_run(folder: Path, text: str, tiny: Path, data: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(text.format(tiny=tiny, data=data, out=folder / "out"))
    return path


RUN = """
model: {tiny}
forget: {data}/forget.jsonl
retain: {data}/retain.jsonl
output: {out}
learning-rate: 1e-3
num_train_epochs: 1
per-device-train-batch-size: 4
"""


def test_a_run_can_be_written_down(tiny_folder, data, tmp_path):
    """A file gives the same weights as the command line, which takes precedence over the file."""
    run = write_run(tmp_path, RUN, tiny_folder, data)
    assert main(["unlearn", "--config", str(run)]) == 0
    options = ("--learning-rate", "1e-3", "--num-train-epochs", "1", "--per-device-train-batch-size", "4")
    assert main(unlearn_command(tiny_folder, data, tmp_path / "same", *options)) == 0
    faster = ("--learning-rate", "2e-3", "--num-train-epochs", "1", "--per-device-train-batch-size", "4")
    assert main(unlearn_command(tiny_folder, data, tmp_path / "faster", *faster)) == 0
    assert main(["unlearn", "--config", str(run), "--learning-rate", "2e-3", "--output", str(tmp_path / "over")]) == 0
    of = {name: load_file(tmp_path / name / "model.safetensors") for name in ("out", "same", "faster", "over")}
    assert all(torch.equal(tensor, of["same"][name]) for name, tensor in of["out"].items())
    assert all(torch.equal(tensor, of["faster"][name]) for name, tensor in of["over"].items())
    assert not torch.equal(of["out"]["lm_head.weight"], of["over"]["lm_head.weight"])


def test_a_settings_file_reaches_every_part_of_the_trainer(tiny_folder, data, tmp_path, capsys):
    more = """
eval-forget: {data}/forget.jsonl
eval_retain: {data}/test.jsonl
retain_loss: kl
gamma_schedule: cosine
gamma_warmup_ratio: 5e-2
weight_decay: 1e-2
load_best_model_at_end: true
metric_for_best_model: eval_auroc
save_total_limit: 2
"""
    run = write_run(tmp_path, RUN + more, tiny_folder, data)
    assert main(["unlearn", "--config", str(run), "--num-train-epochs", "2"]) == 0
    (newest,) = (tmp_path / "out" / "checkpoints").glob("checkpoint-4")
    state = json.loads((newest / "trainer_state.json").read_text())
    lines = [line for line in state["log_history"] if "eval_auroc" in line]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert "eval_kl_retain" in lines[0]
    assert state["best_metric"] == max(line["eval_auroc"] for line in lines)

    run.write_text(run.read_text().replace("cosine", "linear"))
    assert main(["unlearn", "--config", str(run), "--num-train-epochs", "2", "--resume"]) == 2
    assert "--gamma-schedule cosine → linear" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gama: 0.1", "sets 'gama', which is not an option of `eua unlearn`: did you mean 'gamma'? Correct it"),
        ("epochs: 3", "sets 'epochs', which is not an option of `eua unlearn`: did you mean 'num_train_epochs'? Correct it"),
        ("num_train_epochs: many", "sets 'num_train_epochs' to 'many', but it takes a number: correct it, or leave it out"),
        ("per-device-train-batch-size: 0", "per_device_train_batch_size = 0 cannot be used: it must be above 0"),
        ("bf16: 1", "sets 'bf16' to 1, but it takes true or false"),
        ("resume: 1", "sets 'resume' to 1, but it takes true or false"),
        ("lora-rank: half", "sets 'lora_rank' to 'half', but it takes a whole number"),
        ("alpha: true", "sets 'alpha' to True, but it takes a number"),
        ("seed: 1\nseed: 2", "are not YAML ('seed' occurs twice"),
        ("max-steps: 1\nmax_steps: 2", "sets 'max_steps' twice, with a dash and with an underscore: leave one out"),
        ("- gamma", "hold ['gamma'], not settings by name: write one `key: value` a line"),
        ("gamma: [1", "are not YAML (while parsing"),
        ("gamma: " + "[" * 100_000, "are not YAML (maximum recursion depth"),
        ("seed: " + "9" * 5000, "are not YAML (Exceeds the limit"),
        ("config: other.yaml", "sets 'config', which is not an option of `eua unlearn`"),
        ("gamma_schedule: step", "sets 'gamma_schedule' to 'step', but it takes one of constant, linear, cosine"),
        ("gamma_warmup_ratio: long", "sets 'gamma_warmup_ratio' to 'long', but it takes a number: correct it"),
        ("lr_scheduler_type: none", "These settings cannot be used: none is not a valid SchedulerType"),
    ],
    ids=lambda part: part[:30],
)
def test_settings_files_that_cannot_be_used_say_why(text, message, tiny_folder, data, tmp_path, capsys):
    base = RUN.replace("num_train_epochs: 1\nper-device-train-batch-size: 4\n", "")
    run = write_run(tmp_path, text if text.startswith("-") else base + text, tiny_folder, data)
    assert main(["unlearn", "--config", str(run)]) == 2
    assert message.replace("{{", "{").replace("}}", "}") in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_missing_settings_file(tmp_path, capsys):
    assert main(["unlearn", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml cannot be read" in capsys.readouterr().err
    assert main(["unlearn", "--config"]) == 2
    assert "argument --config: expected one argument" in capsys.readouterr().err


def test_the_model_writes_the_rows_to_retain_once(tiny_folder, data, tmp_path, monkeypatch, capsys):
    written = [{"question": f"Who is number {place}?", "answer": "Someone."} for place in range(7)]
    asked = []
    monkeypatch.setattr("eua.cli.unlearn.write_neighbours", lambda *a, **k: asked.append(a[2]) or written)
    command = unlearn_command(tiny_folder, data, tmp_path / "out", "--max-steps", "1")
    command[command.index("--retain") + 1] = "self"
    assert main(command) == 0
    assert asked == [read_rows(command[command.index("--forget") + 1], "forget set")]
    kept = tmp_path / "out" / "checkpoints" / "retain.jsonl"
    assert [json.loads(line) for line in kept.read_text().splitlines()] == written
    assert "| retain | 7 |" in ModelCard.load(tmp_path / "out" / "README.md").text
    assert main([*command, "--resume"]) == 0
    assert len(asked) == 1  # a resumed run has the rows that it began with
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*command, "--overwrite"]) == 2
    assert "--retain self was given in a run of several processes" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    for more, text in (
        (["--rho", "7"], "rho = 7"),
        (["--lora-rank", "2", "--distinct-directions", "4"], "an adapter of its own"),
    ):
        assert main([*command, "--overwrite", *more]) == 2  # before anything is written
        assert text in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text("{}")
    assert main([*command, "--overwrite"]) == 2
    assert "pass ./self if you mean the file" in capsys.readouterr().err
    assert len(asked) == 1
