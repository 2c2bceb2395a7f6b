"""What a trainer may be given and cannot work with, said before anything is computed."""

from __future__ import annotations

import torch
from torch import nn
from transformers.utils import logging

from eua.config import EUAConfig
from eua.errors import EUAError

logger = logging.get_logger(__name__)


def check_arguments(args: EUAConfig, ref_model: object, eval_forget: object, eval_retain: object) -> None:
    """Raise when arguments of the trainer contradict one another."""
    if args.n_gpu > 1:
        raise EUAError(
            f"{args.n_gpu} GPUs are visible to one process, which Trainer would use through DataParallel, and EUATrainer "
            "cannot: start one process per GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
        )
    _check_ref_model(args, ref_model)
    _check_eval_datasets(args, eval_forget, eval_retain)


def check_model(model: nn.Module) -> None:
    """Raise when the model comes in a shape from which it could not be trained or saved."""
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
    """Raise when a reference is needed and missing, or given for nothing."""
    if args.retain_loss == "kl" and ref_model is None:
        raise EUAError(
            'retain_loss = "kl" was set without a ref_model, so there is nothing to compare the model with: '
            'pass ref_model, a second copy of the model before unlearning, or leave retain_loss at "nll".'
        )
    if args.retain_loss == "nll" and args.constant_boundaries is not None and ref_model is not None:
        raise EUAError(
            f"ref_model was given with m_in = {args.m_in} and m_out = {args.m_out}, and nothing would be read from it, "
            'since boundaries are these constants: leave out one or the other, or set retain_loss = "kl".'
        )


def _check_eval_datasets(args: EUAConfig, forget: object, retain: object) -> None:
    """Raise when evaluation is asked for and there is nothing to evaluate on, or half of it."""
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
    """Raise when nothing would be trained; warn when steps would be lost to rounding."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if not dtypes:
        raise EUAError("No parameter of the model requires a gradient, so nothing would be unlearned: unfreeze some.")
    if dtypes & {torch.bfloat16, torch.float16}:
        logger.warning(
            "Trainable weights are in half precision, where small steps round away: load the model with "
            "dtype=torch.float32, and set bf16=True for speed."
        )
