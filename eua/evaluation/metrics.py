"""Per-row measures of what a model knows, with the guard off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.rows import EncodedRow, encode_rows
from eua.data.sources import Source, read_rows
from eua.errors import EUAError
from eua.model.forward import answer_states, check_finite, eval_hidden_states
from eua.model.head import Head, output_head

GREEDY_BLOCK_BYTES = 64 * 2**20  # of logits in memory during the search for the most likely tokens


@dataclass(frozen=True)
class AnswerMeasures:
    """One value per row, each (R,) float32.

    Attributes:
        extraction_strength: the share of the answer, counted from its end, that greedy decoding completes without an error
            (Carlini et al. 2021; as a metric of unlearning, Wang et al. 2025).
        exact_memorization: share of answer tokens that are the most likely ones after the preceding tokens.
        probability: ``exp(−mean NLL)`` of the answer's tokens (TOFU; Maini et al. 2024).
        energy: mean energy of the answer's tokens, in nats.
    """

    extraction_strength: Tensor
    exact_memorization: Tensor
    probability: Tensor
    energy: Tensor


@torch.no_grad()
def measure_answers(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    *,
    temperature: float = 1.0,
    batch_size: int = 32,
    progress: str | None = None,
) -> AnswerMeasures:
    """Measure how well ``model`` knows the answers of encoded rows.

    >>> rows = encode_rows("forget.jsonl", tokenizer, None)     # doctest: +SKIP
    >>> measure_answers(model, rows).probability                # doctest: +SKIP
    tensor([0.9312, 0.8710])

    Args:
        model: a causal language model.
        rows: rows from :func:`eua.data.rows.encode_rows`, which has the tokenizer that other rows would need here.
        temperature: T of the energy.
        batch_size: rows per forward pass.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if rows are not encoded, if hidden states are NaN or infinite, or if the model has no plain head.
    """
    _check_encoded(rows)
    head = output_head(model)
    values = torch.empty(len(rows), 4)
    for indices, hidden in eval_hidden_states(model, rows, batch_size, progress):
        states = answer_states(hidden, [rows[i] for i in indices])
        check_finite(states, "the hidden states of answers")
        targets = torch.tensor([token for i in indices for token in rows[i].answer_ids], device=states.device)
        energy, nll = head.energy_and_nll(states, targets, temperature)
        right = greedy_tokens(head, states) == targets
        per_token = torch.stack([right, nll, energy]).float().cpu()
        for i, part in zip(indices, per_token.split([len(rows[i].answer_ids) for i in indices], dim=1), strict=True):
            was_right, row_nll, row_energy = part
            slips = (was_right == 0).nonzero()
            first_of_suffix = int(slips[-1]) + 1 if len(slips) else 0
            strength = torch.tensor(1 - first_of_suffix / len(was_right))
            values[i] = torch.stack([strength, was_right.mean(), torch.exp(-row_nll.mean()), row_energy.mean()])
    return AnswerMeasures(*values.unbind(dim=1))


def _check_encoded(rows: Sequence[EncodedRow]) -> None:
    wrong = rows if isinstance(rows, (str, PathLike)) else next((row for row in rows if not isinstance(row, EncodedRow)), None)
    if wrong is not None:
        raise EUAError(
            f"measure_answers() got {wrong!r}, which is not an encoded row, and has no tokenizer to encode it: pass "
            "encode_rows(rows, tokenizer, None) of eua.data.rows, or call eua.evaluation.evaluate()."
        )


def greedy_tokens(head: Head, hidden: Tensor) -> Tensor:
    """The most likely next token at each position: (N, H) → (N,), in blocks of limited size."""
    block = max(1, GREEDY_BLOCK_BYTES // (4 * head.vocabulary))
    return torch.cat([head.logits(part).argmax(dim=-1) for part in hidden.split(block)])


def truth_ratios(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Source,
    *,
    batch_size: int = 32,
    progress: str | None = None,
) -> Tensor:
    """TOFU's truth ratio of each row, (R,): the mean probability of the wrong answers over that of the right one.

    ``R = mean_w P(wrong_w | q)^(1/|w|) / P(right | q)^(1/|right|)`` (Maini et al. 2024). The right answer is the row's
    ``paraphrased_answer`` if it has one, else its ``answer``; the wrong ones are its ``perturbed_answer``. Near 0 a model
    prefers the right answer; near 1 it does not distinguish right from wrong.

    >>> truth_ratios(model, tokenizer, "locuslab/TOFU:forget10_perturbed:train")     # doctest: +SKIP
    tensor([0.4127, 0.3908, ...])

    Args:
        model, tokenizer: those to measure.
        rows: "question"/"answer" rows with ``perturbed_answer``, from any source of :mod:`eua.data.sources`.
        batch_size: answers per forward pass.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if rows cannot be read, or if a row lacks ``question``, an answer or ``perturbed_answer``.
    """
    rows = read_rows(rows)
    candidates, wrong_counts = [], []
    for index, row in enumerate(rows):
        wrong = row.get("perturbed_answer")
        if not wrong:
            raise EUAError(f'Row {index} has no "perturbed_answer", so it has no truth ratio: use TOFU\'s perturbed files.')
        if isinstance(wrong, str):
            raise EUAError(f'Row {index} has one text as its "perturbed_answer", but a list is expected: put it in a list.')
        right = row.get("paraphrased_answer") or row.get("answer")
        if "question" not in row or not right:
            raise EUAError(
                f'Row {index} has the keys {sorted(row)}, but a truth ratio needs "question" and "answer": add them.'
            )
        answers = [right, *wrong]
        candidates += [{"question": row["question"], "answer": answer} for answer in answers]
        wrong_counts.append(len(wrong))
    encoded = encode_rows(candidates, tokenizer, None, "perturbed answers")
    probability = measure_answers(model, encoded, batch_size=batch_size, progress=progress).probability
    parts = probability.split([1 + count for count in wrong_counts])
    return torch.stack([part[1:].mean() / part[0] for part in parts])
