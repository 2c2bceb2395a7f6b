"""EUATrainer: energy-based unlearning, and the methods that came before, on transformers' Trainer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import TrainOutput, speed_metrics
from transformers.utils import logging

from eua.data.batches import ForgetRetainCollator, ForgetRetainDataset
from eua.data.dates import writes_date
from eua.data.pairing import PairedSampler, similar_rows
from eua.data.sources import Source
from eua.distributed import is_sharded
from eua.errors import EUAError, in_one_line
from eua.files import locked
from eua.methods.answers import Answers, Places
from eua.methods.objective import Figures, added, figure_means, scheduled
from eua.model.forgotten import forgotten_prompts, prompt_digest, set_forgotten
from eua.model.forward import block_of, check_head, freeze_above, hidden_and_inner_states, token_energies
from eua.model.head import output_head
from eua.model.loading import load_model, load_tokenizer
from eua.training.boundaries import ReferenceStore
from eua.training.checkpoints import CheckpointingTrainer, last_checkpoint, read_checkpoint
from eua.training.checks import (
    check_arguments,
    check_batches,
    check_model,
    check_optimizer,
    check_padding_free,
    check_rows,
    check_saving,
    check_scheduler,
    check_setup,
    check_trainable,
)
from eua.training.config import EUAConfig
from eua.training.directions import DistinctDirections, adapter_on_mlps
from eua.training.dual_weight import DualWeight
from eua.training.evaluation import held_out_metrics
from eua.training.gradients import ForgetGradient, parts_of
from eua.training.model_card import model_card
from eua.training.reference import Reference
from eua.training.row_sets import RowSets, check_rows_fit, pairs_of_epochs
from eua.training.run_date import run_date, save_run_date
from eua.training.stopping import StopWhenBeyondBoundary

logger = logging.get_logger(__name__)

BOUNDARIES_FILE = "boundaries.safetensors"
DIRECTIONS_FILE = "directions.safetensors"


class OnTrainBegin(TrainerCallback):
    """Calls a function once the model is wrapped and a checkpoint to resume from is loaded, before the first step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.function()


def _name_of(model: nn.Module) -> str:
    name: str | None = getattr(getattr(model, "config", None), "name_or_path", None)
    if not name:
        raise EUAError(
            "The model was made in memory, so it has no name from which its tokenizer could be loaded: pass the tokenizer as "
            "processing_class."
        )
    return name


class EUATrainer(CheckpointingTrainer):
    """Trains forgotten tokens above one energy boundary and retained tokens below another (D², method.md §3–4).

    ``EUAConfig(method=...)`` chooses another method of the field instead, see :data:`eua.methods.table.METHODS`; data, batches,
    pairing and checkpoints are the same for all.

    What a method needs of the model before unlearning (boundaries, likelihoods) is computed once, at the start of
    :meth:`train`, from the model as it was passed in; it is kept in ``output_dir/boundaries.safetensors``, where a resumed run
    finds it.
    Training holds no second model, unless the method compares whole predictions or inner states.

    A chat template that writes the current date writes the date on which the run began, on whatever day it is resumed.

    Args:
        model: a causal language model, or the name or path of one.
        args: :class:`EUAConfig`.
        forget_dataset, retain_dataset: rows of :mod:`eua.data.rows`, from any source of :mod:`eua.data.sources`: a file, the
            name of a data set on the hub, a ``datasets.Dataset``, a ``DataFrame`` or a list.
        eval_forget_dataset, eval_retain_dataset: rows held out from training, from the same sources, for :meth:`evaluate`,
            which ``eval_strategy="steps"`` or ``"epoch"`` calls during training.
        ref_model: the model before unlearning, or its name or path. It stays in memory: EUA's boundaries of training rows are
            then computed from it at every step, not beforehand, and ``retain_loss="kl"``, RMU and UNDIAL compare the model in
            training with it.
        processing_class: the model's tokenizer; loaded from the model's folder if None.
        peft_config: trains an adapter (LoRA, …) on the frozen model.
        callbacks, optimizers: as in transformers' Trainer.

    Raises:
        EUAError: if rows, settings or the model cannot work; the message says why.
    """

    control: TrainerControl

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        args: EUAConfig,
        *,
        forget_dataset: Source,
        retain_dataset: Source,
        eval_forget_dataset: Source | None = None,
        eval_retain_dataset: Source | None = None,
        ref_model: str | os.PathLike[str] | PreTrainedModel | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        ref_model = os.fspath(ref_model) if isinstance(ref_model, os.PathLike) else ref_model
        check_arguments(args, ref_model, eval_forget_dataset, eval_retain_dataset)
        check_scheduler(args)
        if processing_class is None:
            processing_class = load_tokenizer(model if isinstance(model, str) else _name_of(model))
        sources = {"forget": forget_dataset, "retain": retain_dataset}
        if eval_forget_dataset is not None and eval_retain_dataset is not None:
            sources |= {"eval_forget": eval_forget_dataset, "eval_retain": eval_retain_dataset}
        self.date = self._today = run_date() if writes_date(processing_class) else None
        self.row_sets = RowSets(sources, processing_class, args)
        rows = self.row_sets.encode(self.date)  # before a model is loaded, which may take minutes
        check_batches(args, len(rows["forget"]))
        check_rows(args, rows)
        kept = self.row_sets.kept(rows)
        if isinstance(model, str):
            # Weights that are trained must be float32: in bfloat16 most steps of a small learning rate round away.
            is_adapter = peft_config is not None or args.distinct_directions > 0
            model, _ = load_model(model, "auto" if is_adapter else torch.float32, place=False)
        check_model(model)
        if args.distinct_directions:
            if peft_config is not None or isinstance(model, PeftModel):
                raise EUAError(
                    f"distinct_directions = {args.distinct_directions} was set with an adapter, but it makes one of its own: "
                    "leave out peft_config or distinct_directions; merge an adapter of an earlier run first (merge_and_unload)."
                )
            peft_config = adapter_on_mlps(model, args.distinct_directions)
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise EUAError("peft_config was given with a model that carries an adapter already: pass one or the other.")
            set_seed(args.seed)  # the adapter's start is drawn here
            model = get_peft_model(model, peft_config)
        self._directions: DistinctDirections | None = None
        if args.distinct_directions:
            self._directions = DistinctDirections(model, Path(args.output_dir) / DIRECTIONS_FILE)
        check_trainable(model)
        if optimizers[0] is None:
            check_optimizer(args, model)
        if args.layer is not None and args.retain_loss == "hidden":
            freeze_above(model, args.layer)
        if args.should_save:
            check_saving(model, processing_class, Path(args.output_dir))
        check_rows_fit(model, rows)
        rows["retain"] = kept  # only now, so that messages count rows as they were passed
        self.reference: Reference | None = None
        if ref_model is not None:
            if isinstance(ref_model, str):
                ref_model, _ = load_model(ref_model, place=False)
            self.reference = Reference(ref_model, model, args.device)

        use_cache = getattr(model.config, "use_cache", None)  # a multimodal model's config has it only in its text part
        self._stop_when_beyond_boundary: StopWhenBeyondBoundary | None = None
        if args.stop_when_beyond_boundary is not None:
            self._stop_when_beyond_boundary = StopWhenBeyondBoundary(
                args.stop_when_beyond_boundary, lambda x: self.accelerator.reduce(x, reduction="sum")
            )
            callbacks = [*(callbacks or []), self._stop_when_beyond_boundary]
        self.objective = args.objective
        self._dual_weight: DualWeight | None = None
        if "dual_step" in self.objective.method.others:
            self._dual_weight = DualWeight(args, lambda x: self.accelerator.reduce(x, reduction="sum"))
            callbacks = [*(callbacks or []), self._dual_weight]
        self._resumed_state: TrainerState | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=ForgetRetainCollator(args.padding_free),
            eval_dataset=rows.get("eval_forget"),  # Trainer asks that there be one; evaluate() reads encoded_rows
            processing_class=processing_class,
            callbacks=[OnTrainBegin(self._begin), *(callbacks or [])],
            optimizers=optimizers,
        )
        model.config.use_cache = use_cache  # Trainer turns it off for good; the saved model should generate at full speed
        check_setup(
            self.accelerator,
            model,
            self.reference,
            splits_gradient=args.splits_gradient,
            distinct_directions=args.distinct_directions > 0,
        )
        self._forget_gradient: ForgetGradient | None = None
        if args.splits_gradient:
            self._forget_gradient = ForgetGradient(model, args.gradient_filter, args.sign_gate)
        if not is_sharded(self.accelerator):
            self._check_forward()
        self.encoded_rows = rows
        self._similar_rows: list[list[int]] | None = None  # found once, by the first sampler
        self._forgotten_before = forgotten_prompts(model)
        self.prompts_to_forget = frozenset(map(prompt_digest, self.row_sets.prompts_to_forget(rows, self.date)))
        # compute_loss divides by the counts of the whole accumulation window itself.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._figures: Figures | None = None  # of the steps since the last line of the log
        self.reference_values = self._reference_store()

    def _reference_store(self) -> ReferenceStore:
        return ReferenceStore(
            self.output_folder / BOUNDARIES_FILE,
            self.encoded_rows,
            method=self.args.method,
            constants=self.args.constant_boundaries,
            every_step=self.reference is not None and self.objective.method.reference == "boundary",
            fraction=self.args.rho,
            temperature=self.args.temperature,
            fill=self.args.fill,
        )

    @property
    def forgotten_prompts(self) -> frozenset[str]:
        """Digests of the prompts that the model has forgotten: in earlier runs and, once it has made a step, in this one."""
        return self._forgotten_before | (self.prompts_to_forget if self.state.global_step else frozenset())

    # ---- before the first step ----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Compute the boundaries or read them from their file, then train; see ``transformers.Trainer.train``.

        SIGINT or SIGTERM finishes the step, saves a checkpoint and raises ``KeyboardInterrupt``. Until training ends, no other
        process can train into ``output_dir``.
        """
        with locked(self.output_folder) if self.args.should_save else nullcontext():
            return self._train(resume_from_checkpoint, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, **kwargs: Any) -> TrainOutput:
        earlier = last_checkpoint(self.output_folder)
        if earlier is not None and not resume_from_checkpoint:
            raise EUAError(
                f"{earlier} belongs to an earlier run, and a later resume could take it for one of this run: pass "
                "resume_from_checkpoint=True to go on with that run, or delete its checkpoints, or name another output_dir."
            )
        if earlier is None and resume_from_checkpoint is True:
            raise EUAError(f"{self.output_folder} has no checkpoint to resume from: name one, or train without resuming.")
        checkpoint = earlier if resume_from_checkpoint is True else resume_from_checkpoint
        self._resumed_state = read_checkpoint(Path(checkpoint)) if checkpoint else None
        self._write_date_of(Path(checkpoint).parent if checkpoint else None)
        boundaries = self._find_boundaries(resuming=bool(checkpoint))
        if is_sharded(self.accelerator) and checkpoint and self.reference_values.missing:
            raise EUAError(
                f"{self.reference_values.path} lacks boundaries or likelihoods of {self.reference_values.missing} rows, and "
                f"weights in {checkpoint} have been trained since: put that file back, or train anew into another folder."
            )
        method = self.objective.method
        keeps_nothing = method.keep is None and self.args.alpha == 0 and self._dual_weight is None
        without = [kind for kind, is_out in (("forget", method.replaces), ("retain", keeps_nothing)) if is_out]
        self.train_dataset = ForgetRetainDataset(self.encoded_rows, boundaries, without)
        try:
            with self.stop_on_signal as stop, self._beginning_explained():
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            set_forgotten(self.model, self.forgotten_prompts)
        if self.is_interrupted():
            raise KeyboardInterrupt(f"stopped by signal {stop.received} after step {self.state.global_step}")
        self.check_weights()
        extract_model_from_parallel(self.model, keep_fp32_wrapper=False)  # the model computes in its own dtype again
        self.model.eval()  # without dropout, for calibration and generation
        return result

    @contextmanager
    def _beginning_explained(self) -> Iterator[None]:
        """Until the first step, Trainer builds data loader, optimizer and engine from settings that it has not yet checked."""
        self._has_begun = False
        try:
            yield
        except EUAError:
            raise
        except (ValueError, TypeError, ImportError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            if self._has_begun:
                raise
            raise EUAError(
                f"Training cannot begin with these settings ({in_one_line(error)}): correct those that the reason names."
            ) from error

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """As Trainer's, but without an epoch to train if the run to resume has ended: Trainer would make one more step."""
        epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        state, stop = self._resumed_state, self._stop_when_beyond_boundary
        has_ended = state is not None and (state.global_step >= max_steps or (stop is not None and stop.has_ended(state)))
        return (0 if has_ended else epochs, *others, max_steps)

    def _check_forward(self) -> None:
        check_head(self.model)
        if self.args.padding_free:
            check_padding_free(self.model)
        if self.args.layer is not None:
            block_of(self.model, self.args.layer)
        if "mean logit" in self.objective.method.needs:
            head = output_head(self.model)
            head.mean_logit(head.weight[:1])  # raises for a model that caps its logits

    def _write_date_of(self, resumed: Path | None) -> None:
        """Until the first step, let the template write the date of the run in the folder ``resumed``, or today's.

        If that is another date than before, rows are encoded again.
        """
        if self.date is None or self.state.global_step:
            return
        date = self._today if resumed is None else run_date(resumed)
        if date == self.date:
            return
        rows = self.row_sets.encode(date)
        check_rows_fit(self.model, rows)
        rows["retain"] = self.row_sets.kept(rows)
        self.date, self.encoded_rows, self._similar_rows = date, rows, None
        self.reference_values = self._reference_store()

    def _find_boundaries(self, *, resuming: bool) -> dict[str, list[Tensor]]:
        """The boundaries from the weights that the trainer was created with; a second ``train()`` uses the same ones.

        Sharded weights give them only once training is prepared, see :meth:`_begin`.
        """
        if self.date is not None and self.args.should_save:
            save_run_date(self.output_folder, self.date)
        if self._directions is not None:
            self._directions.set(
                self.encoded_rows,
                resuming=resuming,
                save=self.is_world_process_zero(),
                batch_size=self.args.boundary_batch_size,
            )
        used = self._get_train_sampler().rows_used(pairs_of_epochs(self.args, len(self.encoded_rows["forget"])))
        self.reference_values.look_up(self._reference_model, resuming=resuming, used=used)
        if not is_sharded(self.accelerator):
            self._complete_boundaries()
        return self.reference_values.values

    def _complete_boundaries(self) -> None:
        self.reference_values.complete(
            self._reference_model, batch_size=self.args.boundary_batch_size, progress=not self.args.disable_tqdm
        )

    @property
    def _reference_model(self) -> nn.Module:
        return self.model if self.reference is None else self.reference.model

    def _begin(self) -> None:
        self._has_begun = True
        if is_sharded(self.accelerator):  # every process has its shard of the weights only now
            self._check_forward()
            self._complete_boundaries()

    def _get_train_sampler(self, train_dataset: Any = None) -> PairedSampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        forget, retain = ([len(row.input_ids) for row in self.encoded_rows[kind]] for kind in ("forget", "retain"))
        group = self.args.per_device_train_batch_size if self.args.train_sampling_strategy == "group_by_length" else 0
        if self.args.retain_sampler == "similar" and self._similar_rows is None:
            prompts = {kind: [row.prompt_ids for row in self.encoded_rows[kind]] for kind in ("forget", "retain")}
            self._similar_rows = similar_rows(prompts["forget"], prompts["retain"])
        ratio, alternatives = self.args.retain_per_forget, self.row_sets.alternatives
        return PairedSampler(forget, retain, ratio, seed, group, alternatives, self._similar_rows)

    # ---- the step -----------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The batches of one step, and what its means are divided by: :meth:`Objective.counts` of them over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.zeros(4, device=device)
        for batch in batches:
            counts += self.objective.counts(Places.of(batch)).to(device)
        return batches, self.accelerator.reduce(counts, reduction="sum")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As Trainer's, but with ``gradient_filter`` or ``sign_gate`` the rows to forget and those to retain, which make up a
        batch, have a forward and a backward of their own: as many tokens as together."""
        if self._forget_gradient is None:
            return super().training_step(model, inputs, num_items_in_batch)
        forget, retain = parts_of(inputs)
        losses = []
        with self._forget_gradient.collecting():
            losses.append(super().training_step(model, forget, num_items_in_batch))
        if len(retain["row"]):
            losses.append(super().training_step(model, retain, num_items_in_batch))
        if self.accelerator.sync_gradients:  # the step's last batch
            self._forget_gradient.add()
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The method's loss of one batch, as its share of the step's loss."""
        answers = self._answers(model, inputs)
        step = self.state.global_step
        objective = self.objective
        if self.args.forget_warmup_ratio:
            risen = scheduled(1.0, "constant", self.args.forget_warmup_ratio, step, max(self.state.max_steps, 1))
            objective = replace(objective, warmup=risen)
        loss, figures = objective.loss(answers, self._gamma(step), self._alpha, num_items_in_batch)
        if not torch.isfinite(loss):
            raise EUAError(
                f"The loss became {loss.item()} at step {self.state.global_step} (NaN or infinity in the hidden states); "
                "no step was taken on it. Lower the learning rate, or use bfloat16 or float32 in place of float16, "
                "and go on from a checkpoint of an earlier step."
            )
        self._figures = added(self._figures, figures)
        if self._stop_when_beyond_boundary is not None:
            self._stop_when_beyond_boundary.add(figures["beyond_boundary_forget"])
        if self._dual_weight is not None:
            self._dual_weight.add(figures[f"{self.args.retain_loss}_retain"])
        # Gradients are averaged over processes, but the counts are already those of all processes.
        loss = loss * (self.accelerator.num_processes if num_items_in_batch is not None else 1)
        return (loss, {"energy": answers.energy, "nll": answers.nll}) if return_outputs else loss

    def _answers(self, model: nn.Module, batch: dict[str, Tensor], *, held_out: bool = False) -> Answers:
        """What the loss reads of a batch. Held-out rows have their boundaries beforehand, even with a reference model."""
        settings, places = self.args, Places.of(batch)
        with self.accelerator.autocast():  # the head runs here, outside the forward that accelerate casts
            hidden, inner = hidden_and_inner_states(model, batch, settings.layer)
            energy, nll = token_energies(model, batch, settings.temperature, hidden)
        reads_hidden = "hidden" in self.objective.method.needs or settings.retain_loss == "kl"
        figures = batch["reference"][:, 1:]
        ref_hidden = ref_inner = None
        if self.reference is not None:
            ref_hidden, ref_inner = self.reference.states(batch, settings.layer)
            if self.reference_values.every_step and settings.constant_boundaries is None and not held_out:
                computed = (settings.rho, settings.temperature, settings.fill)
                figures = self.reference.boundaries(ref_hidden, places, *computed)
        return Answers(
            places,
            energy,
            nll,
            figures,
            hidden=hidden if reads_hidden else None,
            head=output_head(model) if reads_hidden else None,
            ref_hidden=ref_hidden,
            ref_head=None if self.reference is None else self.reference.head,
            inner=inner,
            ref_inner=ref_inner,
            seed=settings.seed,
        )

    @property
    def _alpha(self) -> float:
        return self.args.alpha if self._dual_weight is None else self._dual_weight.value

    def _gamma(self, step: int) -> float:
        settings = self.args
        steps = max(self.state.max_steps, 1)
        return scheduled(settings.gamma, settings.gamma_schedule, settings.gamma_warmup_ratio, step, steps)

    def _save_state(self, folder: Path) -> None:
        if self._stop_when_beyond_boundary is not None:
            self._stop_when_beyond_boundary.save_to(self.state)
        if self._dual_weight is not None:
            self._dual_weight.save_to(self.state)
        super()._save_state(folder)

    # ---- metrics ------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the parts of the loss, mean energies, shares of tokens beyond their boundaries, and the last γ."""
        if self._figures is not None:
            logs["gamma"] = self._gamma(self.state.global_step - 1)
            if self._dual_weight is not None:
                logs["alpha"] = self._dual_weight.used
            sums = self.accelerator.reduce(torch.stack(list(self._figures.values())), reduction="sum")
            logs.update(figure_means(dict(zip(self._figures, sums, strict=True))))
            self._figures = None
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss of the held-out rows, its parts, and ``auroc``, see :mod:`eua.training.evaluation`.

        Every process measures all rows, so nothing is gathered. Trainer's own loop is not used: its data loader draws from the
        random state, and the steps that follow would differ from those without evaluation.
        """
        if eval_dataset is not None:
            raise EUAError(
                "evaluate() was given a dataset, but boundaries of held-out rows come from the model before training: "
                "pass eval_forget_dataset and eval_retain_dataset to EUATrainer instead."
            )
        if "eval_forget" not in self.encoded_rows:
            raise EUAError(
                "evaluate() was called, but there are no rows to evaluate on: "
                "pass eval_forget_dataset and eval_retain_dataset to EUATrainer."
            )
        started = time.time()
        if is_sharded(self.accelerator) and self.reference_values.missing:
            raise EUAError(
                "evaluate() was called before train(), but only train() shards the model over the processes and computes its "
                "boundaries: set eval_on_start = True to evaluate before the first step."
            )
        resuming = last_checkpoint(self.output_folder) is not None
        if resuming:
            self._write_date_of(self.output_folder)
        boundaries = self._find_boundaries(resuming=resuming)
        rows = {kind: self.encoded_rows[f"eval_{kind}"] for kind in ("forget", "retain")}
        alternatives = self.encoded_rows.get("eval_alternative", [])
        measured = held_out_metrics(
            self.model,
            rows | {"alternative": alternatives},
            {kind: boundaries[f"eval_{kind}"] for kind in (*rows, *(["alternative"] if alternatives else []))},
            answers=partial(self._answers, self.model, held_out=True),
            objective=self.objective,
            gamma=self.args.gamma,
            alpha=self._alpha,
            batch_size=self.args.per_device_eval_batch_size,
            progress=not self.args.disable_tqdm,
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=sum(map(len, rows.values())))
        super().log(metrics)  # self.log() would add the sums of the training steps since the last line
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def model_card(self, **metadata: Any) -> str:
        """The README.md of the saved model, see :func:`eua.training.model_card.model_card`."""
        return model_card(self, **metadata)
