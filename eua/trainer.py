"""EUATrainer: energy-based unlearning alignment on transformers' Trainer."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint
from transformers.utils import logging

from eua.boundaries import compute_boundaries, fingerprint, load_boundaries, save_boundaries
from eua.collator import ForgetRetainCollator, PairedSampler
from eua.config import EUAConfig
from eua.data import IGNORE_INDEX, ForgetRetainDataset, Row, encode_rows, read_rows
from eua.errors import EUAError
from eua.files import fill_folder
from eua.hidden import check_finite, check_head
from eua.losses import d2_loss
from eua.scoring import check_token_ids, token_energies

logger = logging.get_logger(__name__)

BOUNDARIES_FILE = "boundaries.safetensors"
STAGING_FOLDER = ".checkpoint.partial"
TRAINING_ARGS_PICKLE = "training_args.bin"


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint in a run's folder, or None. Every folder that bears the name is whole."""
    found = get_last_checkpoint(str(run)) if run.is_dir() else None
    return None if found is None else Path(found)


class EUATrainer(Trainer):
    """Trains forgotten tokens above one energy boundary and retained tokens below another (D², method.md §3–4).

    Boundaries are computed once, at the start of :meth:`train`, from the model as it was handed in; they are kept in
    ``output_dir/boundaries.safetensors`` and reused by a resumed run. No second model is held while training.

    Args:
        model: a causal language model, or the name or path of one.
        args: :class:`EUAConfig`.
        forget_dataset, retain_dataset: a JSONL path, a ``datasets.Dataset`` or a list of rows, see :mod:`eua.data`.
        processing_class: the model's tokenizer; loaded beside the model when left out.
        peft_config: trains an adapter (LoRA, …) on the frozen model.
        callbacks, optimizers: as in transformers' Trainer.

    Raises:
        EUAError: on rows, settings or models that cannot work, saying why.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: EUAConfig,
        *,
        forget_dataset: str | Path | Iterable[Row],
        retain_dataset: str | Path | Iterable[Row],
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        if args.n_gpu > 1:
            raise EUAError(
                f"{args.n_gpu} GPUs are visible to one process, which Trainer would use through DataParallel, and EUATrainer "
                "cannot: start one process per GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
            )
        if isinstance(model, str):
            # Weights that are trained must be float32: in bfloat16 most steps of a small learning rate round away.
            dtype = "auto" if peft_config is not None else torch.float32
            model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        if hasattr(model, "_orig_mod"):
            raise EUAError(
                "The model comes wrapped by torch.compile, and its weights would be saved under names that no model loads "
                "(_orig_mod.*): pass the model itself, and torch_compile=True to EUAConfig."
            )
        if getattr(model, "_hf_peft_config_loaded", False):
            raise EUAError(
                "The model was loaded from an adapter's folder without PEFT, and what would be trained and saved is unclear: "
                "merge the adapter into its base first, or load it with peft.AutoPeftModelForCausalLM(..., is_trainable=True)."
            )
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise EUAError("peft_config was given with a model that carries an adapter already: pass one or the other.")
            set_seed(args.seed)  # the adapter's start is drawn here
            model = get_peft_model(model, peft_config)
        check_head(model)
        _check_trainable(model)

        rows = {
            "forget": encode_rows(read_rows(forget_dataset, "forget set"), processing_class, args.max_length, "forget set"),
            "retain": encode_rows(read_rows(retain_dataset, "retain set"), processing_class, args.max_length, "retain set"),
        }
        for kind in rows.values():
            check_token_ids(model, (row.input_ids for row in kind))
        use_cache = getattr(model.config, "use_cache", None)  # a multimodal model's config leaves it to its text part
        self._stop_on_signal = _StopOnSignal()
        super().__init__(
            model=model,
            args=args,
            data_collator=ForgetRetainCollator(),
            processing_class=processing_class,
            callbacks=[*(callbacks or []), self._stop_on_signal],
            optimizers=optimizers,
        )
        model.config.use_cache = use_cache  # Trainer turns it off for good; the saved model should generate at full speed
        self.encoded_rows = rows
        # compute_loss divides by the counts of the whole accumulation window itself.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._tallies: Tensor | None = None
        self._starting_boundaries: dict[str, list[Tensor]] | None = None
        self._staging: Path | None = None
        self._saved_step: int | None = None

    # ---- before the first step ----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Compute (or reuse) the boundaries, then train; see ``transformers.Trainer.train``.

        SIGINT or SIGTERM finishes the step, saves a checkpoint and ends in ``KeyboardInterrupt``.
        """
        earlier = last_checkpoint(Path(self.args.output_dir))
        if earlier is not None and not resume_from_checkpoint:
            raise EUAError(
                f"{earlier} belongs to an earlier run, and a later resume could take it for one of this run: pass "
                "resume_from_checkpoint=True to go on with that run, or delete its checkpoints, or name another output_dir."
            )
        boundaries = self._boundaries(resuming=bool(resume_from_checkpoint))
        self.train_dataset = ForgetRetainDataset(
            self.encoded_rows["forget"], self.encoded_rows["retain"], boundaries["forget"], boundaries["retain"]
        )
        with self._stop_on_signal as stop:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if stop.received is not None and self.state.global_step < self.state.max_steps:
            raise KeyboardInterrupt(f"stopped by signal {stop.received} after step {self.state.global_step}")
        self._check_weights()
        self.model.eval()  # what comes next is calibrating and generating, without dropout
        return result

    def _boundaries(self, *, resuming: bool) -> dict[str, list[Tensor]]:
        """One float per answer token, of the weights the trainer was made with: a second ``train()`` reuses them."""
        if self._starting_boundaries is None:
            self._starting_boundaries = self._make_boundaries(resuming)
        return self._starting_boundaries

    def _make_boundaries(self, resuming: bool) -> dict[str, list[Tensor]]:
        if self.args.constant_boundaries is not None:
            m_in, m_out = self.args.constant_boundaries
            constants = {"retain": m_in, "forget": m_out}
            return {
                kind: [torch.full((len(row.answer_ids),), constants[kind]) for row in rows]
                for kind, rows in self.encoded_rows.items()
            }
        settings = {"fraction": self.args.rho, "temperature": self.args.temperature, "fill": self.args.fill}
        key = fingerprint(self.model, self.encoded_rows, settings)
        path = Path(self.args.output_dir) / BOUNDARIES_FILE
        kept = load_boundaries(path, self.encoded_rows, key)
        if kept is not None:
            return kept
        if resuming and path.exists():
            raise EUAError(
                f"{path} belongs to another model, other rows or other settings than this run, so resuming would mix two runs: "
                "start from the model, rows and settings of the interrupted run, or train anew into another folder."
            )
        computed = {
            kind: compute_boundaries(
                self.model,
                rows,
                kind,
                batch_size=self.args.boundary_batch_size,
                progress=not self.args.disable_tqdm,
                **settings,
            )
            for kind, rows in self.encoded_rows.items()
        }
        if self.args.should_save:
            save_boundaries(path, computed, key)
        return computed

    def _get_train_sampler(self, train_dataset: Any = None) -> PairedSampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        forget, retain = self.encoded_rows["forget"], self.encoded_rows["retain"]
        return PairedSampler(len(forget), len(retain), self.args.retain_per_forget, seed)

    # ---- the step -----------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Answer tokens to forget and to retain, (2,), over the accumulation window and all processes."""
        counts = torch.zeros(2)
        for batch in batch_samples:
            per_row = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1).cpu()
            forget = batch["forget"].cpu()
            counts += torch.stack([per_row[forget].sum(), per_row[~forget].sum()])
        return self.accelerator.reduce(counts.to(device), reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The D² loss of one batch, as its share of the accumulation window."""
        with self.accelerator.autocast():  # the head runs here, outside the forward that accelerate casts
            energy, nll = token_energies(model, inputs, self.args.temperature)
        counted = inputs["labels"][:, 1:] != IGNORE_INDEX
        boundary = inputs["boundary"][:, 1:]
        forget = inputs["forget"][:, None]
        forget_count, retain_count = (None, None) if num_items_in_batch is None else num_items_in_batch.unbind()
        parts = d2_loss(
            energy,
            nll,
            boundary,
            forget,
            counted,
            gamma=self.args.gamma,
            alpha=self.args.alpha,
            forget_count=forget_count,
            retain_count=retain_count,
        )
        if not torch.isfinite(parts.loss):
            raise EUAError(
                f"The loss became {parts.loss.item()} at step {self.state.global_step} (NaN or infinity in the hidden states); "
                "no step was taken on it. Lower the learning rate, or use bfloat16 or float32 in place of float16, "
                "and go on from a checkpoint of an earlier step."
            )
        self._tally(energy.detach(), nll.detach(), boundary, forget & counted, ~forget & counted)
        # Gradients are averaged over processes, but the counts are already those of all processes.
        loss = parts.loss * (self.accelerator.num_processes if num_items_in_batch is not None else 1)
        return (loss, {"energy": energy, "nll": nll}) if return_outputs else loss

    # ---- what one sees ------------------------------------------------------------------------------------------

    def _tally(self, energy: Tensor, nll: Tensor, boundary: Tensor, forget: Tensor, retain: Tensor) -> None:
        """Sums over counted tokens, from which :meth:`log` makes token-weighted means."""
        gap_out, gap_in = (boundary - energy).relu(), (energy - boundary).relu()
        # Masked sums rather than indexing, which would make a GPU wait for each of them.
        sums = [
            *(mask.sum() for mask in (forget, retain)),
            *(x.where(forget, 0.0).sum() for x in (gap_out.square(), energy, (gap_out == 0).float())),
            *(x.where(retain, 0.0).sum() for x in (gap_in.square(), energy, (gap_in == 0).float(), nll)),
        ]
        step = torch.stack([x.float() for x in sums])
        self._tallies = step if self._tallies is None else self._tallies + step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, mean energies and the share of tokens beyond their boundary."""
        if self._tallies is not None:
            forget, retain, *sums = self.accelerator.reduce(self._tallies, reduction="sum").tolist()
            names = ("loss_forget", "energy_forget", "met_forget", "loss_retain", "energy_retain", "met_retain", "nll_retain")
            counts = [forget] * 3 + [retain] * 4
            logs.update({name: x / max(n, 1) for name, x, n in zip(names, sums, counts, strict=True)})
            self._tallies = None
        super().log(logs, start_time)

    # ---- nothing is lost ----------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint under a temporary name; a folder called ``checkpoint-N`` is always whole."""
        if self._saved_step == self.state.global_step:
            return  # at the end of an epoch Trainer may ask twice
        self._check_weights()
        run = Path(self.args.output_dir)
        staging = run / STAGING_FOLDER
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (written,) = staging.iterdir()
            if (run / written.name).exists():  # a step that is trained again after resuming from an earlier one
                os.replace(run / written.name, staging / "replaced")
            os.replace(written, run / written.name)
            shutil.rmtree(staging)
            self._delete_old_checkpoints(run)
        self._saved_step = self.state.global_step

    def _delete_old_checkpoints(self, run: Path) -> None:
        limit = self.args.save_total_limit or 0
        steps = sorted(int(path.name.rpartition("-")[2]) for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        for step in steps[:-limit] if limit > 0 else []:
            shutil.rmtree(run / f"{PREFIX_CHECKPOINT_DIR}-{step}", ignore_errors=True)

    def _check_weights(self) -> None:
        """Raise rather than save weights that a step has ruined."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                check_finite(parameter.detach(), f"the weights {name} after step {self.state.global_step}")

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As Trainer's, but whole or not at all, and without its pickle of the arguments."""

        def write(folder: Path) -> None:
            super(EUATrainer, self)._save(str(folder), state_dict)
            (folder / TRAINING_ARGS_PICKLE).unlink(missing_ok=True)

        fill_folder(Path(output_dir or self.args.output_dir), write)


def _check_trainable(model: nn.Module) -> None:
    """Raise when nothing would be trained; warn when steps would be lost to rounding."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if not dtypes:
        raise EUAError("No parameter of the model requires a gradient, so nothing would be unlearned: unfreeze some.")
    if dtypes & {torch.bfloat16, torch.float16}:
        logger.warning(
            "Trainable weights are in half precision, where small steps round away: load the model with "
            "dtype=torch.float32, and set bf16=True for speed."
        )


class _StopOnSignal(TrainerCallback):
    """While entered: on SIGINT or SIGTERM the step is finished, a checkpoint saved, and training ended."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> _StopOnSignal:
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
        if self.received is not None:  # asked twice: stop now
            raise KeyboardInterrupt
        self.received = number
        logger.warning("Stopping after this step; a checkpoint will be saved. Interrupt again to stop at once.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True
