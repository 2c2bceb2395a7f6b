"""What the guard adds to the time of a generation, in which it refuses nothing.

pytest benches/test_guard.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import measure
import pytest
import torch
from conftest import DEVICE, filled
from report import Report
from steps import make_model

from eua import EnergyGuard
from eua.turns import Turns

HIDDEN_SIZE, LAYERS, VOCABULARY = 512, 6, 32000
ROWS, NEW_TOKENS, ROUNDS = 4, 48, 9
# Ids that stand for the template's: a turn of the user's begins with 5, the assistant's with 6.
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
    """Chats of so many turns of the user's, of 16 tokens each; answers have as many."""
    turn = torch.cat([torch.tensor([5]), torch.arange(100, 114), torch.tensor([6])])
    reply = torch.arange(200, 216)
    chat = torch.cat([*[torch.cat([turn, reply])] * (turns - 1), turn])
    return (chat + 1000 * (chat > 99) * torch.arange(ROWS)[:, None]).to(DEVICE)


def generate(model: torch.nn.Module, ids: torch.Tensor, guard: EnergyGuard | None) -> Callable[[], None]:
    """A generation of exactly ``NEW_TOKENS`` tokens a row."""

    def run() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)

    def guarded() -> None:
        with guard.attach(model):
            run()

    return run if guard is None else guarded


@pytest.mark.parametrize("turns", [1, 4], ids=["a question", "a chat of 4 turns"])
def test_generation(benchmark, report: Report, turns: int, request: pytest.FixtureRequest):
    model = make_model(VOCABULARY, HIDDEN_SIZE, LAYERS, False, DEVICE).eval()
    model.generation_config.eos_token_id = None
    ids = prompts(turns)
    ways = {"no guard": None} | GUARDS
    times = measure.medians({name: generate(model, ids, guard) for name, guard in ways.items()}, DEVICE, rounds=ROUNDS)
    benchmark.pedantic(generate(model, ids, GUARD), rounds=1)
    title = f"Generating {NEW_TOKENS} tokens to {ROWS} prompts, Llama of {HIDDEN_SIZE} × {LAYERS}, V = {VOCABULARY}, float32"
    for name in GUARDS:
        report.add(title, name, f"time / no guard, {request.node.callspec.id}", times[name] / times["no guard"])
    if turns == 1:
        assert times["prompt's last token"] < 1.02 * times["no guard"]
