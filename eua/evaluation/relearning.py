"""How fast a model learns again what it forgot: fine-tuning on rows, measured on the way."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from eua.data.batches import pad_rows
from eua.data.rows import EncodedRow
from eua.errors import EUAError
from eua.model.forward import token_energies
from eua.model.head import vocabulary_and_device

T = TypeVar("T")
STEPS = (1, 2, 5, 10, 20, 50, 100)


def relearning_curve(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    measure: Callable[[PreTrainedModel], T],
    *,
    steps: Sequence[int] = STEPS,
    batch_size: int = 8,
    learning_rate: float = 2e-5,
    seed: int = 0,
    progress: str | None = None,
) -> dict[int, T]:
    """What ``measure`` finds before and after numbers of fine-tuning steps on rows; the model itself is not changed.

    A copy is trained on the answers with AdamW at a constant learning rate, without weight decay. An attacker would stop where
    most has come back, so the largest value over the steps is what counts, and what it is compared with is the same curve of a
    model that was never trained on what was forgotten: that one learns, too (Dorna et al. 2025, §4.2, with one epoch).

    >>> relearning_curve(model, rows, lambda m: float(measure_answers(m, forgotten).extraction_strength.mean()))
    ... # doctest: +SKIP
    {0: 0.02, 1: 0.02, 2: 0.03, 5: 0.09, ...}

    Args:
        model: the model that has forgotten.
        rows: encoded rows to train on: those that were forgotten, rows of the same form about others, or unrelated ones.
        measure: of a model in eval mode.
        steps: numbers of steps after which it is called, besides 0.
        batch_size: rows in a step; rows come in a seeded order, each once before one comes again.
        learning_rate: of AdamW; 2e-5 for models of 1B parameters, more for small ones.
        seed: of the order.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if there are no rows or no steps.
    """
    if not rows or not steps or min(steps) < 1:
        raise EUAError(
            f"{len(rows)} rows and steps = {tuple(steps)}: relearning is measured after steps on rows, so give at least one "
            "row and numbers of steps from 1."
        )
    learner = copy.deepcopy(model).float().eval()
    for parameter in learner.parameters():
        parameter.requires_grad_(True)
    found = {0: measure(learner)}
    _, device = vocabulary_and_device(learner)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=learning_rate, weight_decay=0.0)
    draw, order = random.Random(seed), list[int]()
    for step in tqdm(range(1, max(steps) + 1), desc=progress, disable=progress is None, leave=False):
        while len(order) < batch_size:
            order += draw.sample(range(len(rows)), len(rows))
        chosen, order = order[:batch_size], order[batch_size:]
        batch = {name: tensor.to(device) for name, tensor in pad_rows([rows[i] for i in chosen]).items()}
        nll = token_energies(learner, batch, 1.0).nll  # 0 where no answer token is predicted
        (nll.sum() / (batch["labels"][:, 1:] >= 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in steps:
            with torch.no_grad():
                found[step] = measure(learner)
    return found
