"""Callbacks that end training before its last step: on a signal, or once the forget tokens lie above their boundaries."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from eua.distributed import any_process

logger = logging.get_logger(__name__)

_SECONDS_OF_ONE_REQUEST = 1.0
_SAVED_AS = "stop_when_beyond_boundary"  # in the trainer's state; a callback's own name there is for Trainer to restore
_NOTHING_SAVED: dict[str, Any] = {"sums": None, "last_epoch": 0.0}


class StopOnSignal(TrainerCallback):
    """Inside its ``with`` block SIGINT and SIGTERM finish the step, save a checkpoint and end training."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.at = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        self.received = None
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() < self.at + _SECONDS_OF_ONE_REQUEST:
                return  # the terminal and the launcher both pass one request on to each process
            raise KeyboardInterrupt  # a second request: stop at once
        self.received, self.at = number, time.monotonic()
        logger.warning("Stopping after this step; a checkpoint will be saved. Interrupt again to stop at once.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Processes may receive the signal at different steps, or only one may receive it; all stop at the same step.
        if any_process(self.received is not None, args.device):
            self.received = self.received or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is not None and state.epoch % 1:
            control.should_evaluate = False  # the epoch is not over: without the signal nothing would be evaluated here


class StopWhenBeyondBoundary(TrainerCallback):
    """Ends training after an epoch in which at least a share of the forget tokens lay above their boundaries.

    The share is taken over a whole epoch, since an epoch visits every forget row once. The share in the log is taken over
    ``logging_steps`` steps, and with it the end of training would depend on that setting.

    Args:
        share: in (0, 1].
        reduce: sums a tensor over all processes.
    """

    def __init__(self, share: float, reduce: Callable[[Tensor], Tensor]) -> None:
        self.share, self.reduce = share, reduce
        self.sums: Tensor | None = None  # (2,) tokens above their boundary and all tokens, of the epoch in this process
        self.last_epoch = 0.0  # the share in the last completed epoch

    def add(self, sums: Tensor) -> None:
        """Add the figure ``beyond_boundary_forget`` of one batch, see :data:`eua.methods.objective.Figures`."""
        self.sums = sums if self.sums is None else self.sums + sums

    def save_to(self, state: TrainerState) -> None:
        """Put into ``state`` what a resumed run needs to end at the same step; all processes call this."""
        sums = None if self.sums is None else self.reduce(self.sums).tolist()
        state.stateful_callbacks[_SAVED_AS] = {"sums": sums, "last_epoch": self.last_epoch}

    def has_ended(self, state: TrainerState) -> bool:
        """Whether the run that saved ``state`` had reached the share."""
        return state.stateful_callbacks.get(_SAVED_AS, _NOTHING_SAVED)["last_epoch"] >= self.share

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(_SAVED_AS, _NOTHING_SAVED)
        sums, self.last_epoch = saved["sums"], saved["last_epoch"]
        # These are the sums over all processes, so only one process goes on from them.
        self.sums = torch.tensor(sums, device=args.device) if sums is not None and args.process_index == 0 else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # At the epoch's last step rather than its end: a checkpoint may be saved in between.
        if state.epoch % 1 or self.sums is None:
            return
        beyond, tokens = self.reduce(self.sums).tolist()
        self.last_epoch, self.sums = beyond / max(tokens, 1), None
        if self.last_epoch >= self.share:
            control.should_training_stop = True
            # As Trainer does after its last step. Strategies "epoch" follow at the epoch's end.
            control.should_evaluate = control.should_evaluate or args.eval_strategy == IntervalStrategy.STEPS
            control.should_save = control.should_save or args.save_strategy == SaveStrategy.STEPS
