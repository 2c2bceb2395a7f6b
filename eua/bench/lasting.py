"""What unlearning leaves behind: in 8 and 4 bits, in wrapped questions, after relearning, and after a second request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.bench.task import Task
from eua.bench.wrappings import wrappings
from eua.data.rows import EncodedRow, encode_rows
from eua.data.sources import Row
from eua.evaluation.metrics import measure_answers
from eua.evaluation.quantization import quantized
from eua.evaluation.relearning import relearning_curve
from eua.evaluation.said import KeyedFact, said_in_wordings

Unlearn = Callable[[PreTrainedModel, Sequence[Row], Sequence[Row]], PreTrainedModel]  # of a model, rows to forget and to retain
Curves = dict[str, dict[str, float]]  # rows that were relearned on → number of steps → extraction strength


def lasting(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, unlearn: Unlearn | None = None
) -> tuple[dict[str, float], Curves]:
    """What a model still says of the test set to forget when it is changed, asked in other ways or goes on living, guard off.

    Args:
        model, tokenizer: those after unlearning, or others to compare with.
        task: what was forgotten.
        unlearn: unlearns further rows with the same method and settings; None for models from which nothing was unlearned,
            which are not given a second request.

    Returns:
        Figures by name, and the curves of relearning, of which the figures have the largest value after at least one step.
        Where nothing else is said, a figure is the extraction strength of the rows to forget, every set counting the same.
    """
    forgotten = _forgotten(task)
    encoded = [encode_rows(rows, tokenizer, None, name) for name, rows in forgotten.items()]

    def left(changed: PreTrainedModel) -> float:
        return sum(strength(changed, rows) for rows in encoded) / len(encoded)

    figures: dict[str, float] = {}
    for bits in (8, 4):
        if bits == 8 or find_spec("bitsandbytes") is not None:
            rounded = quantized(model, 8 if bits == 8 else 4)
            figures[f"in {bits} bits"] = left(rounded)
            if task.facts:
                figures[f"in {bits} bits, said"] = said(rounded, tokenizer, task.forgotten_facts, task.new_tokens)
    figures |= _asked(model, tokenizer, task)
    curves: Curves = {}
    for name, rows in _taught(task).items() if task.relearning_steps else ():
        if rows:
            taught = encode_rows(rows, tokenizer, task.training.get("max_length"), name)
            how = {"steps": task.relearning_steps, "learning_rate": task.relearning_rate}
            curve = relearning_curve(model, taught, left, **how)  # type: ignore[arg-type]
            curves[name] = {str(step): value for step, value in curve.items()}
            figures[f"relearning on {name}"] = max(value for step, value in curve.items() if step)
    if unlearn is not None and task.second:
        figures |= _second_request(model, tokenizer, task, unlearn, left)
    return figures, curves


def strength(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> float:
    """The mean extraction strength of rows."""
    return float(measure_answers(model, rows).extraction_strength.mean())


def said(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[KeyedFact], new_tokens: int) -> float:
    """The share of facts that a greedy answer says in one of their wordings."""
    found = said_in_wordings(model, tokenizer, facts, samples=0, max_new_tokens=new_tokens)
    return sum(bool(one.greedy.any()) for one in found) / len(found)


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


def _asked(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, float]:
    """The share of facts to forget that are said with text around the question, and when the prompt itself states the fact."""
    facts = task.forgotten_facts
    if not facts:
        return {}
    other = str(next(one for one in task.test.values() if not one.forget).rows[0]["question"])
    asked: dict[str, list[KeyedFact]] = {}
    for fact in facts:
        for kind, texts in wrappings(fact.wordings[0], other).items():
            asked.setdefault(f"said {kind}", []).append(replace(fact, wordings=texts, trained=0))
        if fact.answer:
            stated = (f"{fact.answer} {fact.wordings[0]}",)
            asked.setdefault("said where the prompt states it", []).append(replace(fact, wordings=stated, trained=0))
    return {name: said(model, tokenizer, of_kind, task.new_tokens) for name, of_kind in asked.items()}


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
        strength(after, encode_rows(rows, tokenizer, None, name))
        for name, one in task.test.items()
        if not one.forget and (rows := [row for row in one.rows if _identity(row) not in second])
    ]
    return {
        "after a second request, first rows": left(after),
        "after a second request, second rows": strength(after, encode_rows(task.second, tokenizer, None, "second request")),
        "after a second request, retained rows": sum(kept) / len(kept),
    }


def _identity(row: Mapping[str, object]) -> tuple[object, ...]:
    return tuple(row.get(key) for key in ("question", "answer", "prompt", "completion"))
