"""A user's code, which `mypy --strict` accepts and which runs. ``tests/package/check`` does both with the installed package."""

import torch

from eua import EnergyGuard, EUAConfig, EUATrainer, d2_loss
from eua.bench.plain_text import plain_text
from eua.bench.questions import load_facts
from fused_energy import linear_energy


def train(settings: EUAConfig) -> EUATrainer:
    return EUATrainer("model", settings, forget_dataset="forget.jsonl", retain_dataset=[{"question": "Who?", "answer": "Ann."}])


def threshold(guard: EnergyGuard) -> float:
    return guard.threshold


energy: torch.Tensor = linear_energy(torch.ones(2, 3), torch.zeros(4, 3))
torch.testing.assert_close(energy, -torch.full((2,), 4.0).log())
print(d2_loss.__name__, "and energies", energy.tolist())
print(len(load_facts()), "facts and", len(plain_text()), "paragraphs are in the package")
