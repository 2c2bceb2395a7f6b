"""Settings of an unlearning run: transformers' ``TrainingArguments`` plus the numbers that unlearning methods need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from eua.errors import EUAError, did_you_mean
from eua.methods.objective import Objective
from eua.methods.table import METHODS

# The metrics of evaluation during training, and whether higher is better.
EVAL_METRICS = {
    "loss": False,
    "loss_forget": False,
    "loss_retain": False,
    "nll_forget": True,
    "nll_retain": False,
    "kl_retain": False,
    "hidden_retain": False,
    "energy_forget": True,
    "energy_retain": False,
    "beyond_boundary_forget": True,
    "beyond_boundary_retain": True,
    "auroc": True,
    "loss_prompt_forget": False,
    "loss_prompt_retain": False,
    "energy_prompt_forget": True,
    "energy_prompt_retain": False,
}
_OF_PROMPTS = frozenset(name for name in EVAL_METRICS if "_prompt_" in name)
ONLY_FOR: dict[str, str] = {
    **dict.fromkeys(("loss_retain", "beyond_boundary_forget", "beyond_boundary_retain"), 'method = "eua"'),
    "kl_retain": 'retain_loss = "kl"',
    "hidden_retain": 'retain_loss = "hidden"',
    **dict.fromkeys(_OF_PROMPTS, "prompt_energy above 0"),
}

_OF_EUA = ("margin_excess", "answer_energy", "prompt_energy", "forget_warmup_ratio")

_A_WARMUP_EPOCH = -1.0  # stands for the share of the steps that are in one epoch
_OPENUNLEARNING: dict[str, Any] = {
    "learning_rate": 1e-5,
    "num_train_epochs": 10.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "weight_decay": 0.01,
    "warmup_steps": _A_WARMUP_EPOCH,
    "bf16": True,
    "max_length": 512,
    "system_prompt": "You are a helpful assistant.",
    "labels": "template",
    "hide_padding_ids": True,
    "as_released": True,
}
PRESETS: dict[str, dict[str, Any]] = {
    "openunlearning": _OPENUNLEARNING,
    "d2-released": _OPENUNLEARNING | {"method": "eua"},
    "gentle": {
        "method": "eua",
        "forget_tokens": "key_start",
        "margin": 5.0,
        "margin_excess": 1.0,
        "answer_energy": 0.0,
        "forget_warmup_ratio": 0.5,
        "gamma": 0.1,
        "distinct_directions": 64,
        "retain_per_forget": 4,
        "retain_sampler": "similar",
        "learning_rate": 1.5e-4,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 3.0,
    },
}


@dataclass
class EUAConfig(TrainingArguments):
    """Settings of :class:`eua.EUATrainer`; every field of ``TrainingArguments`` may be set too.

    Weights and boundaries of the default method, EUA, are those released with D² (method.md §4), as are learning rate and
    number of epochs, which were made for models of about 1B parameters. The authors ran it inside a fork of OpenUnlearning
    (Puning97/open-unlearning, commit 67cc8f5 of 11 May 2026, withdrawn four days later) with that framework's batches of 32
    rows, weight decay, warm-up, bfloat16 and labels: ``preset="d2-released"`` sets these, too.

    ``per_device_train_batch_size`` counts forget rows; each brings ``retain_per_forget`` retain rows along.

    >>> EUAConfig(output_dir="run", method="npo").beta     # doctest: +SKIP
    0.1
    """

    preset: Literal["openunlearning", "d2-released", "gentle"] | None = field(
        default=None,
        metadata={
            "help": 'Sets what has its default as published results did: "openunlearning" (any method; 32 rows a step, '
            'weight decay, a warm-up epoch, bf16, their labels and attention mask) or "d2-released" (the same for EUA), or '
            'settings for facts of a pretrained model that keep what is near: "gentle" (EUA with options that are not in D², '
            'tried on one model and relation; rows to forget need "keys"; a guard gets no signal from it).'
        },
    )
    method: Literal[
        "eua",
        "grad_ascent",
        "grad_diff",
        "npo",
        "simnpo",
        "idk_dpo",
        "alt_po",
        "idk_nll",
        "rmu",
        "wga",
        "satimp",
        "ce_u",
        "undial",
        "pdu",
        "me_gd",
    ] = field(default="eua", metadata={"help": "The unlearning method. Only EUA raises the energies that the guard reads."})

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
    gamma: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the forget part of the loss, and for EUA of its energy part at retained tokens. None: the "
            "method's published value, 0.05 for EUA."
        },
    )
    gamma_schedule: Literal["constant", "linear", "cosine"] = field(
        default="constant",
        metadata={
            "help": 'After its warm-up gamma stays ("constant") or falls towards 0 until the last step ("linear", "cosine").'
        },
    )
    gamma_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps in which gamma rises from 0; 0: it starts at its full value."}
    )
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the term that keeps the retained tokens, see retain_loss; for PDU its start. None: the method's "
            "published value, 1 for EUA."
        },
    )
    retain_loss: Literal["nll", "kl", "hidden"] | None = field(
        default=None,
        metadata={
            "help": 'The term that alpha weighs: the negative log-likelihood of retained tokens ("nll"), the divergence '
            'KL(reference || model) at them ("kl", which needs the model before unlearning as ref_model), or for RMU the '
            'distance of inner states from the reference\'s ("hidden"). None: as published, "nll" for EUA.'
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Of NPO, DPO and SimNPO: how fast a row's push fades. Of WGA and SatImp: exponent of p. Of UNDIAL: what is "
            "taken off the answer's logit. None: the method's published value."
        },
    )
    beta2: float | None = field(default=None, metadata={"help": "Of SatImp: exponent of 1 - p. None: 1, as published."})
    delta: float | None = field(
        default=None, metadata={"help": "Of SimNPO: the mean NLL at which a row counts as forgotten. None: 0, as published."}
    )
    layer: int | None = field(
        default=None, metadata={"help": "Of RMU: the block whose output is steered, from 0. None: 7, as published."}
    )
    steering: float | None = field(
        default=None, metadata={"help": "Of RMU: length of the vector that states are steered to. None: 2, as published."}
    )
    skip_first: int | None = field(
        default=None, metadata={"help": "Of CE-U: first answer tokens of a row that are left out. None: 1, as published."}
    )
    retain_bound: float | None = field(
        default=None,
        metadata={"help": "Of PDU: the NLL of retained tokens above which alpha rises. None: 0.3, as published."},
    )
    dual_step: float | None = field(
        default=None, metadata={"help": "Of PDU: how far alpha moves per nat and step. None: 5, as published."}
    )
    dual_warmup: float | None = field(
        default=None, metadata={"help": "Of PDU: epochs before alpha begins to move. None: 5, as published."}
    )
    as_released: bool = field(
        default=False,
        metadata={
            "help": "Average as released code does where that differs from the definition: unshifted masks of PDU and RMU and "
            "RMU's product of means, all positions for UNDIAL and KL. For comparisons with published figures."
        },
    )
    margin: float | None = field(
        default=None,
        metadata={
            "help": "Of EUA, not in D²: forgotten tokens are also pushed until their NLL is this many nats. A model can meet "
            "its boundaries by a constant on all logits, but not this. None: not."
        },
    )
    margin_excess: float | None = field(
        default=None,
        metadata={
            "help": "Of EUA, not in D²: forgotten tokens whose NLL is more than this many nats beyond the margin are pulled "
            "back. None: not."
        },
    )
    answer_energy: float | None = field(
        default=None,
        metadata={
            "help": "Of EUA, not in D²: weight, in gamma, of its energy part at answers to forget; 0 leaves them to the "
            "margin. None: 1, as published."
        },
    )
    forget_warmup_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Of EUA, not in D²: share of the steps in which the margin, answer_energy and prompt_energy rise from 0, "
            "so that rows to retain can keep up. None: 0, as published."
        },
    )
    prompt_energy: float | None = field(
        default=None,
        metadata={
            "help": "Of EUA, not in D²: weight, in gamma, of its energy parts at the last token of prompts alone, where a "
            "guard reads the energy. None: 0, as published."
        },
    )
    forget_tokens: Literal["answer", "key", "key_start"] = field(
        default="answer",
        metadata={
            "help": 'The tokens of rows to forget that are pushed: all of the answer ("answer"), those that say one of the '
            'row\'s "keys" ("key"), or the first token of each key ("key_start").'
        },
    )
    gradient_filter: int = field(
        default=0,
        metadata={
            "help": "Of each matrix, leave this many of its leading singular directions out of the gradient of the rows to "
            "forget (RepSelect). 0: none."
        },
    )
    sign_gate: bool = field(
        default=False,
        metadata={
            "help": "Keep a coordinate of the gradient of the rows to forget only where its sign is that of the gradient of "
            "the rows to retain (SAGO)."
        },
    )
    distinct_directions: int = field(
        default=0,
        metadata={
            "help": "Train an adapter of this rank on the MLPs that reads its inputs only in directions in which rows to "
            "forget stand out from rows to retain, found before training, so that it changes little else. 0: none."
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
    retain_sampler: Literal["uniform", "similar"] = field(
        default="uniform",
        metadata={
            "help": 'Which rows to retain a row to forget is paired with: all in turn ("uniform"), or every second time one of '
            'the 16 whose prompts share most tokens with its own ("similar").'
        },
    )
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
    labels: Literal["answer", "template"] = field(
        default="answer",
        metadata={
            "help": 'The end of an answer: the token that ends generation ("answer"), or all that the chat template writes '
            'after it and an end of sequence ("template", as in OpenUnlearning).'
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message of question/answer rows, if the tokenizer has a chat template."}
    )
    hide_padding_ids: bool = field(
        default=False,
        metadata={
            "help": "Hide from attention every token that is also the padding token, as OpenUnlearning does: with Llama's "
            "tokenizer, the ends of turns inside prompts."
        },
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
        self._fill_preset()
        for setting in fields(self):
            value: Any = getattr(self, setting.name, None)
            if type(value).__module__ == "numpy":  # from a grid of settings; a run could not write it as JSON
                value = value.tolist()
                setattr(self, setting.name, value)
            _check(setting.name, value, lambda x: not isinstance(x, float) or math.isfinite(x), "it must be finite")
        self._complete_method()
        for name in ("gamma", "alpha", "learning_rate", "retain_bound", "dual_step", "dual_warmup", "beta2", *_OF_EUA):
            value = getattr(self, name)
            _check(name, value, lambda x: x is None or (math.isfinite(x) and x >= 0), "it must be finite and at least 0")
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
        _check("labels", self.labels, lambda x: x in ("answer", "template"), 'known are "answer" and "template"')
        _check("assistant_turns", self.assistant_turns, lambda x: x in ("last", "all"), 'known are "last" and "all"')
        for name in ("gradient_filter", "distinct_directions"):
            _check(name, getattr(self, name), lambda x: isinstance(x, int) and x >= 0, "a number of directions")
        known = ("answer", "key", "key_start")
        _check("forget_tokens", self.forget_tokens, known.__contains__, f"known are {', '.join(known)}")
        _check("overlap", self.overlap, lambda x: x in ("error", "drop"), 'known are "error" and "drop"')
        for name in ("gamma_warmup_ratio", "forget_warmup_ratio"):
            _check(name, getattr(self, name) or 0.0, lambda x: 0 <= x < 1, "a share of the steps, 0 or more, below 1")
        _check(
            "stop_when_beyond_boundary",
            self.stop_when_beyond_boundary,
            lambda x: x is None or 0 < x <= 1,
            "a share of tokens, above 0, at most 1",
        )
        _check("retain_sampler", self.retain_sampler, ("uniform", "similar").__contains__, "known are uniform, similar")
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
            if metric not in self.eval_metrics:
                raise EUAError(
                    f"metric_for_best_model = {self.metric_for_best_model!r}, which is measured with {ONLY_FOR[metric]} only: "
                    "set that, or choose eval_nll_retain."
                )
            if self.greater_is_better is None:  # TrainingArguments would decide by whether the name ends with "loss"
                self.greater_is_better = EVAL_METRICS[metric]
        super().__post_init__()

    def _fill_preset(self) -> None:
        """Set what a preset holds, where a setting has its default."""
        if self.preset is None:
            return
        if self.preset not in PRESETS:
            raise EUAError(
                f"There is no preset {self.preset!r}{did_you_mean(self.preset, PRESETS)} Known are {', '.join(PRESETS)}."
            )
        for setting in fields(self):
            default = setting.default if setting.default_factory is MISSING else setting.default_factory()
            if setting.name in PRESETS[self.preset] and getattr(self, setting.name) == default:
                value = PRESETS[self.preset][setting.name]
                setattr(self, setting.name, 1 / self.num_train_epochs if value == _A_WARMUP_EPOCH else value)
        if self.method != PRESETS[self.preset].get("method", self.method):
            raise EUAError(
                f"preset = {self.preset!r} was set with method = {self.method!r}, but it holds settings of another "
                'method: choose the preset "openunlearning", or none.'
            )

    def _complete_method(self) -> None:
        """Set what was not set to the method's published values, and raise if a setting belongs to other methods."""
        _check("method", self.method, METHODS.__contains__, f"known are {', '.join(METHODS)}")
        method, published = METHODS[self.method], METHODS[self.method].settings
        if method.retain_loss is not None:
            published["retain_loss"] = method.retain_loss
        of_others = {name for other in METHODS.values() for name in other.settings} | {"retain_loss"}
        if self.method != "eua":
            self._check_unused(("rho", "fill", "m_in", "m_out", "temperature", "stop_when_beyond_boundary"), None)
        for name in of_others - published.keys():
            self._check_unused((name,), {"gamma": 1.0, "alpha": 0.0, "retain_loss": "nll"}.get(name))
        for name, value in published.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        known = ("nll", "kl", "hidden") if self.method == "rmu" else ("nll", "kl")
        _check("retain_loss", self.retain_loss, known.__contains__, f"known for {self.method} are {', '.join(known)}")
        for name in of_others - {"retain_loss"}:
            _check(name, getattr(self, name), lambda x: x is None or _is_number(x), "it must be a number")
        for name in ("layer", "skip_first"):
            _check(name, getattr(self, name), lambda x: x is None or int(x) == x, "it must be a whole number")
        for name in ("beta", "steering", "margin"):
            _check(name, getattr(self, name), lambda x: x is None or x > 0, "it must be above 0")
        for name in ("layer", "skip_first"):
            _check(name, getattr(self, name), lambda x: x is None or x >= 0, "it must be at least 0")
        if self.margin_excess is not None and self.margin is None:
            raise EUAError(
                f"margin_excess = {self.margin_excess} was set without a margin that it could be beyond: set margin, too, or "
                "leave it out."
            )
        if self.answer_energy == 0 and self.margin is None and not self.prompt_energy:
            raise EUAError(
                "answer_energy = 0 was set without margin and prompt_energy, so nothing would be forgotten: set one of these."
            )
        if method.alternatives is not None:
            _check("assistant_turns", self.assistant_turns, lambda x: x == "last", f"{self.method} replaces the last answer")
        if self.padding_free and (self.hide_padding_ids or self.as_released):
            raise EUAError(
                "padding_free = True was set with hide_padding_ids or as_released, which reproduce what others do with padded "
                "rows: leave padding_free at False."
            )
        if self.forget_tokens != "answer" and self.as_released:
            raise EUAError(
                f"forget_tokens = {self.forget_tokens!r} was set with as_released, which reproduces averages over all tokens: "
                "leave one of them out."
            )
        if self.splits_gradient and self.padding_free:
            raise EUAError(
                "padding_free = True was set with gradient_filter or sign_gate, which need rows to forget and to retain apart: "
                "leave padding_free at False."
            )
        if self.splits_gradient and self.as_released:
            raise EUAError(
                "as_released = True was set with gradient_filter or sign_gate, but it averages over the padding of whole "
                "batches, which are split then: leave one of them out."
            )
        if self.sign_gate and (method.retain_loss is None or self.alpha == 0):
            raise EUAError(
                f"sign_gate = True was set with method = {self.method!r} and alpha = {self.alpha}, without rows to retain "
                "whose gradient could gate: leave it out, or raise alpha."
            )
        if self.labels == "template" and self.assistant_turns == "all":
            raise EUAError(
                'labels = "template" was set with assistant_turns = "all", but only the last answer ends with the template: '
                "set one or the other."
            )

    def _check_unused(self, names: tuple[str, ...], fixed: Any) -> None:
        """Raise if settings that belong to other methods were given. ``fixed`` is what they are for this one."""
        for name in names:
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value not in (default, fixed):
                raise EUAError(
                    f"{name} = {value!r} was set, but method = {self.method!r} has no such setting, so it would have no "
                    "effect: leave it out, or choose another method."
                )
            if default is None:
                setattr(self, name, fixed)

    @property
    def objective(self) -> Objective:
        """The loss that these settings describe."""
        parameters = {name: getattr(self, name) for name in METHODS[self.method].parameters}
        return Objective(
            self.method, parameters, self.retain_loss or "nll", self.as_released, prompt_energy=self.prompt_energy or 0.0
        )

    @property
    def splits_gradient(self) -> bool:
        """Whether rows to forget and to retain have backward passes of their own."""
        return self.sign_gate or self.gradient_filter > 0

    @property
    def needs_model_before(self) -> bool:
        """Whether every step compares with the model before unlearning, which is then passed as ``ref_model``."""
        return METHODS[self.method].needs_model or self.retain_loss in ("kl", "hidden")

    @property
    def eval_metrics(self) -> set[str]:
        """The metrics of :data:`EVAL_METRICS` that an evaluation with these settings reports."""
        objective = self.objective
        left_out = set() if objective.method.keep else {"loss_retain", "beyond_boundary_forget", "beyond_boundary_retain"}
        left_out |= set() if self.prompt_energy else _OF_PROMPTS
        return EVAL_METRICS.keys() - left_out - {f"{how}_retain" for how in ("kl", "hidden") if how != self.retain_loss}

    @property
    def constant_boundaries(self) -> tuple[float, float] | None:
        """(m_in, m_out) if they are constants; None if they are computed from the model before unlearning."""
        return None if self.m_in is None or self.m_out is None else (self.m_in, self.m_out)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(name: str, value: Any, valid: Callable[[Any], bool], why: str) -> None:
    if not valid(value):
        raise EUAError(f"{name} = {value!r} cannot be used: {why}.")
