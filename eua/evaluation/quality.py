"""Aggregates of measures by which benchmarks rank unlearned models: how well they forgot, and how useful they still are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eua.errors import EUAError
from eua.evaluation.metrics import OPENUNLEARNING_FLOOR
from eua.statistics import harmonic_mean


def probability_with_options(nll: Tensor) -> Tensor:
    """``P_right/(P_right + Σ_wrong P_wrong + 1e-10)`` of a row, (), from mean NLLs in nats, (1 + W,): of the right answer, then
    of the wrong ones; ``P = exp(−NLL)`` (TOFU, Maini et al. 2024; with the 1e-10 of OpenUnlearning).

    >>> probability_with_options(torch.tensor([1.0, 1.0, 3.0]))
    tensor(0.4683, dtype=torch.float64)
    """
    p = torch.exp(-nll.double())
    return p[0] / (p.sum() + OPENUNLEARNING_FLOOR)


def chooses_right(nll: Tensor) -> Tensor:
    """1 if the right answer is likelier than every wrong one, else 0; () float64, NaN if an NLL is NaN.

    ``nll`` is as in :func:`probability_with_options`. For answers of one letter, the mean over rows is near the accuracy of
    multiple-choice benchmarks such as MMLU and WMDP, in which the end of an answer does not count.

    >>> chooses_right(torch.tensor([1.0, 1.5, 3.0])), chooses_right(torch.tensor([1.0, 1.0, 3.0]))
    (tensor(1., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    return torch.where(nll.isnan().any(), torch.nan, (nll[0] < nll[1:].min()).double())


def right_answer_share(nll: Tensor) -> Tensor:
    """``P_right/(P_right + P_wrong + 1e-10)`` of a row, (), where P_wrong is the geometric mean over the wrong answers.

    ``nll`` is as in :func:`probability_with_options`. The mean over rows is the truth ratio in the memorization score of
    OpenUnlearning's paper, there "prob_mean".

    >>> right_answer_share(torch.tensor([1.0, 1.0, 3.0]))
    tensor(0.7311, dtype=torch.float64)
    """
    right, wrong = torch.exp(-nll[0].double()), torch.exp(-nll[1:].double().mean())
    return right / (right + wrong + OPENUNLEARNING_FLOOR)


def forget_quality(truth_ratios: Tensor, retain_truth_ratios: Tensor) -> float:
    """The p-value of a two-sided Kolmogorov–Smirnov test between truth ratios of a model and of a retain model (TOFU).

    Near 0, the unlearned model can be distinguished from one that was never trained on the rows to forget. The test is exact,
    except for samples of more than 10,000 rows and where rounding errors put the exact value, which is then nearly 1, out of
    range: scipy takes the asymptotic one. It depends on the order of the values only, so any increasing function of them gives
    the same.

    >>> forget_quality(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), torch.tensor([0.3, 0.5, 0.6, 0.7, 0.8]))
    0.35714285714285715

    Args:
        truth_ratios, retain_truth_ratios: (R,) and (S,), of the rows to forget, see :func:`eua.evaluation.truth_ratios`.

    Raises:
        EUAError: if scipy is not installed, or if truth ratios are missing or NaN.
    """
    for name, values in (("truth_ratios", truth_ratios), ("retain_truth_ratios", retain_truth_ratios)):
        if not len(values) or values.isnan().any():
            raise EUAError(
                f"{name} has {len(values)} values, {int(values.isnan().sum())} of which are NaN, but a test compares numbers: "
                "give the truth ratio of each row to forget."
            )
    try:
        from scipy.stats import ks_2samp  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise EUAError(
            "Forget quality was asked for, but scipy, which has its Kolmogorov–Smirnov test, is not installed: "
            'pip install "eua[bench]".'
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful", RuntimeWarning)
        return float(ks_2samp(truth_ratios.tolist(), retain_truth_ratios.tolist()).pvalue)


def model_utility(measures: Sequence[Mapping[str, float]]) -> float:
    """TOFU's model utility: the harmonic mean of probability, ROUGE-L recall and truth ratio over three sets; 0 if one is 0.

    >>> sets = [{"probability": 0.9, "rouge_l_recall": 0.8, "truth_ratio_openunlearning": 0.5}]
    >>> round(model_utility(sets), 6)
    0.687898

    Args:
        measures: of each set: ``rouge_l_recall``, ``truth_ratio_openunlearning`` (``max(0, 1 − R)``), and
            ``probability_with_options`` or, for a set without it, ``probability``. TOFU's are the retained rows, real authors
            and world facts.

    Raises:
        EUAError: if a set lacks a measure, or if one is below 0.
    """
    values: list[float] = []
    for place, of_set in enumerate(measures):
        keys = ["probability_with_options" if "probability_with_options" in of_set else "probability", *_UTILITY]
        missing = [key for key in keys if key not in of_set]
        if missing:
            raise EUAError(
                f"Set {place} has no {' and no '.join(missing)}, but model utility is a mean of them: measure the set with "
                "generated texts and with rows that have wrong answers."
            )
        values += (of_set[key] for key in keys)
    return harmonic_mean(values)


_UTILITY = ("rouge_l_recall", "truth_ratio_openunlearning")


def memorization_score(
    extraction_strength: float, exact_memorization: float, paraphrase_probability: float, truth_ratio: float
) -> float:
    """Harmonic mean of 1 − x of four measures of the rows to forget, in [0, 1]; 1: nothing is memorized.

    Of the paper of OpenUnlearning (Dorna et al. 2025), by its definitions of the measures.

    >>> round(memorization_score(0.679208, 0.968104, 0.104803, 0.682248), 6)
    0.10327

    Args:
        extraction_strength, exact_memorization: means over rows.
        paraphrase_probability: mean probability of the paraphrased answers.
        truth_ratio: mean of :func:`right_answer_share`.

    Raises:
        EUAError: if a value is above 1.
    """
    return harmonic_mean([1 - x for x in (extraction_strength, exact_memorization, paraphrase_probability, truth_ratio)])
