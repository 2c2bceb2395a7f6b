"""Settings of an unlearning run: transformers' ``TrainingArguments`` plus the few numbers that D² needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from eua.errors import EUAError

# The metrics of evaluation during training, and whether higher is better.
EVAL_METRICS = {
    "loss": False,
    "loss_forget": False,
    "loss_retain": False,
    "nll_retain": False,
    "kl_retain": False,
    "energy_forget": True,
    "energy_retain": False,
    "beyond_boundary_forget": True,
    "beyond_boundary_retain": True,
    "auroc": True,
}


@dataclass
class EUAConfig(TrainingArguments):
    """Settings of :class:`eua.EUATrainer`; every field of ``TrainingArguments`` may be set too.

    The defaults are those released with D² (method.md §4), which were made for models of about 1B parameters.
    ``per_device_train_batch_size`` counts forget rows; each brings ``retain_per_forget`` retain rows along.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the forget rows."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace NaN losses in the log. Off: EUATrainer stops at a NaN instead of hiding it."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available,
        metadata={"help": "Pin batches in memory for faster copies to a GPU. Default: if there is one."},
    )
    use_cpu: bool = field(
        default_factory=lambda: not torch.accelerator.is_available(),
        metadata={"help": "Train on the CPU. Default: only if there is no accelerator; bf16 then works on the CPU, too."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: batches contain boundaries, which no model's forward accepts."}
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Whether a higher metric_for_best_model is better. None: decided by the metric."}
    )
    hub_strategy: str = field(
        default="end", metadata={"help": 'Must stay "end": the model is pushed when it is saved, checkpoints never are.'}
    )
    gamma: float = field(default=0.05, metadata={"help": "Weight of the two energy parts of the loss."})
    gamma_schedule: Literal["constant", "linear", "cosine"] = field(
        default="constant",
        metadata={
            "help": 'After its warm-up gamma stays ("constant") or falls towards 0 until the last step ("linear", "cosine").'
        },
    )
    gamma_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps in which gamma rises from 0; 0: it starts at its full value."}
    )
    alpha: float = field(default=1.0, metadata={"help": "Weight of the term that keeps the retained tokens, see retain_loss."})
    retain_loss: Literal["nll", "kl"] = field(
        default="nll",
        metadata={
            "help": 'The term that alpha weighs: the negative log-likelihood of retained tokens ("nll", as released), or the '
            'divergence KL(reference || model) at them ("kl", which needs the model before unlearning as ref_model).'
        },
    )
    rho: float = field(default=0.1, metadata={"help": "Share of the vocabulary whose logits make a boundary."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature T of the energy."})
    fill: Literal["zero", "none"] = field(
        default="zero",
        metadata={"help": 'Logits outside that share count as 0 ("zero", as released) or not at all ("none").'},
    )
    m_in: float | None = field(
        default=None,
        metadata={"help": "Constant boundary of retain tokens, in nats. None: computed from the model before unlearning."},
    )
    m_out: float | None = field(
        default=None,
        metadata={"help": "Constant boundary of forget tokens, in nats. None: computed from the model before unlearning."},
    )
    retain_per_forget: int = field(default=1, metadata={"help": "Retain rows in a batch for each forget row."})
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Concatenate the rows of a batch instead of padding them. Fastest with flash attention; other attention "
            "computes a mask of all tokens by all tokens, which pays off for short rows of very different lengths."
        },
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest row in tokens; longer answers are cut. None: no limit."}
    )
    assistant_turns: Literal["last", "all"] = field(
        default="last",
        metadata={"help": 'The assistant messages of a chat that count: the last one ("last"), or every one ("all").'},
    )
    overlap: Literal["error", "drop"] = field(
        default="error",
        metadata={
            "help": 'Rows to retain that are rows to forget, too: an error ("error"), or left out of the retain set ("drop").'
        },
    )
    stop_when_beyond_boundary: float | None = field(
        default=None,
        metadata={
            "help": "End training after an epoch in which this share of all forget tokens was above its boundary. None: train "
            "all epochs."
        },
    )
    boundary_batch_size: int = field(default=16, metadata={"help": "Rows per forward while boundaries are computed."})

    def __post_init__(self) -> None:
        for setting in fields(self):
            value: Any = getattr(self, setting.name, None)
            if type(value).__module__ == "numpy":  # from a grid of settings; a run could not write it as JSON
                value = value.tolist()
                setattr(self, setting.name, value)
            _check(setting.name, value, lambda x: not isinstance(x, float) or math.isfinite(x), "it must be finite")
        for name in ("gamma", "alpha", "learning_rate"):
            _check(name, getattr(self, name), lambda x: math.isfinite(x) and x >= 0, "it must be finite and at least 0")
        if self.gamma == self.alpha == 0:
            raise EUAError("gamma = 0 and alpha = 0, so the loss would be 0 and nothing would be trained: raise one of them.")
        for name in ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"):
            _check(name, getattr(self, name), lambda x: x > 0, "it must be above 0")
        for name in ("adam_beta1", "adam_beta2"):
            _check(name, getattr(self, name), lambda x: 0 <= x < 1, "it must be at least 0 and below 1")
        _check("seed", self.seed, lambda x: 0 <= x < 2**32, "it must be a whole number from 0, below 2^32")
        _check("dataloader_num_workers", self.dataloader_num_workers, lambda x: x >= 0, "it must be at least 0")
        _check("temperature", self.temperature, lambda x: math.isfinite(x) and x > 0, "T is finite and above 0")
        _check("rho", self.rho, lambda x: 0 < x <= 1, "a share of the vocabulary lies above 0 and at most at 1")
        _check("fill", self.fill, lambda x: x in ("zero", "none"), 'known are "zero" and "none"')
        known = ("constant", "linear", "cosine")
        _check("gamma_schedule", self.gamma_schedule, lambda x: x in known, 'known are "constant", "linear" and "cosine"')
        _check("retain_loss", self.retain_loss, lambda x: x in ("nll", "kl"), 'known are "nll" and "kl"')
        _check("assistant_turns", self.assistant_turns, lambda x: x in ("last", "all"), 'known are "last" and "all"')
        _check("overlap", self.overlap, lambda x: x in ("error", "drop"), 'known are "error" and "drop"')
        _check("gamma_warmup_ratio", self.gamma_warmup_ratio, lambda x: 0 <= x < 1, "a share of the steps, 0 or more, below 1")
        _check(
            "stop_when_beyond_boundary",
            self.stop_when_beyond_boundary,
            lambda x: x is None or 0 < x <= 1,
            "a share of tokens, above 0, at most 1",
        )
        _check("retain_per_forget", self.retain_per_forget, lambda x: x >= 1, "each forget row needs a retain row")
        _check("boundary_batch_size", self.boundary_batch_size, lambda x: x >= 1, "a batch has at least one row")
        _check("max_length", self.max_length, lambda x: x is None or x >= 2, "a row has a prompt and an answer token")
        _check("remove_unused_columns", self.remove_unused_columns, lambda x: not x, "it would drop the boundaries")
        _check(
            "train_sampling_strategy",
            self.train_sampling_strategy,
            lambda x: x in ("random", "group_by_length"),
            'forget and retain rows are paired at random ("random") or by like length ("group_by_length")',
        )
        _check("label_smoothing_factor", self.label_smoothing_factor, lambda x: x == 0, "the loss of D² has no smoothed labels")
        _check("hub_strategy", self.hub_strategy, lambda x: x == "end", "checkpoints, which hold pickles, are never pushed")
        if (self.m_in is None) != (self.m_out is None):
            raise EUAError(
                f"m_in = {self.m_in} and m_out = {self.m_out}, but constant boundaries come as a pair: give both, or neither."
            )
        if self.metric_for_best_model is not None:
            metric = self.metric_for_best_model.removeprefix("eval_")
            if metric not in EVAL_METRICS:
                raise EUAError(
                    f"metric_for_best_model = {self.metric_for_best_model!r}, but evaluation reports no such metric: "
                    f"choose one of {', '.join(f'eval_{name}' for name in EVAL_METRICS)}."
                )
            if metric == "kl_retain" and self.retain_loss != "kl":
                raise EUAError(
                    f'metric_for_best_model = {self.metric_for_best_model!r}, which is measured with retain_loss = "kl" only: '
                    "set that, or choose eval_nll_retain."
                )
            if self.greater_is_better is None:  # TrainingArguments would decide by whether the name ends with "loss"
                self.greater_is_better = EVAL_METRICS[metric]
        super().__post_init__()

    @property
    def constant_boundaries(self) -> tuple[float, float] | None:
        """(m_in, m_out) if they are constants; None if they are computed from the model before unlearning."""
        return None if self.m_in is None or self.m_out is None else (self.m_in, self.m_out)


def _check(name: str, value: Any, valid: Callable[[Any], bool], why: str) -> None:
    if not valid(value):
        raise EUAError(f"{name} = {value!r} cannot be used: {why}.")
