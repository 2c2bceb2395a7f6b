"""Test of TOFU's forget10 with ``eua unlearn``, killed five times and resumed.

``pytest -m tofu`` runs it if TOFU's files are available; ``EUA_TOFU`` names their folder.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eua.cli.main import INTERRUPTED
from eua.data.sources import read_rows
from eua.demo.target import train_target
from eua.files import write_jsonl
from eua.training.checkpoints import STAGING_FOLDER

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tofu_forget10.yaml"
TOFU = Path(os.environ.get("EUA_TOFU", ROOT.parent / "shared" / "tofu"))
FILES = ("forget01.jsonl", "forget10.jsonl", "retain90.jsonl")

BATCH, EPOCHS, SAVE_STEPS = 8, 2, 5
STEPS_AN_EPOCH = 400 // BATCH
STEPS = EPOCHS * STEPS_AN_EPOCH
# Settings without an option on the command line: every step is logged, and γ depends on the step.
MORE_SETTINGS = """
logging_steps: 1
gamma_schedule: cosine
gamma_warmup_ratio: 0.1
"""
PATIENCE = 300  # seconds, for a busy machine


class Process:
    """``eua unlearn`` in a separate process, and what it has printed so far."""

    def __init__(self, log: Path, arguments: list[str]) -> None:
        self.log = log
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",  # the log is written as it is printed
            "OMP_NUM_THREADS": "1",  # two runs share the machine
            "CUDA_VISIBLE_DEVICES": "",  # a GPU would finish the steps before they can be counted
        }
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "eua", "unlearn", *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def steps(self) -> list[int]:
        """The steps that the process has logged."""
        epochs = re.findall(r"\{'loss': [^}]*'epoch': '([0-9.]+)'\}", self.printed())
        return [round(float(epoch) * STEPS_AN_EPOCH) for epoch in epochs]

    def wait_until(self, reached: Callable[[], bool], pause: float = 0.02) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert self.process.poll() is None, f"the process ended before it could be killed: {self.printed()[-2000:]}"
            assert time.monotonic() < deadline, f"the process makes no progress: {self.printed()[-2000:]}"
            time.sleep(pause)

    def end(self, how: signal.Signals | None = None) -> int:
        """The exit code, after the signal ``how`` if given. After SIGKILL it is -9 only if the process was still running."""
        if how is not None:
            self.process.send_signal(how)
        return self.process.wait(timeout=PATIENCE)


@pytest.fixture
def start() -> Iterator[Callable[[Path, list[str]], Process]]:
    """Starts processes and kills those that still run after the test."""
    processes: list[Process] = []

    def start_one(log: Path, arguments: list[str]) -> Process:
        processes.append(Process(log, arguments))
        return processes[-1]

    yield start_one
    for process in processes:
        process.end(signal.SIGKILL)


@pytest.fixture(scope="session")
def tofu() -> Path:
    missing = [name for name in FILES if not (TOFU / name).is_file()]
    if missing:
        pytest.skip(f"no {', '.join(missing)} in {TOFU}: set EUA_TOFU to a folder of TOFU's files as JSONL")
    return TOFU


@pytest.fixture(scope="session")
def target(tofu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, trained for a few epochs on the rows to forget and some to retain: enough to have something to unlearn."""
    folder = tmp_path_factory.mktemp("target")
    rows = read_rows(tofu / "forget10.jsonl") + read_rows(tofu / "retain90.jsonl")[:200]
    train_target(rows, folder, vocabulary=2048, hidden_size=128, layers=2, epochs=6, batch_size=8, learning_rate=4e-3)
    return folder


@pytest.mark.tofu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lora_rank", [0, 8], ids=["full", "lora"])
def test_killed_five_times_it_ends_with_the_same_weights(lora_rank, tofu, target, start, tmp_path):
    rng = random.Random(lora_rank)
    settings_file, held_out = tmp_path / "run.yaml", tmp_path / "held_out.jsonl"
    # Without a reference in memory, boundaries are computed before training, and that can be interrupted, too.
    settings_file.write_text(EXAMPLE.read_text().replace("retain-loss: kl", "retain-loss: nll") + MORE_SETTINGS)
    write_jsonl(held_out, read_rows(tofu / "retain90.jsonl")[-40:])  # the last two authors
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def command(output: Path) -> list[str]:
        options = {
            "config": settings_file,
            "model": target,
            "forget": tofu / "forget10.jsonl",
            "retain": tofu / "retain90.jsonl",
            "eval-forget": tofu / "forget01.jsonl",
            "eval-retain": held_out,
            "output": output,
            "num-train-epochs": EPOCHS,
            "per-device-train-batch-size": BATCH,
            "retain-per-forget": 1,
            "learning-rate": 5e-3 if lora_rank else 2e-3,
            "gamma": 0.05,  # large enough to have an effect in a few steps
            "lora-rank": lora_rank,
            "save-steps": SAVE_STEPS,
        }
        return [part for name, value in options.items() for part in (f"--{name}", str(value))]

    uninterrupted = start(tmp_path / "whole.log", command(whole))  # runs in parallel, on another core

    checkpoints = broken / "checkpoints"
    first = start(tmp_path / "boundaries.log", command(broken))
    first.wait_until(lambda: "boundaries of retain rows" in first.printed())
    time.sleep(rng.uniform(0, 0.3))
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    assert (checkpoints / "settings.json").is_file()
    assert not list(checkpoints.glob("checkpoint-*"))

    done = 0  # the last step that any process has logged
    kills = [signal.SIGKILL, signal.SIGKILL, "in saving", signal.SIGTERM, signal.SIGINT]
    rng.shuffle(kills)
    for number, kill in enumerate(kills):
        begun_at = last_saved_step(checkpoints)
        process = start(tmp_path / f"{number}.log", [*command(broken), "--resume"])
        kill_at = done + rng.randint(10, 16)
        process.wait_until(lambda process=process, step=kill_at: process.steps()[-1:] >= [step])
        if kill == "in saving":
            process.wait_until((checkpoints / STAGING_FOLDER).exists, pause=0)
            assert process.end(signal.SIGKILL) == -signal.SIGKILL
            assert (checkpoints / STAGING_FOLDER).exists()  # half a checkpoint
        else:
            time.sleep(rng.uniform(0, 0.3))
            assert process.end(kill) == (-signal.SIGKILL if kill == signal.SIGKILL else INTERRUPTED)
        steps = process.steps()
        assert steps == list(range(begun_at + 1, steps[-1] + 1))  # it continued from the last checkpoint
        assert done < kill_at <= steps[-1] < STEPS
        done = steps[-1]
        saved = last_saved_step(checkpoints)
        assert done - SAVE_STEPS <= saved <= done
        if kill in (signal.SIGTERM, signal.SIGINT):
            assert saved == done
            assert "Run the same command with --resume to continue." in process.printed()
        assert not list(broken.glob("*.safetensors"))

    assert done > STEPS_AN_EPOCH  # both epochs were interrupted
    last = start(tmp_path / "last.log", [*command(broken), "--resume"])
    assert last.end() == 0, last.printed()[-2000:]
    assert uninterrupted.end() == 0, uninterrupted.printed()[-2000:]

    name = "adapter_model.safetensors" if lora_rank else "model.safetensors"
    expected, found = load_file(whole / name), load_file(broken / name)
    assert expected.keys() == found.keys()
    different = [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]
    assert not different
    if lora_rank:  # B starts at 0
        assert all(tensor.abs().max() > 0 for key, tensor in expected.items() if "lora_B" in key)
    else:
        before = load_file(target / name)
        assert not [key for key, tensor in expected.items() if torch.equal(tensor, before[key])]
    assert logged(broken, "loss") == logged(whole, "loss")
    check_that_it_forgets(logged(whole, "loss"), rise=0.3 if lora_rank else 0.5)
    assert [line["step"] for line in logged(whole, "eval_auroc")] == [STEPS_AN_EPOCH]  # the last one comes after the checkpoint


def last_saved_step(checkpoints: Path) -> int:
    """The step of the newest checkpoint, according to its state; 0 if there is none."""
    states = [json.loads(path.read_text()) for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return max((state["global_step"] for state in states), default=0)


def logged(output: Path, key: str) -> list[dict[str, Any]]:
    """The entries of the log that have ``key``, from the last checkpoint."""
    state = json.loads((output / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [line for line in state["log_history"] if key in line]


def check_that_it_forgets(steps: list[dict[str, Any]], rise: float) -> None:
    """Energies of forgotten answers rose by ``rise`` nats over retained ones since the first step, the original target."""
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    first, last = steps[0], steps[-10:]

    def mean(key: str) -> float:
        return sum(line[key] for line in last) / len(last)

    assert mean("energy_forget") - mean("energy_retain") > first["energy_forget"] - first["energy_retain"] + rise
    assert mean("beyond_boundary_forget") > first["beyond_boundary_forget"]
    assert mean("loss_forget") < first["loss_forget"] / 2
    assert mean("nll_retain") < first["nll_retain"]
