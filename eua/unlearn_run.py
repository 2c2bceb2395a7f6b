"""What `eua unlearn` does: train in one process or, under `accelerate launch`, in several; resume; save."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig

from eua.data.rows import read_rows
from eua.errors import EUAError
from eua.files import check_output_folder, write_json
from eua.model.loading import load_model
from eua.training.checkpoints import last_checkpoint
from eua.training.config import EUAConfig
from eua.training.trainer import EUATrainer

SETTINGS_FILE = "settings.json"


def run_unlearn(arguments: argparse.Namespace) -> None:
    """Run the parsed command; the first process alone looks at and writes the output folder."""
    is_first = os.environ.get("RANK", "0") == "0"  # before accelerate is there to ask
    checkpoints = arguments.output / "checkpoints"
    if is_first:
        check_output_folder(arguments.output, allowed=arguments.resume or arguments.overwrite, how="--resume or --overwrite")
        if arguments.resume:
            _check_same_run(checkpoints, arguments)
    trainer = _trainer(arguments, checkpoints)
    if is_first:
        if not arguments.resume:
            shutil.rmtree(checkpoints, ignore_errors=True)  # those of an earlier run must not be resumed by a later one
        write_json(checkpoints / SETTINGS_FILE, _settings(arguments))
    PartialState().wait_for_everyone()
    checkpoint = last_checkpoint(checkpoints) if arguments.resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(arguments.output))
    if is_first:
        print(
            f"The unlearned model is in {arguments.output}. Next: "
            f"eua calibrate --model {arguments.output} --prompts HELD_OUT.jsonl"
        )


def _trainer(arguments: argparse.Namespace, checkpoints: Path) -> EUATrainer:
    forget, retain = read_rows(arguments.forget, "forget set"), read_rows(arguments.retain, "retain set")
    peft_config = None
    if rank := arguments.lora_rank:
        peft_config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    settings: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "num_train_epochs": arguments.epochs,
        "learning_rate": arguments.learning_rate,
        "per_device_train_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation,
        "retain_per_forget": arguments.retain_per_forget,
        "gamma": arguments.gamma,
        "alpha": arguments.alpha,
        "rho": arguments.rho,
        "temperature": arguments.temperature,
        "max_length": arguments.max_length,
        "eval_strategy": "no" if arguments.eval_forget is None else "epoch",
        "save_strategy": "steps" if arguments.save_steps else "epoch",
        "save_steps": arguments.save_steps or 500,
        "save_total_limit": 1,
        "seed": arguments.seed,
        "bf16": arguments.bf16,
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
    }
    try:
        config = EUAConfig(**settings | arguments.fields)
    except EUAError:
        raise
    except (ValueError, TypeError) as error:  # of TrainingArguments, or a field of the wrong type
        raise EUAError(
            f"The settings {arguments.fields} cannot be used ({error}): correct them in {arguments.config}."
        ) from error
    # Trained weights must be float32: in bfloat16 most steps of a small learning rate round away. Trainer places them.
    model, tokenizer = load_model(arguments.model, dtype="auto" if peft_config else "float32", place=False)
    return EUATrainer(
        model,
        config,
        forget_dataset=forget,
        retain_dataset=retain,
        eval_forget_dataset=arguments.eval_forget,
        eval_retain_dataset=arguments.eval_retain,
        # The reference of KL is the model as it is before unlearning.
        ref_model=load_model(arguments.model, place=False)[0] if config.retain_loss == "kl" else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a resumed run must have in common with the one it goes on with."""
    free = ("command", "run", "resume", "overwrite", "output", "save_steps", "config", "fields")
    return {key: str(value) for key, value in (vars(arguments) | arguments.fields).items() if key not in free}


def _check_same_run(checkpoints: Path, arguments: argparse.Namespace) -> None:
    """Raise when ``--resume`` would go on with another run, or finds files that are no run's."""
    path = checkpoints / SETTINGS_FILE
    if not path.is_file():
        if arguments.output.is_dir() and any(arguments.output.iterdir()):
            raise EUAError(
                f"{arguments.output} holds files but no interrupted run to resume: name another folder, or --overwrite."
            )
        return  # interrupted before it began: start
    earlier, now = json.loads(path.read_text(encoding="utf-8")), _settings(arguments)
    keys = [key for key in {**now, **earlier} if earlier.get(key) != now.get(key)]
    changed = [f"--{key.replace('_', '-')} {earlier.get(key)} → {now.get(key)}" for key in keys]
    if changed:
        raise EUAError(
            f"The run to resume in {checkpoints} had other settings ({', '.join(changed)}), so its end would be neither's: "
            "repeat the command as it was, or start anew with --overwrite."
        )
