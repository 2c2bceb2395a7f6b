"""Membership inference: scores that are low for texts a model was trained on, and what they reveal about rows to forget.

A score is compared between rows to forget and holdout rows, which are like them and which no model was trained on. If a retain
model is given, which was never trained on the rows to forget either, the comparison is made relative to that model.

The definitions are those of OpenUnlearning (Dorna et al. 2025). There the last token of an answer, which is usually the end of
the sequence, is left out of MinK, MinK++ and the gradient norm, but not of the loss.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.batches import pad_rows
from eua.data.rows import EncodedRow
from eua.errors import EUAError
from eua.evaluation.metrics import answer_tokens, measure_answers, measure_tokens, of_answers
from eua.methods.tiles import in_tiles
from eua.model.forward import answer_states, check_finite, check_head_once, check_ids, eval_mode, hidden_states
from eua.model.head import Head, output_head, vocabulary_and_device
from eua.statistics import auroc, harmonic_mean

LOWEST_SHARE = 0.4  # of an answer's tokens, which MinK and MinK++ average
LOWEST_VARIANCE = 1e-6  # of the log-probabilities at a token
TILE_BYTES = 64 * 2**20  # of logits in memory during the computation of their mean and variance
OF_TOKENS = ("loss", "min_k", "min_k_plus_plus")  # the scores that follow from the likelihoods of an answer's tokens
PRIVACY_SCORES = ("loss", "zlib", "min_k", "min_k_plus_plus")  # those in the privacy score
_FLOOR = 1e-10
_PRIVACY_FLOOR = 1e-12


def membership_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedRow],
    *,
    lowest: float = LOWEST_SHARE,
    reference: PreTrainedModel | None = None,
    gradients: bool = False,
    batch_size: int = 32,
    progress: str | None = None,
) -> dict[str, Tensor]:
    """Membership scores of each row's answer, by name, each (R,) float32; lower: the model rather was trained on the row.

    - ``loss``: mean NLL of the answer, in nats (Yeom et al. 2018).
    - ``zlib``: ``loss`` divided by the number of bytes of the answer's text after compression by zlib (Carlini et al. 2021).
    - ``min_k``: mean NLL of the share ``lowest`` of tokens with the lowest probabilities (Shi et al. 2024).
    - ``min_k_plus_plus``: the same of standardized log-probabilities (Zhang et al. 2025), see
      :func:`standardized_log_likelihoods`.
    - ``reference``: ``loss`` less that of a reference model (Carlini et al. 2021), if there is one.
    - ``gradient_norm``: see :func:`gradient_norms`, if ``gradients``; a backward pass per row.

    >>> scores = {name: membership_scores(model, tokenizer, of_set) for name, of_set in encoded.items()}   # doctest: +SKIP
    >>> membership_auc(scores["forget"]["min_k"], scores["holdout"]["min_k"])                              # doctest: +SKIP
    0.52

    Args:
        model, tokenizer: those to measure.
        rows: rows from :func:`eua.data.rows.encode_rows`.
        lowest: share of an answer's tokens that ``min_k`` and ``min_k_plus_plus`` average, in (0, 1].
        reference: a model with the same tokenizer that knows less, e.g. one that was never trained on the rows.
        gradients: whether to compute ``gradient_norm``.
        batch_size: rows per forward pass.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if ``lowest`` is not a share, or if a model cannot be measured.
    """
    check_share(lowest)

    def of_batch(head: Head, states: Tensor, batch: Sequence[EncodedRow]) -> Sequence[Tensor]:
        targets, lengths = answer_tokens(batch, states), [len(row.answer_ids) for row in batch]
        nll = measure_tokens(head, states, targets, temperature=1.0).nll
        scores = scores_of_tokens(nll, standardized_log_likelihoods(head, states, targets), lengths, lowest)
        return torch.stack(list(scores.values()), dim=1).unbind()

    found = torch.stack(of_answers(model, rows, of_batch, batch_size, progress))
    scores = dict(zip(OF_TOKENS, found.unbind(dim=1), strict=True))
    scores["zlib"] = scores["loss"] / compressed_lengths(rows, tokenizer)
    if reference is not None:
        scores["reference"] = scores["loss"] - measure_answers(reference, rows, batch_size=batch_size, progress=progress).nll
    if gradients:
        scores["gradient_norm"] = gradient_norms(model, rows, progress=progress)
    return scores


def scores_of_tokens(nll: Tensor, standardized: Tensor, lengths: Sequence[int], lowest: float) -> dict[str, Tensor]:
    """The scores that follow from those of tokens, by the names ``OF_TOKENS``, each (R,) float32.

    Args:
        nll, standardized: of the tokens of the rows' answers, row after row, (Σ answer lengths,); ``standardized`` from
            :func:`standardized_log_likelihoods`.
        lengths: of the rows' answers, in tokens.
        lowest: as in :func:`membership_scores`.
    """
    rows = list(zip(nll.split(list(lengths)), standardized.split(list(lengths)), strict=True))
    values = (
        [float(of_row.mean()) for of_row, _ in rows],
        [mean_of_lowest(-of_row[:-1], lowest) for of_row, _ in rows],
        [mean_of_lowest(of_row[:-1], lowest) for _, of_row in rows],
    )
    return dict(zip(OF_TOKENS, map(torch.tensor, values), strict=True))


def check_share(lowest: float) -> None:
    """Raise :class:`EUAError` unless ``lowest`` is a share of tokens, in (0, 1]."""
    if not 0 < lowest <= 1:
        raise EUAError(
            f"lowest = {lowest}, but it is the share of an answer's tokens that MinK averages: give a number above 0 and up "
            f"to 1, e.g. {LOWEST_SHARE}."
        )


def mean_of_lowest(values: Tensor, share: float = LOWEST_SHARE) -> float:
    """The mean of the lowest ``max(1, int(n·share))`` of n values (n,), negated; 0 if there is none.

    >>> mean_of_lowest(torch.tensor([-4.0, -1.0, -3.0]), 0.7)
    3.5
    """
    count = max(1, int(len(values) * share))
    return -float(values.sort().values[:count].mean()) if len(values) else 0.0


@torch.no_grad()
def standardized_log_likelihoods(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """``(log p(y) − μ)/σ`` of each token, (N,) float32 on the CPU, from the states that predict them (N, H), as in MinK++.

    μ and σ² are the mean and the variance of ``log p(v)`` over the vocabulary, weighted by p; σ² is at least 1e-6. Logits are
    computed for a few tokens at a time, at T = 1, in float32.
    """
    tile = max(1, TILE_BYTES // (4 * head.vocabulary))

    def of_tile(states: Tensor, tokens: Tensor) -> Tensor:
        logs = head.logits(states).log_softmax(dim=-1)
        p = logs.exp()
        mean = (p * logs).sum(dim=-1, keepdim=True)
        variance = (p * (logs - mean).square()).sum(dim=-1)
        likelihood = logs.gather(1, tokens[:, None])
        return (likelihood - mean)[:, 0] / variance.clamp(min=LOWEST_VARIANCE).sqrt()

    standardized = in_tiles(of_tile, hidden, targets, tile=tile).float().cpu()
    check_finite(standardized, "the log-probabilities of answers")
    return standardized


def compressed_lengths(rows: Sequence[EncodedRow], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The number of bytes of each answer's text, in UTF-8, after compression by zlib, (R,); 8 for an empty text."""
    texts = tokenizer.batch_decode([row.answer_ids for row in rows], skip_special_tokens=True)
    return torch.tensor([len(zlib.compress(text.encode())) for text in texts])


def gradient_norms(
    model: PreTrainedModel, rows: Sequence[EncodedRow], *, order: float = 2.0, progress: str | None = None
) -> Tensor:
    """The mean over the model's parameter tensors of the p-norm of the gradient of a row's mean NLL, (R,) float32.

    As in OpenUnlearning, the last token of an answer is left out, and each row runs alone. A row without another token is NaN.
    The model runs in eval mode, so dropout does not act; in OpenUnlearning it does. Parameters that require no gradient are
    left out, and no gradient is left behind.

    Args:
        model: a causal language model that is not quantized.
        rows: encoded rows.
        order: p of the norm, ≥ 1 or ``math.inf``.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if no parameter requires a gradient, or if the model cannot be measured.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise EUAError(
            f"{type(model).__name__} has no parameter that requires a gradient, so gradients have no norm: load it without "
            "quantization, and call model.requires_grad_(True)."
        )
    check_head_once(model)
    check_ids(model, (row.input_ids for row in rows))
    _, device = vocabulary_and_device(model)
    norms: list[float] = []
    with eval_mode(model), torch.enable_grad():
        for row in tqdm(rows, desc=progress, disable=progress is None, leave=False):
            if len(row.answer_ids) == 1:
                norms.append(math.nan)
                continue
            batch = {name: tensor.to(device) for name, tensor in pad_rows([row]).items()}
            states = answer_states(hidden_states(model, batch), [row])[:-1]
            nll = output_head(model).energy_and_nll(states, answer_tokens([row], states)[:-1], 1.0).nll.mean()
            gradients = torch.autograd.grad(nll, parameters, allow_unused=True)
            of_tensors = [torch.linalg.vector_norm(grad.float(), order) for grad in gradients if grad is not None]
            norms.append(float(torch.stack(of_tensors).mean()))
    return torch.tensor(norms)


def membership_auc(forget: Tensor, holdout: Tensor) -> float:
    """AUROC of a membership score, (F,) and (H,): the probability that a holdout row has the higher one; ties count half.

    1: the model finds the rows to forget far likelier than the holdout rows. 0.5: it does not distinguish the two. Rows
    without a score (NaN) are left out.

    >>> round(membership_auc(torch.tensor([0.1, 0.4, 0.4]), torch.tensor([0.4, 0.8])), 6)
    0.833333

    Raises:
        EUAError: if a set has no scores.
    """
    kept = {"forget": forget[~forget.isnan()], "holdout": holdout[~holdout.isnan()]}
    for name, scores in kept.items():
        if not len(scores):
            raise EUAError(
                f"The {name} rows have no membership scores, so there is nothing to compare: give rows whose answers have at "
                "least two tokens."
            )
    return auroc(kept["holdout"], kept["forget"])


def membership_aucs(forget: Mapping[str, Tensor], holdout: Mapping[str, Tensor]) -> dict[str, float]:
    """:func:`membership_auc` of each score of :func:`membership_scores`, by its name."""
    return {name: membership_auc(scores, holdout[name]) for name, scores in forget.items()}


def privacy_leakage(auc: float, retain_auc: float = 0.5) -> float:
    """PrivLeak (MUSE; Shi et al. 2024) in per cent, from the AUROC of MinK: ``100·(a_retain − a)/(1 − a_retain + 1e-10)``.

    0 is ideal. Below 0, the rows to forget are still likelier than they would be for the retain model; above 0, they are less
    likely, which also shows that they were trained on. Without a retain model, a_retain is 0.5. If it is 1, the value is huge.

    >>> round(privacy_leakage(0.7, 0.4), 6)
    -50.0
    """
    return 100 * ((1 - auc) - (1 - retain_auc)) / ((1 - retain_auc) + _FLOOR)


def membership_similarity(auc: float, retain_auc: float) -> float | None:
    """``1 − |a − a_retain|/a_retain``, at least 0: 1 if the attack does to the model what it does to the retain model.

    None if a_retain is 0, for which it is not defined.

    >>> round(membership_similarity(0.7, 0.4), 6)
    0.25
    """
    return None if retain_auc < _PRIVACY_FLOOR else min(max(1 - abs(auc - retain_auc) / retain_auc, 0.0), 1.0)


def privacy_score(aucs: Mapping[str, float], retain_aucs: Mapping[str, float]) -> float | None:
    """Harmonic mean of :func:`membership_similarity` of the loss, ZLib, MinK and MinK++, in [0, 1]; 1: as the retain model.

    Of the paper of OpenUnlearning (Dorna et al. 2025). 1e-12 is added to each value. None if one is not defined.

    >>> same = {"loss": 0.5, "zlib": 0.5, "min_k": 0.5, "min_k_plus_plus": 0.5}
    >>> privacy_score(same, same)
    1.0
    """
    similarities = [membership_similarity(aucs[name], retain_aucs[name]) for name in PRIVACY_SCORES]
    values = [value + _PRIVACY_FLOOR for value in similarities if value is not None]
    return min(1.0, harmonic_mean(values)) if len(values) == len(PRIVACY_SCORES) else None
