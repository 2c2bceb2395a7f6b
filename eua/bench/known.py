"""Facts that a pretrained model really knows as a task, see :mod:`eua.bench.facts`. The model is SmolLM2-135M, which a Python
package carries, or the user's.

There is no retain-only model, and no row that the model was certainly never trained on, so what needs them is not reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from eua import __version__
from eua.bench.facts import facts_task
from eua.bench.knowledge import ask_facts
from eua.bench.questions import load_facts
from eua.bench.real_models import model_folder
from eua.bench.task import Task
from eua.data.sources import Row
from eua.files import write_json
from eua.model.fingerprints import model_fingerprint, tokenizer_fingerprint
from eua.model.loading import load_model
from eua.model.neighbours import write_neighbours
from eua.model.rewordings import write_rewordings

TRAINING: dict[str, Any] = {"per_device_train_batch_size": 8, "bf16": True}
NOTE = (
    "The model is the same for all seeds. Each seed draws which of the facts that it knows are to be forgotten, so two "
    "seeds share some of them, and shuffles training, which computes in bfloat16. Facts to retain are asked with greedy "
    "decoding only. “Said greedily”, on both splits, looks at the first 24 tokens of answers, all else at up to 64. "
    "Answers to questions about facts, also with text around them, are generated in bfloat16; all else, also what is said in 8 "
    "bits and after relearning, is in float32. Relearning stops after 20 steps. AltPO trains on answers with the keys of other "
    "entities, where the original has the model write them. Perplexity is of thirty paragraphs unrelated to the facts."
)


def facts(
    seed: int,
    *,
    cache: Path,
    model: str = "smollm2",
    relations: Sequence[str] | None = None,
    epochs: float = 10,
    reworded: int = 0,
    neighbours: int = 0,
    **drawn: Any,
) -> Task:
    """The task of a seed, which draws what is to be forgotten of the relations.

    Args:
        seed: of the draws.
        cache: folder in which SmolLM2 and the model's answers to all questions are kept.
        model: folder or hub name of the model, or a name of :data:`eua.bench.real_models.MODELS`.
        relations: those whose facts are to be forgotten; None: the capitals, if the model knows enough of them.
        epochs: the larger number of passes over the rows to forget; half of it is the other one.
        reworded: further wordings of each row to forget, see :func:`eua.model.rewordings.write_rewordings`.
        neighbours: further rows to retain, see :func:`eua.model.neighbours.write_neighbours`; none names an entity that
            unlearning must not see, unless by another name.
        drawn: further arguments of :func:`eua.bench.facts.facts_task`, e.g. ``forget=24``.

    Raises:
        EUAError: if the model cannot be loaded, or knows too few of the facts.
    """
    model = model_folder(model, cache)
    loaded, tokenizer = load_model(model)
    knowledge = ask_facts(loaded, tokenizer, load_facts(), cache=cache, progress="asking what the model knows")
    task = facts_task(knowledge, seed, relations=relations, **drawn)
    forget, retain = task.forget, task.retain
    if reworded:
        forget = _written(
            *(loaded, tokenizer, cache, write_rewordings, task.forget),
            templates=reworded,
            paraphrases=0,
            progress="other wordings",
        )
    if neighbours:
        avoid = [entity.removeprefix("the ") for entity in task.unseen]
        options = {"count": neighbours, "neutral": 0.25, "surest": 0.5, "avoid": avoid}
        near = _written(
            loaded, tokenizer, cache, write_neighbours, task.forget, **options, progress="rows near those to forget"
        )
        retain = [*retain, *near]
    groups = len(set(task.calibration_groups))
    return Task(
        name="facts",
        target=model,
        retain_model=None,
        forget=forget,
        retain=retain,
        validation=task.validation,
        test=task.test,
        calibration=[row["question"] for row in task.calibration],
        calibration_groups=task.calibration_groups,
        facts=task.facts,
        validation_facts=task.validation_facts,
        second=task.second,
        text=task.plain_text,
        unrelated=task.plain_text,
        training=TRAINING,
        epochs=(epochs / 2, epochs),
        blocks=AutoConfig.from_pretrained(model).num_hidden_layers,
        tolerance=max(0.05, 1 / (1 + groups)),
        relearning_steps=(1, 5, 20),
        retained_samples=0,  # one of dozens of samples says a fact in any case
        sampling_dtype="bfloat16",
        note=NOTE,
    )


def _written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    write: Callable[..., Iterable[Row]],
    rows: Sequence[Row],
    *,
    progress: str,
    **options: Any,
) -> list[Row]:
    """Rows that the model writes, or those of the file in the cache that this version wrote them into before."""
    asked = (model_fingerprint(model), tokenizer_fingerprint(tokenizer), __version__, write.__name__, rows, options)
    file = cache / f"rows-{hashlib.sha256(repr(asked).encode()).hexdigest()[:16]}.json"
    if not file.exists():
        write_json(file, {"rows": list(write(model, tokenizer, rows, **options, progress=progress))})
    found: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return found
