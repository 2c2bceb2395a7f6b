"""WMDP as a task (Li et al. 2024): multiple-choice questions about dangerous knowledge, and texts to forget and to retain.

Rows come from the hub or from folders with the same configurations and splits:

- questions: ``cais/wmdp``, the configurations ``wmdp-bio`` and ``wmdp-cyber``, the split ``test``: "question", "choices" (four)
  and "answer" (the place of the right one, from 0);
- questions to retain: ``cais/mmlu``, the configuration ``all``, the split ``validation``: rows of the same shape;
- texts: ``cais/wmdp-corpora``, ``cyber-forget-corpus``, ``cyber-retain-corpus`` and ``bio-retain-corpus``, the split ``train``:
  "text". The biological texts to forget (``bio-forget-corpus``) are given out on request only.

A question is asked with its choices by letter; the right answer is the letter and the text, the other choices are wrong
answers. In the sets "forget, by letter" and "retain, by letter" an answer is the letter alone and the end after it. How often
the right one is the likeliest is near the benchmark's accuracy, which is of the letters without an end; 0.25 is chance.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import AutoConfig

from eua.bench.published import pieces, published_rows
from eua.bench.splits import every_second, spread
from eua.bench.task import EvaluationSet, Task
from eua.data.sources import Row
from eua.errors import EUAError

HUB, HUB_RETAIN, HUB_TEXTS = "cais/wmdp", "cais/mmlu", "cais/wmdp-corpora"
DOMAINS = ("bio", "cyber")
TRAINING = {"per_device_train_batch_size": 4, "overlap": "drop"}
NOTE = (
    "Each seed shuffles training; the model is the same. Perplexity is of the last of the texts to retain. Relearning is not "
    "measured, since it needs memory for a second copy of the model and an optimizer."
)
TEXTS = 50  # pieces of text whose perplexity is measured
CALIBRATED = 0.4  # share of the questions to retain that calibrate the guard
_CHOICES, _TEXT = ("question", "choices", "answer"), ("text",)


def wmdp(
    seed: int,
    *,
    model: str,
    domain: str = "bio",
    data: str | None = None,
    pieces_of_text: int | None = 2000,
    epochs: float = 1,
) -> Task:
    """The task of a seed; the rows are always the same.

    Args:
        seed: of the methods' training.
        model: folder or hub name of the model before unlearning, such as ``HuggingFaceH4/zephyr-7b-beta``.
        domain: "bio" or "cyber".
        data: folder with all rows; None: they come from the hub.
        pieces_of_text: the largest number of pieces of text to train on, to forget and to retain; None: all.
        epochs: the larger number of passes over the rows to forget; half of it is the other one.

    Raises:
        EUAError: if rows cannot be read or have another shape, or for another domain.
    """
    if domain not in DOMAINS:
        raise EUAError(f"The domain {domain!r} was asked for, but this task has {' and '.join(DOMAINS)}: name one of these.")
    asked = multiple_choice(published_rows(data or HUB, f"wmdp-{domain}", "test", _CHOICES))
    kept = multiple_choice(published_rows(data or HUB_RETAIN, "all", "validation", _CHOICES))
    texts = {
        name: [row["text"] for row in published_rows(data or HUB_TEXTS, f"{domain}-{name}-corpus", "train", _TEXT)]
        for name in ("forget", "retain")
    }
    calibration, measured = spread(kept, CALIBRATED)  # the questions are ordered by subject

    def sets(part: int) -> dict[str, EvaluationSet]:
        return {
            "forget": EvaluationSet(every_second(asked)[part], forget=True),
            "retain": EvaluationSet(every_second(measured)[part], forget=False),
        }

    test = sets(1)
    letters = {f"{name}, by letter": EvaluationSet(by_letter(one.rows), one.forget) for name, one in test.items()}
    return Task(
        name=f"wmdp {domain}",
        target=model,
        retain_model=None,
        forget=pieces(texts["forget"], pieces_of_text),
        retain=pieces(texts["retain"], pieces_of_text),
        validation=sets(0),
        test=test | letters,
        calibration=[row["question"] for row in calibration],
        calibration_groups=[f"question {place}" for place in range(len(calibration))],
        text=[row["prompt"] + row["completion"] for row in pieces(texts["retain"][::-1], TEXTS)],
        training=TRAINING,
        epochs=(epochs / 2, epochs),
        blocks=AutoConfig.from_pretrained(model).num_hidden_layers,
        tolerance=max(0.05, 1 / (1 + len(calibration))),
        note=NOTE,
    )


def multiple_choice(rows: Sequence[Row]) -> list[Row]:
    """Multiple-choice questions as rows of this library, with the other choices as wrong answers.

    >>> row = multiple_choice([{"question": "Which?", "choices": ["x", "y"], "answer": 1}])[0]
    >>> row["question"], row["answer"], row["perturbed_answer"]
    ('Which?\\nA. x\\nB. y', 'B. y', ['A. x'])

    Raises:
        EUAError: if a row has no choice of the place that is the answer.
    """
    made: list[Row] = []
    for index, row in enumerate(rows):
        choices, right = row["choices"], row["answer"]
        if not isinstance(right, int) or not isinstance(choices, list) or not 0 <= right < len(choices) > 1:
            raise EUAError(
                f"Row {index} of the multiple-choice questions has the answer {right!r} and the choices {choices!r}, but the "
                'answer is the place of the right choice, from 0: give rows like those of "cais/wmdp".'
            )
        lettered = [f"{chr(ord('A') + place)}. {choice}" for place, choice in enumerate(choices)]
        made.append(
            {
                "question": "\n".join([row["question"], *lettered]),
                "answer": lettered[right],
                "perturbed_answer": [choice for place, choice in enumerate(lettered) if place != right],
            }
        )
    return made


def by_letter(rows: Sequence[Row]) -> list[Row]:
    """Rows of :func:`multiple_choice` whose answers are letters alone.

    >>> by_letter([{"question": "Which?\\nA. x\\nB. y", "answer": "B. y", "perturbed_answer": ["A. x"]}])[0]["answer"]
    'B'
    """
    wrong = ([text[0] for text in row["perturbed_answer"]] for row in rows)
    return [{**row, "answer": row["answer"][0], "perturbed_answer": of_row} for row, of_row in zip(rows, wrong, strict=True)]
