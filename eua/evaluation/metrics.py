"""Per-row measures of what a model knows, with the guard off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.rows import EncodedRow, encode_rows
from eua.data.sources import Row, Source, read_rows
from eua.errors import EUAError
from eua.model.forward import check_finite
from eua.model.head import Head, output_head
from eua.model.shared_prompts import eval_answer_states

LARGEST_RATIO = torch.finfo(torch.float32).max  # so that means of ratios are finite
OPENUNLEARNING_FLOOR = 1e-10  # which OpenUnlearning adds to denominators

T = TypeVar("T")


class TokenMeasures(NamedTuple):
    """One value per token of answers, row after row, each (Σ answer lengths,) float32 on the CPU."""

    right: Tensor  # 1 where the token is the most likely one, else 0
    nll: Tensor  # in nats
    energy: Tensor  # in nats


@dataclass(frozen=True)
class AnswerMeasures:
    """One value per row, each (R,) float32.

    Names that end with ``_openunlearning`` are measures as OpenUnlearning (Dorna et al. 2025) defines them. They leave the
    last token of an answer out, which is usually the end of the sequence.

    Attributes:
        extraction_strength: the share of the answer, counted from its end, that greedy decoding completes without an error
            (Carlini et al. 2021; as a metric of unlearning, Wang et al. 2025). 0 if the last token is not the most likely one.
        extraction_strength_openunlearning: the same without the last token; 1/n, not 0, if the last of the n tokens left is not
            the most likely one, and 0 if none is left.
        exact_memorization: share of answer tokens that are the most likely ones after the preceding tokens.
        exact_memorization_openunlearning: the same without the last token; NaN if none is left.
        probability: ``exp(−mean NLL)`` of the answer's tokens (TOFU; Maini et al. 2024).
        nll: mean negative log-likelihood of the answer's tokens, in nats.
        energy: mean energy of the answer's tokens, in nats.
        prompt_energy: energy at the last token of the prompt, in nats.
    """

    extraction_strength: Tensor
    extraction_strength_openunlearning: Tensor
    exact_memorization: Tensor
    exact_memorization_openunlearning: Tensor
    probability: Tensor
    nll: Tensor
    energy: Tensor
    prompt_energy: Tensor

    def split(self, sizes: Iterable[int]) -> list[AnswerMeasures]:
        """The measures of successive parts of the rows, of these sizes."""
        parts = list(sizes)
        return [AnswerMeasures(*values) for values in zip(*(x.split(parts) for x in vars(self).values()), strict=True)]

    def means(self) -> dict[str, float]:
        """The mean of each measure that a report contains, over the rows that have it; without those that no row has."""
        values = {key: value[~value.isnan()] for key, value in vars(self).items() if key not in ("nll", "prompt_energy")}
        return {key: float(value.mean()) for key, value in values.items() if len(value)}


def measure_answers(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    *,
    temperature: float = 1.0,
    batch_size: int = 32,
    progress: str | None = None,
    check: bool = True,
) -> AnswerMeasures:
    """Measure how well ``model`` knows the answers of encoded rows. Answers to one prompt share its forward if they can.

    >>> rows = encode_rows("forget.jsonl", tokenizer, None)     # doctest: +SKIP
    >>> measure_answers(model, rows).probability                # doctest: +SKIP
    tensor([0.9312, 0.8710])

    Args:
        model: a causal language model.
        rows: rows from :func:`eua.data.rows.encode_rows`, which has the tokenizer that other rows would need here.
        temperature: T of the energy.
        batch_size: rows per forward pass.
        progress: title of a progress bar, or None for no bar.
        check: first check the head and the token ids; False if the caller has done so.

    Raises:
        EUAError: if rows are not encoded, if hidden states are NaN or infinite, or if the model has no plain head.
    """
    _check_encoded(rows)

    def of_batch(head: Head, states: Tensor, batch: Sequence[EncodedRow]) -> Sequence[Tensor]:
        return torch.stack(list(vars(measure_states(head, states, batch, temperature)).values()), dim=1).unbind()

    return AnswerMeasures(*torch.stack(of_answers(model, rows, of_batch, batch_size, progress, check)).unbind(dim=1))


@torch.no_grad()
def of_answers(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    of_batch: Callable[[Head, Tensor, Sequence[EncodedRow]], Sequence[T]],
    batch_size: int = 32,
    progress: str | None = None,
    check: bool = True,
) -> list[T]:
    """A value of each row, computed from the hidden states that predict its answer. Rows with the same tokens run once.

    ``of_batch`` is called with the head, the states of a batch's rows, one row after the other: (Σ answer lengths, H), and the
    rows. It returns one value per row. The other arguments are those of :func:`measure_answers`.
    """
    head = output_head(model)
    texts = list({row.key: row for row in rows}.values())
    values: dict[Any, T] = {}
    for indices, states in eval_answer_states(model, texts, batch_size, progress, check):
        batch = [texts[i] for i in indices]
        values |= zip((row.key for row in batch), of_batch(head, states, batch), strict=True)
    return [values[row.key] for row in rows]


def measure_states(head: Head, states: Tensor, rows: Sequence[EncodedRow], temperature: float) -> AnswerMeasures:
    """The measures of rows from the states that predict their answers, one row after the other: (Σ answer lengths, H)."""
    tokens = measure_tokens(head, states, answer_tokens(rows, states), temperature)
    return measures_of_rows(tokens, [len(row.answer_ids) for row in rows])


def answer_tokens(rows: Sequence[EncodedRow], states: Tensor) -> Tensor:
    """The tokens of the rows' answers, row after row, on the device of ``states``: (Σ answer lengths,)."""
    return torch.tensor([token for row in rows for token in row.answer_ids], device=states.device)


@torch.no_grad()
def measure_tokens(head: Head, states: Tensor, targets: Tensor, temperature: float) -> TokenMeasures:
    """The measures of each token, (N,), from the states that predict them, (N, H)."""
    check_finite(states, "the hidden states of answers")
    energy, nll = head.energy_and_nll(states, targets, temperature)
    check_finite(energy, "the energies of answers")
    right = head.most_likely(states) == targets
    return TokenMeasures(*torch.stack([right, nll, energy]).float().cpu())


def measures_of_rows(tokens: TokenMeasures, lengths: Sequence[int]) -> AnswerMeasures:
    """The measures of rows from those of the tokens of their answers, of which there are ``lengths``."""
    values = []
    for row_right, row_nll, row_energy in torch.stack(tokens).split(lengths, dim=1):
        shorter = row_right[:-1]
        start, last = _start_of_suffix(shorter), len(shorter) - 1
        measures: dict[str, float | Tensor] = {
            "extraction_strength": 1 - _start_of_suffix(row_right) / len(row_right),
            "extraction_strength_openunlearning": 1 - min(start, last) / len(shorter) if len(shorter) else 0.0,
            "exact_memorization": row_right.mean(),
            "exact_memorization_openunlearning": shorter.mean(),
            "probability": torch.exp(-row_nll.mean()),
            "nll": row_nll.mean(),
            "energy": row_energy.mean(),
            "prompt_energy": row_energy[0],
        }
        values.append({key: float(value) for key, value in measures.items()})
    return AnswerMeasures(
        **{field.name: torch.tensor([of_row[field.name] for of_row in values]) for field in fields(AnswerMeasures)}
    )


def _start_of_suffix(right: Tensor) -> int:
    """The first position from which on all tokens are right: (n,) → 0 to n."""
    slips = (right == 0).nonzero()
    return int(slips[-1]) + 1 if len(slips) else 0


def _check_encoded(rows: Sequence[EncodedRow]) -> None:
    wrong = rows if isinstance(rows, (str, PathLike)) else next((row for row in rows if not isinstance(row, EncodedRow)), None)
    if wrong is not None:
        raise EUAError(
            f"measure_answers() got {wrong!r}, which is not an encoded row, and has no tokenizer to encode it: pass "
            "encode_rows(rows, tokenizer, None) of eua.data.rows, or call eua.evaluation.evaluate()."
        )


def truth_ratios(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Source,
    *,
    openunlearning: bool = False,
    batch_size: int = 32,
    progress: str | None = None,
) -> Tensor:
    """TOFU's truth ratio of each row, (R,) float64: the mean probability of the wrong answers over that of the right one.

    ``R = mean_w P(wrong_w | q)^(1/|w|) / P(right | q)^(1/|right|)`` (Maini et al. 2024). The right answer is the row's
    ``paraphrased_answer`` if it has one, else its ``answer``; the wrong ones are its ``perturbed_answer``. Near 0 a model
    prefers the right answer; near 1 it does not distinguish right from wrong.

    >>> truth_ratios(model, tokenizer, "locuslab/TOFU:forget10_perturbed:train")     # doctest: +SKIP
    tensor([0.4127, 0.3908, ...], dtype=torch.float64)

    Args:
        model, tokenizer: those to measure.
        rows: "question"/"answer" rows with ``perturbed_answer``, from any source of :mod:`eua.data.sources`.
        openunlearning: compute the ratio as OpenUnlearning does, with the geometric mean of the wrong answers'
            probabilities, which is never larger than the arithmetic mean, and with 1e-10 added to that of the right answer.
        batch_size: answers per forward pass.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if rows cannot be read, or if a row lacks ``question``, an answer or ``perturbed_answer``.
    """
    candidates = answers_to_compare(read_rows(rows), tokenizer)
    encoded = [row for of_one in candidates for row in of_one]
    nll = measure_answers(model, encoded, batch_size=batch_size, progress=progress).nll
    formula = truth_ratio_openunlearning if openunlearning else truth_ratio
    return torch.stack([formula(of_one) for of_one in nll.split(list(map(len, candidates)))])


def answers_to_compare(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[EncodedRow]]:
    """The right answer of each row, then its wrong answers, as encoded rows for a truth ratio."""
    candidates = [
        [{"question": row["question"], "answer": answer} for answer in _right_and_wrong(row, index)]
        for index, row in enumerate(rows)
    ]
    flat = iter(encode_rows([entry for of_one in candidates for entry in of_one], tokenizer, None, "perturbed answers"))
    return [[next(flat) for _ in of_one] for of_one in candidates]


def _right_and_wrong(row: Mapping[str, Any], index: int) -> list[str]:
    wrong = row.get("perturbed_answer")
    if not wrong:
        raise EUAError(f'Row {index} has no "perturbed_answer", so it has no truth ratio: use TOFU\'s perturbed files.')
    if isinstance(wrong, str):
        raise EUAError(f'Row {index} has one text as its "perturbed_answer", but a list is expected: put it in a list.')
    right = row.get("paraphrased_answer") or row.get("answer")
    if "question" not in row or not right:
        raise EUAError(f'Row {index} has the keys {sorted(row)}, but a truth ratio needs "question" and "answer": add them.')
    return [right, *wrong]


def truth_ratio(nll: Tensor) -> Tensor:
    """The truth ratio of a row, () float64, from mean NLLs in nats, (1 + W,): of the right answer, then of the wrong ones.

    It is computed from differences of NLLs, so it exists even where the probabilities are too small for floats.

    >>> truth_ratio(torch.tensor([1.0, 1.0, 3.0]))
    tensor(0.5677, dtype=torch.float64)
    """
    right, wrong = nll[0].double(), nll[1:].double()
    return (right - wrong).exp().mean().clamp(max=LARGEST_RATIO)


def truth_ratio_openunlearning(nll: Tensor) -> Tensor:
    """Like :func:`truth_ratio`, as OpenUnlearning defines it; at most 1e10.

    >>> truth_ratio_openunlearning(torch.tensor([1.0, 1.0, 3.0]))
    tensor(0.3679, dtype=torch.float64)
    """
    right, wrong = nll[0].double(), nll[1:].double()
    return torch.exp(-wrong.mean()) / (torch.exp(-right) + OPENUNLEARNING_FLOOR)


def truth_ratio_means(nll: Sequence[Tensor], *, forget: bool) -> dict[str, float]:
    """The truth ratios of a set, by their keys in the report, from the mean NLLs of each row, see :func:`truth_ratio`.

    OpenUnlearning's value is the mean of ``min(R, 1/R)`` for a set to forget, 1 if the model does not distinguish right from
    wrong, and the mean of ``max(0, 1 − R)`` for other sets, near 1 if it prefers the right answers.
    """
    theirs = torch.stack([truth_ratio_openunlearning(of_one) for of_one in nll])
    values = torch.minimum(theirs, 1 / (theirs + OPENUNLEARNING_FLOOR)) if forget else (1 - theirs).clamp(min=0)
    ours = torch.stack([truth_ratio(of_one) for of_one in nll])
    return {"truth_ratio": float(ours.mean()), "truth_ratio_openunlearning": float(values.mean())}
