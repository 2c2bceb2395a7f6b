"""Several real processes under `accelerate launch`: DDP, FSDP2 and ZeRO-3 follow one process, stop together and resume."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eua.files import write_jsonl
from tests.conftest import tiny_llama

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "training" / "distributed_run.py"
COMMON = ["--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", "no"]
SETUPS = {
    "ddp": ["--multi_gpu"],
    "fsdp2": [
        *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--fsdp_state_dict_type", "SHARDED_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "true"),
    ],
    "zero3": ["--use_deepspeed", "--zero_stage", "3", "--zero3_save_16bit_model", "true"],
}
NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
# `python -m eua`. A thread of gloo that is left at the end would sometimes abort the process, see end_process_group.
COMMAND_LINE = """
import pathlib, runpy, torch

def threads():
    return [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]

def destroy(*arguments, destroy=torch.distributed.destroy_process_group):
    assert not threads() or "pt_gloo_runloop" in threads(), threads()  # or the name is another, and the check below is void
    destroy(*arguments)

torch.distributed.destroy_process_group = destroy
try:
    runpy.run_module("eua", run_name="__main__")
finally:
    assert not torch.distributed.is_initialized()
    assert "pt_gloo_runloop" not in threads(), threads()
"""
ALL = ["ddp", "fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)]
STEPS = {
    "max_steps": 20,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "gamma_schedule": "cosine",
    "eval_strategy": "steps",
    "eval_steps": 10,
    "boundary_batch_size": 3,  # of 16 and 24 rows: processes get as many only if some row comes twice
}
RUNS = [
    ("plain", STEPS),
    ("accumulated", STEPS | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    ("packed", STEPS | {"padding_free": True}),
    ("lora", STEPS | {"lora": True}),
    ("bfloat16", STEPS | {"bf16": True}),
    ("stopped", STEPS | {"stop_at": 9, "save_strategy": "steps", "save_steps": 4}),
    ("stopped", STEPS | {"resume": True, "save_strategy": "steps", "save_steps": 4}),
    ("early", STEPS | {"max_steps": -1, "num_train_epochs": 30, "stop_when_beyond_boundary": 0.5, "gamma": 1.0, "alpha": 0.1}),
    ("preference", STEPS | {"method": "idk_dpo"}),  # means over rows, likelihoods of two kinds of rows
    ("inner", STEPS | {"method": "rmu", "layer": 0}),  # whose loss does not reach all of the model
    ("dual", STEPS | {"method": "pdu", "alpha": 1.0, "dual_warmup": 1.0, "dual_step": 0.1}),  # a weight that all must agree on
]
IN_ONE = [  # one process has the batch of both
    ("plain", STEPS | {"per_device_train_batch_size": 4}),
    ("lora", STEPS | {"per_device_train_batch_size": 4, "lora": True}),
    *((name, options | {"per_device_train_batch_size": 4}) for name, options in RUNS[-4:]),
]
NOT_IN = {"ddp": (), "fsdp2": ("inner",), "zero3": ("inner", "bfloat16")}  # RMU needs a second model, which is not sharded
OF_TIME = ("runtime", "per_second", "total_flos")


def launch(setup: str, command: list[str]) -> subprocess.CompletedProcess:
    """A script, or ``-m`` and a module, with its arguments, in two processes, or in one."""
    how = ["-m", "accelerate.commands.launch", *SETUPS[setup], *COMMON, "--main_process_port", "0"] if setup != "one" else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *how, *command], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr  # what aborted a process comes first there
    return done


@pytest.fixture(scope="module")
def launched(tokenizer, rows, tmp_path_factory) -> Callable[[str], Path]:
    """The output of all runs in a set-up, each launched once."""
    base = tmp_path_factory.mktemp("distributed")
    model = tiny_llama(len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3  # a fresh model's logits are nearly flat, whatever its layers do
    model.save_pretrained(base / "model")
    tokenizer.save_pretrained(base / "model")
    sizes = {"forget": 16, "retain": 24, "calibration": 8, "test": 8}
    for kind, size in sizes.items():
        write_jsonl(base / f"{kind}.jsonl", rows[kind][:size])

    def run(setup: str) -> Path:
        output = base / setup
        if not output.exists():
            settings: dict[str, Any] = {
                "model": str(base / "model"),
                "rows": {kind: str(base / f"{kind}.jsonl") for kind in sizes},
                "output": str(output),
                "runs": IN_ONE if setup == "one" else [run for run in RUNS if run[0] not in NOT_IN[setup]],
            }
            path = base / f"{setup}.json"
            path.write_text(json.dumps(settings))
            launch(setup, [str(SCRIPT), str(path)])
        return output

    return run


def weights(run: Path, folder: str = "model") -> dict[str, torch.Tensor]:
    (path,) = run.glob(f"{folder}/*.safetensors")
    return load_file(path)


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=3e-5, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_log(found: Path, expected: Path) -> None:
    """Losses, parts, energies, gradient norms and evaluations of all steps."""
    logs = [json.loads((run / "log.json").read_text()) for run in (found, expected)]
    assert len(logs[0]) == len(logs[1]) > 20
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if not any(word in name for word in OF_TIME):
                assert ours[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name


@pytest.mark.parametrize("setup", ALL)
@pytest.mark.parametrize("run", ["plain", "accumulated", "packed", "lora", "preference", "dual"])
def test_processes_follow_one_process(launched, setup, run):
    """20 steps of two processes with half the batch each are those of one process with all of it."""
    output, one = launched(setup), launched("one") / ("plain" if run in ("accumulated", "packed") else run)
    assert_same_log(output / run, one)
    assert_same_weights(weights(output / run), weights(one))
    pushed = weights(output / run, "pushed")
    assert all(torch.equal(pushed[name], tensor) for name, tensor in weights(output / run).items())
    start = load_file(output.parent / "model" / "model.safetensors")
    assert run == "lora" or max((tensor - start[name]).abs().max() for name, tensor in weights(one).items()) > 5e-3


def test_rmu_with_ddp_follows_one_process(launched):
    output, one = launched("ddp") / "inner", launched("one") / "inner"
    assert_same_log(output, one)
    assert_same_weights(weights(output), weights(one))


@pytest.mark.parametrize("setup", ["ddp", "fsdp2"])
def test_processes_follow_one_process_in_bfloat16(launched, setup):
    """FSDP2 casts the weights themselves, DDP computes under autocast; the course is that of float32."""
    logs = [
        json.loads((launched(name) / run / "log.json").read_text()) for name, run in ((setup, "bfloat16"), ("one", "plain"))
    ]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]
    assert {tensor.dtype for tensor in weights(launched(setup) / "bfloat16").values()} == {torch.float32}


@pytest.mark.parametrize("setup", ALL)
def test_processes_stop_together_and_resume(launched, setup):
    """One of them gets the signal; the run that goes on ends with the weights of the one that was not stopped."""
    output = launched(setup)
    assert (output / "stopped" / "interrupted").read_text() == "10"
    assert {path.name for path in (output / "stopped" / "run").glob("checkpoint-*")} >= {"checkpoint-10", "checkpoint-20"}
    assert_same_weights(weights(output / "stopped"), weights(output / "plain"))


@pytest.mark.parametrize("setup", ALL)
def test_processes_stop_early_together(launched, setup):
    """What is met counts over all processes: the run ends at the epoch at which one process ends."""
    output, one = launched(setup) / "early", launched("one") / "early"
    steps = [json.loads((run / "log.json").read_text())[-1]["step"] for run in (output, one)]
    assert steps[0] == steps[1] < 30 * 4
    assert_same_weights(weights(output), weights(one))


def test_the_command_line_in_two_processes(launched, tmp_path):
    """One process looks after the output folder, which the other must not take for a stranger's."""
    base = launched("one").parent
    script = tmp_path / "run.py"
    script.write_text(COMMAND_LINE)
    command = ["unlearn", "--model", str(base / "model"), "--num-train-epochs", "2", "--learning-rate", "1e-3"]
    command += [part for kind in ("forget", "retain") for part in (f"--{kind}", str(base / f"{kind}.jsonl"))]
    both = launch("ddp", [str(script), *command, "--per-device-train-batch-size", "2", "--output", str(tmp_path / "both")])
    assert both.stdout.count("The unlearned model is in") == 1
    launch("one", ["-m", "eua", *command, "--per-device-train-batch-size", "4", "--output", str(tmp_path / "one")])
    assert_same_weights(*(load_file(tmp_path / name / "model.safetensors") for name in ("both", "one")))


@pytest.mark.parametrize("setup", ALL)
def test_boundaries_are_those_of_one_process(launched, setup):
    found, expected = (load_file(launched(name) / "plain" / "run" / "boundaries.safetensors") for name in (setup, "one"))
    assert found.keys() == expected.keys() == {"forget", "retain", "eval_forget", "eval_retain"}
    for kind, values in expected.items():
        torch.testing.assert_close(found[kind], values, rtol=0, atol=1e-5)
