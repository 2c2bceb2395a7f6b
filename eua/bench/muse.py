"""MUSE as a task (Shi et al. 2024): news articles or books, questions about them, and passages to continue.

Rows come from the hub (``muse-bench/MUSE-News``, ``muse-bench/MUSE-Books``) or from a folder with their configurations and
splits:

- ``raw``: "text", the splits ``forget``, ``retain1`` and ``holdout``; training sees pieces of the first two;
- ``knowmem``: "question" and "answer", the splits ``forget_qa`` and ``retain_qa``;
- ``verbmem``: "prompt" and "gt", the split ``forget``: how a passage begins and how it goes on;
- ``privleak``: "text", the splits ``forget``, ``retain`` and ``holdout``.

Neighbouring rows may be about one article, so settings are chosen on the first half of each split and reported on the other
half. MUSE's measures are the F1 of ROUGE-L: KnowMem of the sets "forget" and "retain", VerbMem of "forget, verbatim". Questions
are asked without examples of other questions before them, and of each piece of a text the first words are not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig

from eua.bench.published import pieces, published_rows
from eua.bench.splits import half
from eua.bench.task import EvaluationSet, Task
from eua.data.sources import Row
from eua.errors import EUAError
from eua.evaluation.texts import MUSE_QUESTIONS, MUSE_VERBATIM

HUB = "muse-bench/MUSE-News"
TRAINING = {"per_device_train_batch_size": 4, "overlap": "drop"}
CALIBRATED = 0.4  # share of the questions to retain that calibrate the guard
LEAST_PROMPTS = 4
NOTE = (
    "Each seed shuffles training; the models are the same. Perplexity is of texts that no model was to forget. "
    "Relearning is not measured, since it needs memory for a second copy of the model and an optimizer."
)
TEXTS = 50  # pieces of text whose perplexity is measured
_QA, _TEXT = ("question", "answer"), ("text",)


def muse(
    seed: int,
    *,
    model: str,
    retain_model: str | None = None,
    data: str = HUB,
    pieces_of_text: int | None = None,
    epochs: float = 10,
) -> Task:
    """The task of a seed; the rows are always the same.

    Args:
        seed: of the methods' training.
        model: folder or hub name of a model that was trained on the texts, such as ``muse-bench/MUSE-News_target``.
        retain_model: the same of one that was trained without those to forget, such as ``muse-bench/MUSE-News_retrain``.
        data: name on the hub, or folder, of the rows.
        pieces_of_text: the largest number of pieces of text to train on, to forget and to retain; None: all.
        epochs: the larger number of passes over the rows to forget; half of it is the other one.

    Raises:
        EUAError: if rows cannot be read, or if there are too few questions to calibrate with.
    """
    forgotten = [
        published_rows(data, "knowmem", "forget_qa", _QA),
        verbatim(published_rows(data, "verbmem", "forget", ("prompt", "gt"))),
    ]
    kept = published_rows(data, "knowmem", "retain_qa", _QA)
    calibrated = int(CALIBRATED * len(kept))
    if calibrated < LEAST_PROMPTS:
        raise EUAError(
            f"{data} has {len(kept)} questions to retain, of which {100 * CALIBRATED:g} % calibrate the guard, but it takes "
            f"{LEAST_PROMPTS} of them: give more."
        )
    calibration, measured = kept[:calibrated], kept[calibrated:]

    def sets(part: int) -> dict[str, EvaluationSet]:
        of_part: list[Sequence[Row]] = [half(rows, part) for rows in (*forgotten, measured)]
        return {
            "forget": EvaluationSet(of_part[0], forget=True),
            "forget, verbatim": EvaluationSet(of_part[1], forget=True),
            "retain": EvaluationSet(of_part[2], forget=False),
        }

    return Task(
        name=data.rpartition("/")[2],
        target=model,
        retain_model=retain_model,
        forget=pieces(_texts(data, "raw", "forget"), pieces_of_text),
        retain=pieces(_texts(data, "raw", "retain1"), pieces_of_text),
        validation=sets(0),
        test=sets(1),
        calibration=[row["question"] for row in calibration],
        calibration_groups=[f"question {place}" for place in range(calibrated)],
        members=pieces(_texts(data, "privleak", "forget"), pieces_of_text),
        holdout=pieces(_texts(data, "privleak", "holdout"), pieces_of_text),
        text=[row["prompt"] + row["completion"] for row in pieces(_texts(data, "privleak", "retain"), TEXTS)],
        generation={"forget": MUSE_QUESTIONS, "forget, verbatim": MUSE_VERBATIM, "retain": MUSE_QUESTIONS},
        training=TRAINING,
        epochs=(epochs / 2, epochs),
        blocks=AutoConfig.from_pretrained(model).num_hidden_layers,
        tolerance=max(0.05, 1 / (1 + calibrated)),
        note=NOTE,
    )


def verbatim(rows: Sequence[Row]) -> list[Row]:
    """Rows of ``verbmem`` as rows of this library: how a passage begins as the prompt, how it goes on as the completion.

    >>> verbatim([{"prompt": "Once upon", "gt": "a time."}])
    [{'prompt': 'Once upon', 'completion': ' a time.'}]
    """
    return [{"prompt": row["prompt"], "completion": f" {row['gt'].lstrip()}"} for row in rows]


def _texts(data: str, config: str, split: str) -> list[Any]:
    return [row["text"] for row in published_rows(data, config, split, _TEXT)]
