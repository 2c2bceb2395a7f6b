"""What unlearning leaves behind: in 8 and 4 bits, after relearning, and after a second request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.bench.task import Task
from eua.data.rows import EncodedRow, encode_rows
from eua.data.sources import Row
from eua.evaluation.metrics import measure_answers
from eua.evaluation.quantization import quantized
from eua.evaluation.relearning import relearning_curve
from eua.evaluation.said import KeyedFact, said_in_wordings

Unlearn = Callable[[PreTrainedModel, Sequence[Row], Sequence[Row]], PreTrainedModel]  # of a model, rows to forget and to retain
Curves = dict[str, dict[str, float]]  # rows that were relearned on → number of steps → extraction strength
KEPT = "after a second request, retained rows"  # the figure of which more is better; of the others, less is better


class Lasting(NamedTuple):
    """What lasts: figures by name, the curves of relearning, and what could not be measured, and why.

    The figures have the largest value of each curve after at least one step, and the share of facts that greedy answers say at
    its end.
    """

    figures: dict[str, float]
    curves: Curves
    left_out: dict[str, str]


def lasting(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    unlearn: Unlearn | None = None,
) -> Lasting:
    """What a model still says of the test set to forget when it is changed or trained further, guard off.

    Where nothing else is said, a figure is the mean extraction strength of the rows to forget.

    Args:
        model, tokenizer: those after unlearning, or others to compare with.
        task: what was forgotten.
        unlearn: unlearns further rows with the same method and settings; None for models from which nothing was unlearned,
            which are not given a second request.
    """
    encoded = [row for name, rows in _forgotten(task).items() for row in encode_rows(rows, tokenizer, None, name)]

    def left(changed: PreTrainedModel) -> float:
        return strength(changed, encoded)

    figures: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for bits in (8, 4):
        if bits == 4 and find_spec("bitsandbytes") is None:
            left_out["in 4 bits"] = "bitsandbytes, which rounds weights to 4 bits, is not installed: pip install bitsandbytes"
            continue
        rounded = quantized(model, 8 if bits == 8 else 4)
        figures[f"in {bits} bits"] = left(rounded)
        if task.forgotten_facts:
            figures[f"in {bits} bits, said"] = said(rounded, tokenizer, task.forgotten_facts, task.new_tokens)
    curves: Curves = {}
    for name, rows in _taught(task).items() if task.relearning_steps else ():
        if rows:
            taught = encode_rows(rows, tokenizer, task.training.get("max_length"), name)
            curves[name], at_end = _relearned(model, tokenizer, task, taught, left)
            figures[f"relearning on {name}"] = max(value for step, value in curves[name].items() if step != "0")
            if at_end is not None:
                figures[f"relearning on {name}, said at the end"] = at_end
    if unlearn is not None and task.second:
        figures |= _second_request(model, tokenizer, task, unlearn, left)
    return Lasting(figures, curves, left_out)


def strength(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> float:
    """The mean extraction strength of rows."""
    return float(measure_answers(model, rows).extraction_strength.mean())


def said(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[KeyedFact], new_tokens: int) -> float:
    """The share of facts that a greedy answer says in one of their wordings."""
    found = said_in_wordings(model, tokenizer, facts, samples=0, max_new_tokens=new_tokens)
    return sum(bool(one.greedy.any()) for one in found) / len(found)


def _relearned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    taught: Sequence[EncodedRow],
    left: Callable[[PreTrainedModel], float],
) -> tuple[dict[str, float], float | None]:
    """The curve of relearning on rows, and the share of facts that is said at its end, if the task has facts."""
    due = iter(sorted({0, *task.relearning_steps}))  # the order in which the curve is measured

    def measure(learner: PreTrainedModel) -> tuple[float, float | None]:
        is_end = next(due) == max(task.relearning_steps)
        facts = task.forgotten_facts if is_end else []
        return left(learner), said(learner, tokenizer, facts, task.new_tokens) if facts else None

    curve = relearning_curve(model, taught, measure, steps=task.relearning_steps, learning_rate=task.relearning_rate)
    return {str(step): value for step, (value, _) in curve.items()}, curve[max(curve)][1]


def _forgotten(task: Task) -> dict[str, Sequence[Row]]:
    """The test sets to forget whose counterparts settings were chosen by, first the one in the wording of the rows."""
    return {name: one.rows for name, one in task.test.items() if one.forget and name in task.validation}


def _taught(task: Task) -> dict[str, Sequence[Row]]:
    """Rows to relearn on, from those that say most about what was forgotten to those that say nothing."""
    others = next(one.rows for one in task.validation.values() if one.forget)
    return {
        "the same rows": next(iter(_forgotten(task).values())),
        "other forgotten rows": others,
        "rows of the same form": task.holdout or task.retain,
        "unrelated texts": [{"prompt": first, "completion": rest} for first, rest in map(_halves, task.unrelated)],
    }


def _halves(text: str) -> tuple[str, str]:
    words = text.split(" ")
    return " ".join(words[: len(words) // 3]), f" {' '.join(words[len(words) // 3 :])}"


def _second_request(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    unlearn: Unlearn,
    left: Callable[[PreTrainedModel], float],
) -> dict[str, float]:
    """What is known of both sets to forget, and of what is retained, once a second one has been unlearned."""
    second = {_identity(row) for row in task.second}
    after = unlearn(model, task.second, [row for row in task.retain if _identity(row) not in second])
    kept = [
        row
        for name, one in task.test.items()
        if not one.forget and (rows := [row for row in one.rows if _identity(row) not in second])
        for row in encode_rows(rows, tokenizer, None, name)
    ]
    return {
        "after a second request, first rows": left(after),
        "after a second request, second rows": strength(after, encode_rows(task.second, tokenizer, None, "second request")),
        KEPT: strength(after, kept),
    }


def _identity(row: Mapping[str, object]) -> tuple[object, ...]:
    return tuple(row.get(key) for key in ("question", "answer", "prompt", "completion"))
