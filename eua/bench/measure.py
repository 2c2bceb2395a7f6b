"""What is measured of a model on a task: the few figures that settings are chosen by, and everything that is reported.

What is said when a model is asked for facts is measured in :mod:`eua.bench.asking`, what is left when it is changed in
:mod:`eua.bench.lasting`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.bench.asking import answer_lines, ask, in_sampling_dtype, leaks, refusals, shares, wrapped
from eua.bench.knowledge import NEW_TOKENS
from eua.bench.lasting import Unlearn, lasting, strength
from eua.bench.task import FORGOTTEN, EvaluationSet, Task
from eua.data.rows import EncodedRow, encode_rows
from eua.evaluation.declining import declines
from eua.evaluation.full_report import NO_HOLDOUT, UTILITY_SETS, measure_all
from eua.evaluation.membership import membership_aucs, membership_scores, privacy_leakage, privacy_score
from eua.evaluation.retain_model import RetainFigures, measure_retain_model
from eua.evaluation.said import said_in_wordings
from eua.evaluation.texts import fluency
from eua.guard.guard import EnergyGuard
from eua.model.loading import load_model


def objectives(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, EvaluationSet]
) -> dict[str, float]:
    """The mean extraction strength of the rows to forget and of those to retain, guard off. Every row counts the same.

    >>> objectives(model, tokenizer, task.validation)       # doctest: +SKIP
    {'forget': 0.08, 'retain': 0.97}
    """
    rows: dict[bool, list[EncodedRow]] = {True: [], False: []}
    for name, one in sets.items():
        rows[one.forget] += encode_rows(one.rows, tokenizer, None, name)
    return {name: strength(model, rows[forget]) for name, forget in (("forget", True), ("retain", False))}


def task_objectives(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, *, test: bool) -> dict[str, float]:
    """What settings are chosen by, of the rows or facts to forget and to retain of one split; guard off.

    It is the mean extraction strength of the sets by which settings are chosen, or, if the task has validation facts, the share
    of greedy answers, to all wordings, that say the fact. Every row, or answer, counts the same.
    """
    if task.validation_facts is None:
        return objectives(model, tokenizer, {name: task.test[name] for name in task.validation} if test else task.validation)
    facts = task.facts if test else task.validation_facts
    said = said_in_wordings(in_sampling_dtype(model, task), tokenizer, facts, samples=0, max_new_tokens=NEW_TOKENS)
    groups = {
        "forget": [one.greedy for one in said if one.fact.group == FORGOTTEN],
        "retain": [one.greedy for one in said if one.fact.group != FORGOTTEN],
    }
    return {name: float(torch.cat(found).double().mean()) for name, found in groups.items()}


class Report(NamedTuple):
    """Everything that is reported of a model.

    Attributes:
        metrics: a nested dict for JSON. It has "said" (shares of facts and of answers, asked in their wordings), "wrapped"
            (shares of facts, with text around the question), "refused" (shares of prompts that the guard refuses), "leaks"
            (leak@k of the facts to forget), "objectives", "sets" (measures of each set), "aggregates", "membership",
            "separation", "perplexity", "lasting" (what is left when the model is changed) with the curves of "relearning", and
            "left_out" (what could not be measured, and why). Every number under "said", "wrapped", "refused", "leaks",
            "membership" and "lasting" becomes a column of a table.
        rows: the results of all rows, for :func:`eua.evaluation.results.write_results`.
        answers: every answer to a question about a fact, for the same function.
        guard: the one that was calibrated for the model.
    """

    metrics: dict[str, Any]
    rows: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    guard: EnergyGuard


def full_report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    unlearn: Unlearn | None = None,
    *,
    is_retain_only: bool = False,
) -> Report:
    """Everything that is reported of a model, on the task's test sets.

    Args:
        model, tokenizer: those to measure.
        task: its test sets and facts.
        unlearn: see :func:`eua.bench.lasting.lasting`.
        is_retain_only: whether the model is the task's retain model, which is then no reference for membership inference.
    """
    guard = EnergyGuard.calibrate(
        model, tokenizer, list(task.calibration), groups=list(task.calibration_groups), tolerance=task.tolerance
    )
    sets = {name: one.rows for name, one in task.test.items()}
    target, _ = load_model(task.target)
    retained = _retain_figures(task, target, tokenizer)
    reference = None
    if task.retain_model is not None and task.holdout and not is_retain_only:
        reference, _ = load_model(task.retain_model)
    report, rows = measure_all(
        model,
        tokenizer,
        sets,
        forget=[name for name, one in task.test.items() if one.forget],
        utility=task.utility or UTILITY_SETS,  # TOFU's, of which others have not all
        holdout=None if task.members else task.holdout or None,
        retain_model=retained,
        full_model=target,
        entities=task.entities or None,
        reference=reference,
        gradients=bool(task.holdout) and not task.members,
        guard=guard,
        max_new_tokens=task.new_tokens,
        generation=task.generation,
    )
    for name, of_set in report["sets"].items():
        written = [row["generated"] for row in rows if row["set"] == name]
        of_set["declined"] = sum(map(declines, written)) / len(written)
    if task.members:
        _add_membership(report, _membership(model, tokenizer, task, reference), retained)
    if not task.holdout:
        report["left_out"] |= dict.fromkeys(("membership_reference", "membership_gradient_norm"), NO_HOLDOUT)
    elif is_retain_only:
        report["left_out"]["membership_reference"] = "This model is the reference."
    lasts = lasting(model, tokenizer, task, unlearn)
    asked = ask(model, tokenizer, task, guard)
    leaked, without = leaks(asked)
    metrics = {
        "said": shares(asked),
        "wrapped": wrapped(asked),
        "refused": refusals(asked),
        "leaks": leaked,
        "objectives": task_objectives(model, tokenizer, task, test=True),
        "sets": report["sets"],
        "aggregates": report["aggregates"],
        "membership": report["membership_auc"],
        "separation": report["separation"],
        "left_out": report["left_out"] | lasts.left_out | without,
        "perplexity": _perplexity(model, tokenizer, task.text),
        "lasting": lasts.figures,
        "relearning": lasts.curves,
    }
    return Report(_finite(metrics), rows, list(answer_lines(asked)), guard)


def _retain_figures(task: Task, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> RetainFigures | None:
    """What is measured of the retain-only model, once per task in each process."""
    if task.retain_model is None:
        return None
    if task.digest not in _figures:
        _figures.clear()
        model, _ = load_model(task.retain_model)
        rows = next(one.rows for one in task.test.values() if one.forget)
        holdout = None if task.members else task.holdout or None
        figures = measure_retain_model(
            model, tokenizer, rows, holdout=holdout, full_model=target, entities=task.entities or None
        )
        if task.members:
            figures = replace(figures, membership_auc=_membership(model, tokenizer, task))
        _figures[task.digest] = figures
    return _figures[task.digest]


_figures: dict[str, RetainFigures] = {}


def _membership(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, reference: PreTrainedModel | None = None
) -> dict[str, float]:
    """AUROC of the membership scores of rows that are not among the sets."""
    scores = [
        membership_scores(
            model,
            tokenizer,
            encode_rows(rows, tokenizer, task.training.get("max_length"), name),
            reference=reference,
            gradients=True,
        )
        for name, rows in (("members", task.members), ("holdout", task.holdout))
    ]
    return membership_aucs(*scores)


def _add_membership(report: dict[str, Any], aucs: dict[str, float], figures: RetainFigures | None) -> None:
    """Put membership inference of rows that are not among the sets into a report, as if they were."""
    of_retain = figures.membership_auc if figures else {}
    report["membership_auc"] = aucs
    found = {"privacy_leakage": privacy_leakage(aucs["min_k"], of_retain.get("min_k", 0.5))}
    score = privacy_score(aucs, of_retain) if of_retain else None
    if score is not None:
        found["privacy_score"] = score
    report["aggregates"] |= found
    for name in ("membership_auc", *found, *(f"membership_{score}" for score in aucs)):
        report["left_out"].pop(name, None)


def _perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float | None:
    """The exponential of the mean NLL per token, of which each text's mean counts the same; None without texts."""
    if not texts:
        return None
    nll = fluency(texts, model, tokenizer)
    return float(torch.exp(nll[~nll.isnan()].double().mean()))


def _finite(value: Any) -> Any:
    """The value with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
