"""Checks of a trainer's arguments, model and setup that fail before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, get_scheduler
from transformers.utils import logging

from eua.data.batches import flatten_rows, pad_rows
from eua.data.rows import EncodedRow
from eua.distributed import is_sharded, zero_stage
from eua.errors import EUAError, in_one_line
from eua.files import check_output_folder, free_bytes
from eua.methods.table import METHODS
from eua.model.forward import hidden_states
from eua.model.head import vocabulary_and_device
from eua.training.config import EUAConfig

logger = logging.get_logger(__name__)


def check_arguments(args: EUAConfig, ref_model: object, eval_forget: object, eval_retain: object) -> None:
    """Raise if arguments of the trainer contradict one another."""
    if not isinstance(args, EUAConfig):
        raise EUAError(
            f"args is a {type(args).__name__}, which has no settings of the method (gamma, alpha, rho, …): pass an EUAConfig, "
            "which takes the same fields."
        )
    if args.n_gpu > 1:
        raise EUAError(
            f"{args.n_gpu} GPUs are visible to one process, which Trainer would use through DataParallel, and EUATrainer "
            "cannot: start one process per GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
        )
    _check_ref_model(args, ref_model)
    _check_eval_datasets(args, eval_forget, eval_retain)
    if args.should_save:
        check_output_folder(Path(args.output_dir), allowed=True, how="")


def check_optimizer(args: EUAConfig, model: nn.Module) -> None:
    """Raise if the optimizer cannot be had, which Trainer finds out only after the boundaries are computed."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, model)
    except Exception as error:  # from the libraries that contain optimizers, and of its arguments
        raise EUAError(
            f"optim = {getattr(args.optim, 'value', args.optim)!r} with optim_args = {args.optim_args!r} cannot be used "
            f"({in_one_line(error)}): install what it needs, or choose another."
        ) from error


def check_scheduler(args: EUAConfig) -> None:
    """Raise if the learning-rate scheduler cannot be built, which Trainer finds out only after the boundaries are computed."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate or 1.0)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 2, args.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        raise EUAError(
            f"lr_scheduler_type = {args.lr_scheduler_type.value!r} cannot be used with lr_scheduler_kwargs = "
            f"{args.lr_scheduler_kwargs} ({error}): give the keywords that this scheduler takes."
        ) from error


def check_batches(args: EUAConfig, forget_rows: int) -> None:
    """Raise if incomplete batches are to be dropped and there is no complete one."""
    needed = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and forget_rows < needed:
        raise EUAError(
            f"dataloader_drop_last = True, but {forget_rows} rows to forget do not fill a batch of {needed} "
            f"(per_device_train_batch_size = {args.per_device_train_batch_size}, processes: {args.world_size}), so no step is "
            "made: lower the batch size, or leave dataloader_drop_last at False."
        )


def check_rows(args: EUAConfig, rows: Mapping[str, Sequence[EncodedRow]]) -> None:
    """Raise if the method would train on no token of the rows to forget."""
    longest = max(len(row.answer_ids) for row in rows["forget"])
    if args.skip_first is not None and longest <= args.skip_first:
        raise EUAError(
            f"skip_first = {args.skip_first}, but the longest answer to forget has {longest} tokens, so nothing would be "
            "trained: lower skip_first."
        )


def check_model(model: nn.Module) -> None:
    """Raise if the model is wrapped in a way in which it could not be trained or saved."""
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


def _check_ref_model(args: EUAConfig, ref_model: object) -> None:
    """Raise if a reference is needed and missing, or given and not needed."""
    if args.needs_model_before and ref_model is None:
        is_of_method = METHODS[args.method].needs_model or args.retain_loss == "hidden"
        what = f"method = {args.method!r}" if is_of_method else f'retain_loss = "{args.retain_loss}"'
        raise EUAError(
            f"{what} was set without a ref_model, so there is nothing to compare the model with: "
            "pass ref_model, a second copy of the model before unlearning, or "
            + ("choose another method." if is_of_method else 'leave retain_loss at "nll".')
        )
    if args.needs_model_before or ref_model is None:
        return
    if args.constant_boundaries is not None:
        raise EUAError(
            f"ref_model was given with m_in = {args.m_in} and m_out = {args.m_out}, and nothing would be read from it, "
            'since boundaries are these constants: leave out one or the other, or set retain_loss = "kl".'
        )
    if args.method != "eua":
        raise EUAError(
            f"ref_model was given with method = {args.method!r}, and nothing would be read from it, since this method compares "
            "with no model, or with likelihoods computed once: leave it out."
        )


def _check_eval_datasets(args: EUAConfig, forget: object, retain: object) -> None:
    """Raise if there are no rows for an evaluation that was asked for, or rows of one kind only."""
    if (forget is None) != (retain is None):
        given, missing = ("eval_retain_dataset", "eval_forget_dataset")[:: 1 if forget is None else -1]
        raise EUAError(
            f"{given} was given without {missing}, but what is measured compares rows to forget with rows to retain: "
            "pass both, or neither."
        )
    if forget is None and (args.eval_strategy != "no" or args.eval_on_start):
        how = "eval_on_start = True" if args.eval_on_start else f"eval_strategy = {args.eval_strategy.value!r}"
        raise EUAError(
            f"{how} was set, but there are no rows to evaluate on: "
            'pass eval_forget_dataset and eval_retain_dataset, rows held out from training, or leave evaluation off ("no").'
        )


def check_trainable(model: nn.Module) -> None:
    """Raise if nothing would be trained; warn if steps would be lost to rounding."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if not dtypes:
        raise EUAError("No parameter of the model requires a gradient, so nothing would be unlearned: unfreeze some.")
    if dtypes & {torch.bfloat16, torch.float16}:
        logger.warning(
            "Trainable weights are in half precision, where small steps round away: load the model with "
            "dtype=torch.float32, and set bf16=True for speed."
        )


def check_setup(
    accelerator: Accelerator,
    model: torch.nn.Module,
    reference: object,
    *,
    splits_gradient: bool = False,
    distinct_directions: bool = False,
) -> None:
    """Raise if the model is distributed over processes in a way that is not supported."""
    if distinct_directions and is_sharded(accelerator):
        raise EUAError(
            "distinct_directions was set with FSDP or ZeRO-3, but the directions are found by forwards before training, when "
            "no process has all weights: leave it out, or train with DDP."
        )
    if splits_gradient and (accelerator.num_processes > 1 or is_sharded(accelerator) or zero_stage(accelerator)):
        raise EUAError(
            "gradient_filter or sign_gate was set in a run of several processes or with DeepSpeed, which add gradients up "
            "before those of rows to forget could be kept apart: leave both out, or train in one process."
        )
    state = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and not accelerator.is_fsdp2:
        raise EUAError(
            "FSDP version 1 keeps weights in flat parameters, from which the output head cannot be read: "
            'use FSDP2, `accelerate launch --fsdp_version 2` or fsdp_config={"version": 2}.'
        )
    if zero_stage(accelerator) == 3:
        config = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not config.get("stage3_gather_16bit_weights_on_model_save"):
            raise EUAError(
                "DeepSpeed ZeRO-3 would not gather the weights when the model is saved, so no model that loads could come of "
                "the run: set zero_optimization.stage3_gather_16bit_weights_on_model_save to true "
                "(`accelerate launch --zero3_save_16bit_model true`)."
            )
    parallel = getattr(accelerator, "parallelism_config", None)
    if is_sharded(accelerator) and reference is not None:
        raise EUAError(
            "ref_model was given, but FSDP and ZeRO-3 shard only the model in training, and each process would hold all of the "
            'reference: leave ref_model out, with retain_loss = "nll" and a method that needs no second model.'
        )
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise EUAError(
            "The model was sharded while it was loaded (distributed_config), which hides its head from FSDP2: load it plainly "
            "and let `accelerate launch` shard it."
        )
    split = [name for name in ("tp", "cp", "sp") if parallel is not None and getattr(parallel, f"{name}_size", 1) > 1]
    if split:
        raise EUAError(
            f"The model or its sequences are to be split by {' and '.join(split)}, for which energies of a batch are not "
            "defined here: use data parallelism (DDP, FSDP2 or DeepSpeed ZeRO)."
        )


def check_saving(model: nn.Module, tokenizer: PreTrainedTokenizerBase, output_folder: Path) -> None:
    """Raise if what is saved with the weights cannot be saved, or if there is no room for them."""
    with TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
            if isinstance(model, PreTrainedModel):  # a PEFT model is saved without them
                model.config.save_pretrained(folder)
                if model.can_generate():
                    model.generation_config.save_pretrained(folder)
        except Exception as error:  # of whatever the tokenizer or the config contains
            raise EUAError(
                f"The model could not be saved after training ({in_one_line(error)}): correct its generation_config, config or "
                "tokenizer first."
            ) from error
    is_adapter = isinstance(model, PeftModel)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad or not is_adapter]
    needed = sum(weight.numel() * weight.element_size() for weight in weights)
    free = free_bytes(output_folder)
    if free < needed:
        raise EUAError(
            f"The model takes {needed / 1e9:.1f} GB, but the disk of {output_folder} has {free / 1e9:.1f} GB free, so it could "
            "not be saved: free some space, or name a folder on another disk."
        )


@torch.no_grad()
def check_padding_free(model: nn.Module) -> None:
    """Raise if rows that follow one another in one row influence each other in this model."""
    vocabulary, device = vocabulary_and_device(model)
    starts_and_lengths = ((1, 7), (3, 4), (2, 6))
    rows = [EncodedRow([i % vocabulary for i in range(start, start + n)], 1) for start, n in starts_and_lengths]
    padded = {name: tensor.to(device) for name, tensor in pad_rows(rows).items()}
    flat = flatten_rows(padded)
    is_first = torch.arange(flat["input_ids"].shape[1], device=device) < len(rows[0].input_ids)
    other_first = flat | {"input_ids": flat["input_ids"].where(~is_first, 0)}
    training = model.training
    model.eval()
    try:
        alone = hidden_states(model, padded)[padded["attention_mask"].bool()]
        found, after_another = (hidden_states(model, batch)[0] for batch in (flat, other_first))
    except TypeError as error:  # its forward takes no position_ids
        raise EUAError(f"padding_free = True cannot be used with this model ({error}): leave it at False.") from error
    finally:
        model.train(training)
    largest, eps = alone.abs().max(), torch.finfo(alone.dtype).eps
    mixed = (after_another - found)[~is_first].abs().max() / largest
    off = (found - alone).abs().max() / largest  # larger than rounding if positions do not restart with each row
    if not (mixed <= 8 * eps and off <= max(16 * eps, 1e-4)):
        raise EUAError(
            "padding_free = True, but this model does not keep rows apart that follow one another in one row (its hidden "
            f"states differ by up to {max(mixed, off):.2g} of the largest): leave it at False, or load the model with "
            'another attn_implementation, e.g. "sdpa" or "flash_attention_2".'
        )
