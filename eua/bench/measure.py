"""What is measured of a model on a task: the few figures that settings are chosen by, and everything that is reported.

What is left when a model is changed or asked in other ways is measured in :mod:`eua.bench.lasting`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.bench.knowledge import NEW_TOKENS
from eua.bench.lasting import Unlearn, lasting, strength
from eua.bench.real_models import minilm_folder
from eua.bench.task import FORGOTTEN, EvaluationSet, Task
from eua.data.rows import EncodedRow, encode_rows
from eua.errors import EUAError
from eua.evaluation.declining import declines
from eua.evaluation.full_report import UTILITY_SETS, measure_all
from eua.evaluation.leaks import SentenceEmbedder, Similarity, leak_curve, rouge_l_recall
from eua.evaluation.membership import membership_aucs, membership_scores, privacy_leakage, privacy_score
from eua.evaluation.retain_model import RetainFigures, measure_retain_model
from eua.evaluation.said import SaidFact, said_in_wordings, said_summary
from eua.evaluation.texts import fluency
from eua.guard.guard import EnergyGuard
from eua.model.loading import load_model

_LEAKS = (1, 4, 16)  # numbers of sampled answers of which the worst one is reported


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
    said = said_in_wordings(_for_sampling(model, task), tokenizer, facts, samples=0, max_new_tokens=NEW_TOKENS)
    groups = {
        "forget": [one.greedy for one in said if one.fact.group == FORGOTTEN],
        "retain": [one.greedy for one in said if one.fact.group != FORGOTTEN],
    }
    return {name: float(torch.cat(found).double().mean()) for name, found in groups.items()}


def _for_sampling(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """The model, or a copy in the dtype in which the task's many answers are generated."""
    return model if task.sampling_dtype is None else copy.deepcopy(model).to(getattr(torch, task.sampling_dtype))


def full_report(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, unlearn: Unlearn | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]], EnergyGuard]:
    """Everything that is reported of a model, on the task's test sets, and the guard that was calibrated for it.

    Args:
        model, tokenizer: those to measure.
        task: its test sets and facts.
        unlearn: see :func:`eua.bench.lasting.lasting`.

    Returns:
        A nested dict for JSON, the results of all rows (:func:`eua.evaluation.results.write_results`), and the guard. The dict
        has "said" (shares of facts and of answers, by way of asking), "leaks" (leak@k of the facts to forget), "objectives",
        "sets" (measures of each set), "aggregates", "membership", "separation", "perplexity", "lasting" (what is left when the
        model is changed or asked in other ways) with the curves of "relearning", and "left_out" (what could not be measured,
        and why). Every number under "said", "leaks", "membership" and "lasting" becomes a column of a table.
    """
    guard = EnergyGuard.calibrate(
        model, tokenizer, list(task.calibration), groups=list(task.calibration_groups), tolerance=task.tolerance
    )
    sets = {name: one.rows for name, one in task.test.items()}
    target, _ = load_model(task.target)
    retained = _retain_figures(task, target, tokenizer)
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
        guard=guard,
        max_new_tokens=task.new_tokens,
        generation=task.generation,
    )
    for name, of_set in report["sets"].items():
        written = [row["generated"] for row in rows if row["set"] == name]
        of_set["declined"] = sum(map(declines, written)) / len(written)
    if task.members:
        _add_membership(report, _membership(model, tokenizer, task), retained)
    lasts = lasting(model, tokenizer, task, unlearn, guard)
    said = _said(model, tokenizer, task)
    leaks, without = _leaks([one for one in said if one.fact.group == FORGOTTEN])
    result = {
        "said": _shares(said, model, tokenizer, guard),
        "leaks": leaks,
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
    return _finite(result), rows, guard


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


def _said(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[SaidFact]:
    """What the model answers, guard off, when it is asked for the task's facts; empty if it has none."""
    if task.facts:
        model = _for_sampling(model, task)
    few = task.samples if task.retained_samples is None else task.retained_samples
    retained = [fact for fact in task.facts if fact.group != FORGOTTEN]
    return [
        one
        for facts, samples in ((task.forgotten_facts, task.samples), (retained, few))
        if facts
        for one in said_in_wordings(model, tokenizer, facts, samples=samples, max_new_tokens=task.new_tokens)
    ]


def _shares(
    said: Sequence[SaidFact], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, guard: EnergyGuard
) -> dict[str, float]:
    """The shares of facts, and of answers, in which the facts are said, by way of asking, guard off and on.

    A prompt that the guard does not refuse is answered exactly as without the guard, so nothing is generated twice.
    """
    if not said:
        return {}
    asked = [wording for one in said for wording in one.fact.wordings]
    refused = iter(guard.refuses(guard.score(model, tokenizer, asked)).split([len(one.greedy) for one in said]))
    guarded = [
        replace(one, greedy=one.greedy & ~of_fact, sampled=one.sampled & ~of_fact[:, None])
        for one, of_fact in zip(said, refused, strict=True)
    ]
    found: dict[str, float] = {}
    for suffix, answers in (("", said), (", guard on", guarded)):
        for group, parts in said_summary(answers).items():
            end = suffix if group == FORGOTTEN else f", {group}{suffix}"
            is_sampled = any(one.sampled.shape[1] for one in answers if one.fact.group == group)
            found |= {f"any wording{end}": parts["all"]["per_fact"]} if is_sampled else {}
            found |= {
                f"any wording, greedily{end}": parts["all"]["greedy"],
                f"share of {'' if is_sampled else 'greedy '}answers{end}": parts["all"]["per_try"],
            }
            if is_sampled and not suffix and "per_fact_by_chance" in parts["all"]:
                found[f"any wording, by chance{end}"] = parts["all"]["per_fact_by_chance"]
            if group == FORGOTTEN:
                found[f"the wording of the rows{end}"] = parts["trained"]["per_fact"]
                found |= {f"other wordings{end}": parts["unseen"]["per_fact"]} if "unseen" in parts else {}
    return found


def _leaks(said: Sequence[SaidFact]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """leak@k of the sampled answers, guard off, scored in three ways, and what could not be measured, and why."""
    if not said or not all(one.sampled.shape[1] for one in said):
        return {}, {}
    leaks, left_out = {"the key": _curve(said)}, {}
    answered = [one for one in said if one.fact.answer]
    if answered:
        leaks["words in common"] = _curve(answered, rouge_l_recall)
        try:
            leaks["meaning"] = _curve(answered, SentenceEmbedder(minilm_folder()))
        except EUAError as error:
            left_out["leak@k by meaning"] = str(error)
    return leaks, left_out


def _curve(said: Sequence[SaidFact], similarity: Similarity | None = None) -> dict[str, float]:
    return {f"k = {k}": value for k, value in leak_curve(said, similarity, ks=_LEAKS).items()}


def _membership(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, float]:
    """AUROC of the membership scores of rows that are not among the sets."""
    scores = [
        membership_scores(model, tokenizer, encode_rows(rows, tokenizer, task.training.get("max_length"), name))
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
    for name in ("membership_auc", *found):
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
