"""When training ends before its last step."""

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
from eua.methods.d2 import loss_means

logger = logging.get_logger(__name__)

_SECONDS_OF_ONE_REQUEST = 1.0


class StopOnSignal(TrainerCallback):
    """While entered: on SIGINT or SIGTERM the step is finished, a checkpoint saved, and training ended."""

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
                return  # a launcher passes on to its processes what a terminal has sent them already
            raise KeyboardInterrupt  # asked twice: stop now
        self.received, self.at = number, time.monotonic()
        logger.warning("Stopping after this step; a checkpoint will be saved. Interrupt again to stop at once.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Processes hear of it at different steps, or one alone does: they stop together.
        if any_process(self.received is not None, args.device):
            self.received = self.received or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is not None and state.epoch % 1:
            control.should_evaluate = False  # the epoch is not over: the whole run would not have evaluated here either


class StopWhenBeyondBoundary(TrainerCallback):
    """Ends training after an epoch in which at least a share of the forget tokens lay above their boundary.

    The share is that of a whole epoch since an epoch meets every forget row once: a window of the log sees some of them, and
    training would end earlier or later with another logging_steps.

    Args:
        share: in (0, 1].
        over_processes: sums a tensor over all processes.
    """

    def __init__(self, share: float, over_processes: Callable[[Tensor], Tensor]) -> None:
        self.share, self.over_processes = share, over_processes
        self.sums: Tensor | None = None  # of the epoch so far, see loss_sums
        self.last_epoch = 0.0  # the share met in the last whole epoch

    def add(self, sums: Tensor) -> None:
        self.sums = sums if self.sums is None else self.sums + sums

    def exported(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run ends where the whole one does; all processes call this."""
        sums = None if self.sums is None else self.over_processes(self.sums).tolist()
        return {"sums": sums, "last_epoch": self.last_epoch}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kept = state.stateful_callbacks.get(type(self).__name__, {"sums": None, "last_epoch": 0.0})
        sums, self.last_epoch = kept["sums"], kept["last_epoch"]
        # The sums of all processes go on in one of them.
        self.sums = torch.tensor(sums, device=args.device) if sums is not None and args.process_index == 0 else None
        if self.last_epoch >= self.share:
            control.should_training_stop = True  # the run to resume had ended

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The last step of an epoch, rather than its end, comes before any checkpoint that is saved at this step.
        if state.epoch % 1 or self.sums is None:
            return
        self.last_epoch, self.sums = loss_means(self.over_processes(self.sums))["beyond_boundary_forget"], None
        if self.last_epoch >= self.share:
            control.should_training_stop = True
            # As Trainer does at the last step of all; what goes by epochs comes at the epoch's end.
            control.should_evaluate = control.should_evaluate or args.eval_strategy == IntervalStrategy.STEPS
            control.should_save = control.should_save or args.save_strategy == SaveStrategy.STEPS
