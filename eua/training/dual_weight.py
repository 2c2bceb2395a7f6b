"""The weight of the retain part under PDU, which moves with the retained rows' NLL after every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eua.methods.distribution import next_multiplier
from eua.training.config import EUAConfig

_SAVED_AS = "dual_weight"  # in the trainer's state


class DualWeight(TrainerCallback):
    """PDU's multiplier λ: it starts at α, and after its warm-up moves by η·(NLL − ε) after each step, never below 0.

    The released code moves it after every micro-batch; the two agree only without gradient accumulation.

    Args:
        settings: ``alpha`` (λ at the start), ``retain_bound`` (ε, in nats), ``dual_step`` (η) and ``dual_warmup``.
        reduce: sums a tensor over all processes.
    """

    def __init__(self, settings: EUAConfig, reduce: Callable[[Tensor], Tensor]) -> None:
        names = ("alpha", "retain_bound", "dual_step", "dual_warmup")
        self.start, self.bound, self.step, self.warmup_epochs = (float(getattr(settings, name)) for name in names)
        self.value = self.used = self.start  # of the next step and of the last one
        self.reduce = reduce
        self.sums: Tensor | None = None  # (2,) NLL and number of the retained tokens of this step in this process

    def add(self, sums: Tensor) -> None:
        """Add the figure of the retain part of one batch (``nll_retain`` or ``kl_retain``)."""
        self.sums = sums if self.sums is None else self.sums + sums

    def save_to(self, state: TrainerState) -> None:
        """Put into ``state`` what a resumed run needs."""
        state.stateful_callbacks[_SAVED_AS] = {"value": self.value}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.value, self.sums = state.stateful_callbacks.get(_SAVED_AS, {"value": self.start})["value"], None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.sums is None:
            return
        total, tokens = self.reduce(self.sums).tolist()
        self.sums = None
        self.used = self.value
        if (state.epoch or 0.0) >= self.warmup_epochs:
            self.value = next_multiplier(self.value, total / max(tokens, 1), self.bound, self.step)
