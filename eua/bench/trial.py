"""One trial: unlearn with a method and its settings, then measure."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging

from eua.bench.cost import Cost, measured, versions
from eua.bench.grids import is_compared, unlearning_method
from eua.bench.measure import full_report, task_objectives
from eua.bench.study import Plan
from eua.bench.task import Task
from eua.data.sources import Row
from eua.errors import EUAError
from eua.evaluation.results import write_results
from eua.files import fill_folder
from eua.model.fingerprints import model_fingerprint
from eua.model.loading import load_model, merged
from eua.training.config import EUAConfig
from eua.training.trainer import EUATrainer

Phase = Literal["tuning", "report"]
# The models that methods are compared with: as it was before unlearning, and as if the rows to forget had never been there.
TARGET, RETAIN_ONLY = "before unlearning", "retain only"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars of loading and saving, of which there would be one for every trial."""
    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


@_quiet()
def run_trial(task: Task, plan: Plan, phase: Phase, output: Path, *, keep_model: bool = True) -> dict[str, Any]:
    """Run a trial and return its result, for JSON. In the report phase, model and guard are kept in ``output/models``, unless
    ``keep_model`` is False.

    The result has "objectives" (see :func:`eua.bench.measure.task_objectives`) of the phase's split, in the
    report phase all "metrics", the cost of unlearning ("seconds", "peak_bytes"), and what identifies it: "task", "weights",
    "versions".

    Raises:
        EUAError: if the method cannot work with these settings or this model, e.g. if its loss becomes NaN.
    """
    model, tokenizer, cost = _compared(task, plan) or _unlearned(task, plan, output)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    result: dict[str, Any] = {"task": task.digest, "weights": model_fingerprint(model), "versions": versions()} | asdict(cost)
    if phase == "tuning":
        result["objectives"] = task_objectives(model, tokenizer, task, test=False)
        return result
    second = partial(_unlearned_again, task, plan, output, tokenizer) if is_compared(plan.method) else None
    report = full_report(model, tokenizer, task, second, is_retain_only=plan.method == RETAIN_ONLY)
    result |= {"metrics": report.metrics, "objectives": report.metrics["objectives"]}
    name = f"{plan.method}-seed-{plan.seed}".replace(" ", "-")
    write_results(output / "rows" / f"{name}.parquet", report.rows)
    if report.answers:
        write_results(output / "answers" / f"{name}.parquet", report.answers)
    if is_compared(plan.method) and keep_model:

        def save(folder: Path) -> None:
            for part in (model, tokenizer, report.guard):
                part.save_pretrained(folder)

        fill_folder(output / "models" / name, save)
        result["model"] = f"models/{name}"
    return result


def _compared(task: Task, plan: Plan) -> tuple[Any, Any, Cost] | None:
    """One of the models to compare with, for which nothing is trained here."""
    if plan.method == TARGET:
        return *load_model(task.target), Cost()
    if plan.method == RETAIN_ONLY and task.retain_model is not None:
        return *load_model(task.retain_model), Cost()
    return None


def _unlearned(task: Task, plan: Plan, output: Path) -> tuple[Any, Any, Cost]:
    model, tokenizer = load_model(task.target, torch.float32, place=False)  # an adapter's base, too
    given = {"processing_class": tokenizer}
    trainer, cost = _train(task, plan, output, model, task.target, task.forget, task.retain, **given)
    return merged(trainer.model), tokenizer, cost


def _unlearned_again(
    task: Task,
    plan: Plan,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    forget: Sequence[Row],
    retain: Sequence[Row],
) -> PreTrainedModel:
    """A copy of a model that has unlearned further rows with the trial's method and settings."""
    trainer, _ = _train(task, plan, output, copy.deepcopy(model), model, forget, retain, processing_class=tokenizer)
    return merged(trainer.model)


def _train(
    task: Task,
    plan: Plan,
    output: Path,
    model: str | PreTrainedModel,
    before: str | PreTrainedModel,
    forget: Sequence[Row],
    retain: Sequence[Row],
    **options: Any,
) -> tuple[EUATrainer, Cost]:
    """Train a model with the trial's method, which may compare it with the model ``before``, and measure what that costs."""
    folder = output / "running" / f"{plan.key}-seed-{plan.seed}"
    if folder.exists():
        shutil.rmtree(folder)  # of a process that was killed
    config = _config(task, plan, folder)
    reference = before if config.needs_model_before else None
    options |= {"forget_dataset": forget, "retain_dataset": retain, "ref_model": reference}
    trainer = EUATrainer(model, config, **options)
    trainer.remove_callback(PrinterCallback)  # which prints a summary where there is no progress bar
    with measured() as cost:
        trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    return trainer, cost


def _config(task: Task, plan: Plan, folder: Path) -> EUAConfig:
    settings: dict[str, Any] = {
        "method": unlearning_method(plan.method),
        "output_dir": str(folder),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": plan.seed,
        **task.training,
        **plan.settings,
    }
    try:
        return EUAConfig(**settings)
    except TypeError as error:
        raise EUAError(
            f"The settings of {plan.method} are {', '.join(plan.settings)}, of which EUAConfig lacks one ({error}): give "
            "fields of EUAConfig."
        ) from error
