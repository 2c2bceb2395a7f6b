"""Measures a retain model once for all models that unlearn the same rows, and holds measures of answers that run once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.rows import EncodedRow
from eua.data.sources import Source
from eua.evaluation.depth import encode_entities, patching_changes
from eua.evaluation.membership import (
    LOWEST_SHARE,
    compressed_lengths,
    membership_aucs,
    scores_of_tokens,
    standardized_log_likelihoods,
)
from eua.evaluation.metrics import (
    AnswerMeasures,
    answer_tokens,
    measure_tokens,
    measures_of_rows,
    of_answers,
    truth_ratio_openunlearning,
)
from eua.evaluation.report import encode_sets, read_sets
from eua.model.head import Head

HOLDOUT = "holdout"  # the name that holdout rows have in reports and results


@dataclass(frozen=True)
class RetainFigures:
    """What is measured of a retain model, once for all models that unlearn the same rows.

    Attributes:
        truth_ratios: OpenUnlearning's truth ratio of each row to forget, (F,); None if rows have no wrong answers.
        membership_auc: AUROC of each membership score, by name; empty without holdout rows.
        patching_changes: (E, L), see :func:`eua.evaluation.depth.patching_changes`; None without entity rows and a full model.
    """

    truth_ratios: Tensor | None
    membership_auc: dict[str, float]
    patching_changes: Tensor | None


def measure_retain_model(
    retain_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Source,
    *,
    holdout: Source | None = None,
    full_model: PreTrainedModel | None = None,
    entities: Source | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> RetainFigures:
    """Measure a model that was never trained on the rows to forget, for :func:`eua.evaluation.measure_all`.

    >>> figures = measure_retain_model(retain_model, tokenizer, "forget10_perturbed.jsonl")     # doctest: +SKIP
    >>> for model in unlearned_models:                                                          # doctest: +SKIP
    ...     report, _ = measure_all(model, tokenizer, sets, retain_model=figures)

    Args:
        retain_model, tokenizer: those to measure.
        forget: the rows to forget.
        holdout: for membership inference, see :func:`eua.evaluation.measure_all`.
        full_model, entities: for the depth of unlearning, see :func:`eua.evaluation.measure_all`.
        batch_size: rows per forward pass.
        progress: show progress bars.

    Raises:
        EUAError: if rows cannot be read, or if a model cannot be measured.
    """
    rows_of = read_sets({"forget": forget} | ({} if holdout is None else {HOLDOUT: holdout}))
    encoded = encode_sets(retain_model, tokenizer, rows_of)
    texts = MeasuredAnswers(retain_model, encoded.texts, 1.0, batch_size, "retain model" if progress else None)
    _, compared = encoded.split(texts.measures(encoded.texts))["forget"]
    ratios = torch.stack([truth_ratio_openunlearning(of_row) for of_row in compared]) if compared else None
    scores = {name: texts.membership(rows, tokenizer) for name, rows in encoded.answers.items()}
    changes = None
    if full_model is not None and entities is not None:
        changes = entity_changes(full_model, retain_model, tokenizer, entities, batch_size, progress)
    return RetainFigures(ratios, membership_aucs(scores["forget"], scores[HOLDOUT]) if holdout is not None else {}, changes)


def entity_changes(
    full_model: PreTrainedModel,
    source: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    entities: Source,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """:func:`eua.evaluation.depth.patching_changes` of rows that are not encoded yet."""
    rows = encode_entities(entities, tokenizer)
    return patching_changes(full_model, source, rows, batch_size=batch_size, progress="blocks" if progress else None)


class _Text(NamedTuple):
    measures: Tensor  # the fields of AnswerMeasures
    membership: dict[str, float]  # the scores that follow from the tokens' likelihoods
    energies: list[float]  # of each token, in nats


class MeasuredAnswers:
    """Measures of answers, each of which runs through the model once."""

    def __init__(
        self, model: PreTrainedModel, rows: Sequence[EncodedRow], temperature: float, batch_size: int, progress: str | None
    ) -> None:
        def of_batch(head: Head, states: Tensor, batch: Sequence[EncodedRow]) -> list[_Text]:
            targets, lengths = answer_tokens(batch, states), [len(row.answer_ids) for row in batch]
            tokens = measure_tokens(head, states, targets, temperature)
            measures = torch.stack(list(vars(measures_of_rows(tokens, lengths)).values()), dim=1)
            standardized = standardized_log_likelihoods(head, states, targets)
            scores = scores_of_tokens(tokens.nll, standardized, lengths, LOWEST_SHARE)
            energies = tokens.energy.split(lengths)
            return [
                _Text(measures[i], {name: float(values[i]) for name, values in scores.items()}, energies[i].tolist())
                for i in range(len(batch))
            ]

        values = of_answers(model, rows, of_batch, batch_size, progress, check=False)
        self._of = {row.key: value for row, value in zip(rows, values, strict=True)}

    def measures(self, rows: Sequence[EncodedRow]) -> AnswerMeasures:
        """The measures of :func:`eua.evaluation.measure_answers`."""
        return AnswerMeasures(*torch.stack([self._of[row.key].measures for row in rows]).unbind(dim=1))

    def membership(self, rows: Sequence[EncodedRow], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """The scores of :func:`eua.evaluation.membership.membership_scores` that need no other model and no gradient."""
        found = [self._of[row.key].membership for row in rows]
        scores = {name: torch.tensor([of_row[name] for of_row in found]) for name in found[0]}
        return scores | {"zlib": scores["loss"] / compressed_lengths(rows, tokenizer)}

    def energies(self, rows: Sequence[EncodedRow]) -> list[list[float]]:
        """The energy of each token of each answer, in nats."""
        return [self._of[row.key].energies for row in rows]
