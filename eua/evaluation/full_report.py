"""Measures everything about an unlearned model that can be measured from what is given, and says what could not be, and why.

:func:`eua.evaluation.evaluate` needs a model and its rows. The measures that are added here also need a model that was never
trained on the rows to forget, holdout rows, generated texts, or the model before unlearning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.rows import EncodedRow
from eua.data.sources import Row, Source, read_rows
from eua.errors import EUAError
from eua.evaluation.depth import unlearning_depth_score, unlearning_depths
from eua.evaluation.membership import gradient_norms, membership_aucs, privacy_leakage, privacy_score
from eua.evaluation.metrics import AnswerMeasures, measure_answers, truth_ratio, truth_ratio_openunlearning
from eua.evaluation.quality import (
    chooses_right,
    forget_quality,
    memorization_score,
    model_utility,
    probability_with_options,
    right_answer_share,
)
from eua.evaluation.report import encode_sets, forgotten_names, read_sets, report_sets
from eua.evaluation.retain_model import HOLDOUT, MeasuredAnswers, RetainFigures, entity_changes, measure_retain_model
from eua.evaluation.texts import NEW_TOKENS, answer_texts, fluency, generate, repetition, rouge
from eua.guard.guard import EnergyGuard

ENTITIES = "entities"  # the name that entity rows have in reports and results
UTILITY_SETS = ("retain", "real_authors", "world_facts")

NO_HOLDOUT = "There are no holdout rows, which are like the rows to forget but were never trained on."
NO_RETAIN_MODEL = "There is no retain model, which was never trained on the rows to forget."
NO_TEXTS = "No texts were generated, since max_new_tokens is 0."
NO_WRONG_ANSWERS = "The rows of {} have no perturbed_answer."

Columns = dict[str, Any]  # measure → a value per row, as a tensor or a list


def measure_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Source],
    *,
    forget: str | Sequence[str] = ("forget",),
    utility: Sequence[str] = UTILITY_SETS,
    holdout: Source | None = None,
    retain_model: PreTrainedModel | RetainFigures | None = None,
    full_model: PreTrainedModel | None = None,
    entities: Source | None = None,
    reference: PreTrainedModel | None = None,
    judge: PreTrainedModel | None = None,
    guard: EnergyGuard | None = None,
    gradients: bool = False,
    max_new_tokens: int = NEW_TOKENS,
    generation: Mapping[str, Mapping[str, Any]] | None = None,
    temperature: float = 1.0,
    batch_size: int = 32,
    progress: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure all that can be measured of a model from what is given: with the guard off, and what it writes with the guard on.

    The answers in the rows run through a model once, and again only for gradients.

    >>> report, results = measure_all(                                          # doctest: +SKIP
    ...     model,
    ...     tokenizer,
    ...     {"forget": "forget10_perturbed.jsonl", "retain": "retain_perturbed.jsonl"},
    ...     holdout="holdout10.jsonl",
    ...     retain_model=retain_model,
    ... )
    >>> report["aggregates"]["forget_quality"]                                  # doctest: +SKIP
    0.58
    >>> report["left_out"]["model_utility"]                                     # doctest: +SKIP
    'There are no sets real_authors, world_facts.'
    >>> write_results(Path("rows.parquet"), results)                            # doctest: +SKIP

    Args:
        model, tokenizer: those to measure, without a guard that is attached; all other models have the same tokenizer.
        sets: name → rows as in :func:`eua.evaluation.evaluate`. Rows with ``perturbed_answer`` have truth ratios, and without
            ``paraphrased_answer`` also a probability with options.
        forget: the name, or names, of the sets that should be forgotten; the aggregates are about the first.
        utility: the names of the sets whose measures make up model utility.
        holdout: rows like those to forget, on which no model was trained. A set with the name "holdout" is the same.
        retain_model: a model that was never trained on the rows to forget, or what :func:`measure_retain_model` returned.
        full_model: the model before unlearning, for the depth of unlearning and as a judge.
        entities: facts to forget as rows for :func:`eua.evaluation.depth.encode_entities`.
        reference: the model of the membership score "reference", see :func:`eua.evaluation.membership.membership_scores`.
        judge: the language model that judges fluency; ``full_model`` by default.
        guard: measures what it refuses, and what the model writes with it.
        gradients: whether to compute gradient norms, with a backward pass for each row to forget and each holdout row.
        max_new_tokens: length of the generated texts; 0: generate none.
        generation: set → other options of :func:`eua.evaluation.texts.generate` for it, e.g. ``{"forget": MUSE_QUESTIONS}``.
        temperature: T of the energies. A guard's own value takes precedence.
        batch_size: rows per forward pass.
        progress: show progress bars.

    Returns:
        The report, and the results of all rows for :func:`eua.evaluation.results.write_results`. The report is that of
        :func:`eua.evaluation.evaluate` with more measures of each set, and with ``membership_auc`` and
        ``membership_auc_retain_model``: {score: AUROC}, ``aggregates``: {name: value}, and ``left_out``: {measure: reason}.

    Raises:
        EUAError: if sets cannot be read or have a name that is taken, if a set to forget is missing, if a model cannot be
            measured, or if a library is not installed.
    """
    rows_of = read_sets(_with_holdout(sets, holdout))
    entities = None if entities is None else read_rows(entities, "entity rows")
    forgotten = forgotten_names(forget, rows_of)
    for name in generation or {}:
        if name not in rows_of:
            raise EUAError(
                f"Options to generate with were given for the set {name!r}, but the sets are {', '.join(rows_of)}: name these."
            )
    encoded = encode_sets(model, tokenizer, rows_of)
    temperature = guard.temperature if guard else temperature
    settings: dict[str, Any] = {"batch_size": batch_size, "progress": "answers" if progress else None}
    texts = MeasuredAnswers(model, encoded.texts, temperature, **settings)
    measures = texts.measures(encoded.texts)
    report, prompt_scores = report_sets(
        model,
        tokenizer,
        encoded,
        measures,
        forget=forgotten,
        guard=guard,
        temperature=temperature,
        batch_size=batch_size,
        progress=progress,
    )
    judge = judge or full_model
    columns: dict[str, Columns] = {}
    for name, (own, compared) in encoded.split(measures).items():
        rows = encoded.answers[name]
        of_set: Columns = vars(own) | {"score": prompt_scores[name]} | _compared_columns(own, compared, rows_of[name])
        if guard is not None:
            of_set["refused"] = guard.refuses(prompt_scores[name])
        if name in (forgotten[0], HOLDOUT):
            scores = texts.membership(rows, tokenizer)
            if reference is not None:
                scores["reference"] = own.nll - measure_answers(reference, rows, **settings).nll
            if gradients:
                scores["gradient_norm"] = gradient_norms(model, rows, progress="gradients" if progress else None)
            of_set |= {f"{_MEMBERSHIP}{key}": values for key, values in scores.items()}
        if max_new_tokens:
            options = {"max_new_tokens": max_new_tokens} | dict((generation or {}).get(name, {}))
            options |= {"batch_size": batch_size, "progress": "texts" if progress else None}
            of_set |= _text_columns(model, tokenizer, rows_of[name], rows, guard, options)
            if judge is not None:
                of_set["fluency_nll"] = fluency(of_set["generated"], judge, tokenizer, **settings)
        report["sets"][name] |= _means(of_set)
        columns[name] = of_set | {"energies": texts.energies(rows)}

    if retain_model is not None and not isinstance(retain_model, RetainFigures):
        retain_model = measure_retain_model(
            retain_model,
            tokenizer,
            rows_of[forgotten[0]],
            holdout=rows_of.get(HOLDOUT),
            full_model=full_model,
            entities=entities,
            batch_size=batch_size,
            progress=progress,
        )
    figures = retain_model or RetainFigures(None, {}, None)
    if figures.patching_changes is not None and full_model is not None and entities is not None:
        changes = entity_changes(full_model, model, tokenizer, entities, batch_size, progress)
        columns[ENTITIES] = {"unlearning_depth": unlearning_depths(figures.patching_changes, changes)}
    report |= _aggregates(report["sets"], columns, forgotten[0], utility, figures)
    absent = {
        "refused": "There is no guard." if guard is None else "",
        "membership_reference": "There is no reference model." if reference is None else "",
        "membership_gradient_norm": "" if gradients else "Gradients were not asked for.",
        "rouge, repetition": "" if max_new_tokens else NO_TEXTS,
        "fluency": "There is no judge and no full model." if judge is None else "" if max_new_tokens else NO_TEXTS,
        **{f"truth_ratio of {name}": "" if name in encoded.compared else NO_WRONG_ANSWERS.format(name) for name in rows_of},
    }
    report["left_out"] |= {name: reason for name, reason in absent.items() if reason}
    return report, _results(columns)


_MEMBERSHIP = "membership_"  # begins the names of membership scores in results
_TEXT_MEASURES = ("rouge_1_recall", "rouge_1_f1", "rouge_l_recall", "rouge_l_f1", "repetition")
_MEANS = (  # of columns that a report adds to what evaluate() reports
    "probability_with_options",
    "accuracy",
    "paraphrase_probability",
    "right_answer_share",
    *_TEXT_MEASURES,
    *(f"{name}_guarded" for name in _TEXT_MEASURES),
    "fluency_nll",
)


def _with_holdout(sets: Mapping[str, Source], holdout: Source | None) -> Mapping[str, Source]:
    if isinstance(sets, Mapping):
        taken = {ENTITIES} | ({HOLDOUT} if holdout is not None else set())
        for name in taken & set(sets):
            raise EUAError(
                f'A set has the name "{name}", which rows of another kind have in the report: give the set another name, or '
                f"pass it as {name}= alone."
            )
        return {**sets, **({} if holdout is None else {HOLDOUT: holdout})}
    return sets  # read_sets explains what is wrong with it


def _compared_columns(own: AnswerMeasures, compared: Sequence[Tensor], rows: Sequence[Row]) -> Columns:
    """Measures of rows whose answers are compared, from the NLLs of the right and the wrong ones, (1 + W,) of each row."""
    if not compared:
        return {}
    columns: Columns = {
        "truth_ratio": torch.stack([truth_ratio(nll) for nll in compared]),
        "truth_ratio_openunlearning": torch.stack([truth_ratio_openunlearning(nll) for nll in compared]),
        "right_answer_share": torch.stack([right_answer_share(nll) for nll in compared]),
    }
    if all(row.get("paraphrased_answer") for row in rows):
        columns["paraphrase_probability"] = torch.stack([torch.exp(-nll[0]) for nll in compared])
    elif not any(row.get("paraphrased_answer") for row in rows):  # else the wrong answers resemble the paraphrase
        columns["probability_with_options"] = torch.stack([probability_with_options(nll) for nll in compared])
        columns["accuracy"] = torch.stack([chooses_right(nll) for nll in compared])
    return columns


def _text_columns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    encoded: Sequence[EncodedRow],
    guard: EnergyGuard | None,
    options: Mapping[str, Any],
) -> Columns:
    """What the model writes with options of ``generate``, and its measures; with a guard also under names that end with
    ``_guarded``."""

    def written() -> Columns:
        generated = generate(model, tokenizer, rows, **options)
        scores = rouge(generated, answer_texts(encoded, tokenizer))
        return {"generated": generated, **scores, "repetition": torch.tensor([repetition(text) for text in generated])}

    columns = written()
    if guard is not None:
        with guard.attach(model, tokenizer):
            columns |= {f"{name}_guarded": values for name, values in written().items()}
    return columns


def _means(columns: Columns) -> dict[str, float]:
    """The means that the report adds for a set, over the rows that have a value, and the perplexity of generated texts."""
    present = {name: columns[name][~columns[name].isnan()] for name in _MEANS if name in columns}
    means = {name: float(values.double().mean()) for name, values in present.items() if len(values)}
    if "fluency_nll" in means:
        means["perplexity"] = float(torch.tensor(means["fluency_nll"], dtype=torch.float64).exp())
    return means


def _aggregates(
    sets: Mapping[str, Mapping[str, float]],
    columns: Mapping[str, Columns],
    forget: str,
    utility: Sequence[str],
    figures: RetainFigures,
) -> dict[str, Any]:
    """The parts of the report that are about several sets or models."""
    aggregates: dict[str, float] = {}
    left_out: dict[str, str] = {}
    entry, of_rows = sets[forget], columns[forget]

    if "truth_ratio" not in of_rows:
        left_out["forget_quality"] = NO_WRONG_ANSWERS.format(forget)
    elif figures.truth_ratios is None:
        left_out["forget_quality"] = NO_RETAIN_MODEL
    else:
        aggregates["forget_quality"] = forget_quality(of_rows["truth_ratio_openunlearning"], figures.truth_ratios)

    missing = [name for name in utility if name not in sets]
    unlike = [name for name in utility if "truth_ratio" not in sets.get(name, {})]
    if missing or unlike:
        left_out["model_utility"] = (
            f"There are no sets {', '.join(missing)}." if missing else NO_WRONG_ANSWERS.format(", ".join(unlike))
        )
    elif "generated" not in of_rows:
        left_out["model_utility"] = NO_TEXTS
    else:
        aggregates["model_utility"] = model_utility([sets[name] for name in utility])

    measures = ("extraction_strength_openunlearning", "exact_memorization_openunlearning", "paraphrase_probability")
    lacking = [name for name in (*measures, "right_answer_share") if name not in entry]
    if lacking:
        left_out["memorization_score"] = f"The rows of {forget} have no {', '.join(lacking)}."
    else:
        aggregates["memorization_score"] = memorization_score(*(entry[name] for name in (*measures, "right_answer_share")))

    aucs: dict[str, float] = {}
    if HOLDOUT in columns and forget != HOLDOUT:
        scores = [
            {name.removeprefix(_MEMBERSHIP): values for name, values in columns[of_set].items() if name.startswith(_MEMBERSHIP)}
            for of_set in (forget, HOLDOUT)
        ]
        aucs = membership_aucs(*scores)
        aggregates["privacy_leakage"] = privacy_leakage(aucs["min_k"], figures.membership_auc.get("min_k", 0.5))
    else:
        left_out |= dict.fromkeys(("membership_auc", "privacy_leakage"), NO_HOLDOUT)
    privacy = privacy_score(aucs, figures.membership_auc) if aucs and figures.membership_auc else None
    if privacy is not None:
        aggregates["privacy_score"] = privacy
    elif figures.membership_auc and aucs:
        left_out["privacy_score"] = "The AUROC of the retain model is 0, relative to which nothing can be stated."
    else:
        left_out["privacy_score"] = "No retain model was measured on the holdout rows." if aucs else NO_HOLDOUT

    if ENTITIES in columns:
        aggregates["unlearning_depth"] = unlearning_depth_score(columns[ENTITIES]["unlearning_depth"])
    else:
        left_out["unlearning_depth"] = "It needs entity rows, the full model and a retain model that was measured with both."
    return {
        "membership_auc": aucs,
        "membership_auc_retain_model": figures.membership_auc,
        "aggregates": aggregates,
        "left_out": left_out,
    }


def _results(columns: Mapping[str, Columns]) -> list[dict[str, Any]]:
    """A mapping for each row, with the measures that it has."""
    results = []
    for name, of_set in columns.items():
        lists = {key: values.tolist() if isinstance(values, Tensor) else values for key, values in of_set.items()}
        for row in range(len(next(iter(lists.values())))):
            present = {key: values[row] for key, values in lists.items()}
            present = {key: value for key, value in present.items() if not (isinstance(value, float) and isnan(value))}
            results.append({"set": name, "row": row} | present)
    return results
