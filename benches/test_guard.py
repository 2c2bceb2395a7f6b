"""Benchmark of the time that the guard adds to a generation in which it refuses nothing.

    pytest benches/test_guard.py --benchmark-only

Two runs differ by more than this time, so the time in the guard's own code is measured within one run, relative to the rest of
the run. On a GPU, which runs asynchronously, full runs are compared instead.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import measure
import pytest
import torch
from conftest import DEVICE, filled
from report import Report
from steps import make_model

from eua import EnergyGuard
from eua.guard.guarded_generate import GuardHandle, _GuardedCall
from eua.guard.questions import Turns
from eua.model.energy_recorder import EnergyProbe, EnergyRecorder
from eua.model.fingerprints import model_fingerprint, recent_fingerprint

HIDDEN_SIZE, LAYERS, VOCABULARY = 768, 12, 32000  # 85M parameters and a head of 25M
ROWS, NEW_TOKENS, ROUNDS = 4, 64, 3
# Ids in place of the template's: a user turn begins with 5, an assistant turn with 6.
TURNS = Turns(opening=(), user_start=(5,), answer_start=(6,), answer_lead=(), answer_tail=())
GUARD = EnergyGuard(
    threshold=1e9,
    temperature=1.0,
    refusal_text="No.",
    refusal_ids=(7, 2),
    stop_ids=(7, 2),
    tolerance=0.05,
    calibration_prompts=100,
    turns=TURNS,
)
GUARDS = {
    "prompt's last token": GUARD,
    "and the first 3 generated": replace(GUARD, first_tokens=3),
    "with a probe": replace(GUARD, probe_window=4, probe_tokens=64, probe_threshold=1e9),
}


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    yield from filled(request, f"guard-{DEVICE}", "pytest benches/test_guard.py --benchmark-only")


def prompts(turns: int) -> torch.Tensor:
    """Chats with ``turns`` user turns of 16 tokens each; answers have 16 tokens, too."""
    turn = torch.cat([torch.tensor([5]), torch.arange(100, 114), torch.tensor([6])])
    reply = torch.arange(200, 216)
    chat = torch.cat([*[torch.cat([turn, reply])] * (turns - 1), turn])
    return (chat + 1000 * (chat > 99) * torch.arange(ROWS)[:, None]).to(DEVICE)


class Clock:
    """Adds up the seconds spent in the functions that it watches."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def generate(model: Any, ids: torch.Tensor) -> None:
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)


def share_on_cpu(handle: GuardHandle, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds in the guard's code per second in the rest of a run."""
    inside, unguarded = Clock(), Clock()
    with monkeypatch.context() as patch:
        for owner, name in (
            (_GuardedCall, "__call__"),
            (_GuardedCall, "force"),
            (EnergyRecorder, "_capture"),
            (EnergyProbe, "_capture"),
        ):
            patch.setattr(owner, name, inside.watch(getattr(owner, name)))
        patch.setattr(handle, "_generate", unguarded.watch(handle._generate))
        start = time.perf_counter()
        generate(handle.model, ids)
        whole = time.perf_counter() - start
    spent = whole - unguarded.seconds + inside.seconds
    return spent / (whole - spent)


@pytest.mark.parametrize("turns", [1, 4], ids=["a question", "a chat of 4 turns"])
def test_generation(
    benchmark, report: Report, turns: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = make_model(VOCABULARY, HIDDEN_SIZE, LAYERS, False, DEVICE).eval()
    model.generation_config.eos_token_id = None
    ids = prompts(turns)
    known = model_fingerprint(model)  # with it, every call checks the weights
    handles = {name: replace(guard, model_fingerprint=known).attach(copy.deepcopy(model)) for name, guard in GUARDS.items()}
    if DEVICE == "cpu":
        generate(handles["prompt's last token"].model, ids)
        shares = {
            name: statistics.median(share_on_cpu(handle, ids, monkeypatch) for _ in range(ROUNDS))
            for name, handle in handles.items()
        }
    else:
        models = {name: handle.model for name, handle in handles.items()} | {"no guard": model}
        steps = {name: lambda each=each: generate(each, ids) for name, each in models.items()}
        times = measure.medians(steps, DEVICE, rounds=9)
        shares = {name: times[name] / times["no guard"] - 1 for name in GUARDS}
    benchmark.pedantic(generate, args=(handles["prompt's last token"].model, ids), rounds=1)
    title = f"Generating {NEW_TOKENS} tokens to {ROWS} prompts, Llama of {HIDDEN_SIZE} × {LAYERS}, V = {VOCABULARY}, float32"
    for name in GUARDS:
        report.add(title, name, f"guard / rest of the time, {request.node.callspec.id}", shares[name])
    if turns == 1:
        checks = {"every weight": lambda: model_fingerprint(model), "before a call": lambda: recent_fingerprint(model)}
        for name, seconds in measure.medians(checks, DEVICE, rounds=9).items():
            report.add("Checking the weights of this model", name, "ms", 1e3 * seconds)
        assert shares["prompt's last token"] < 0.02
