"""Statistics of scores: conformal thresholds (method.md §5), bootstrap intervals, and how well two groups separate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from eua.errors import EUAError


def conformal_threshold(
    scores: Tensor,
    tolerance: float,
    groups: Iterable[Hashable] | None = None,
    confidence: float | None = None,
) -> float:
    """The lowest threshold such that at most a fraction ε of new retained prompts is expected to score above it.

    Without groups it is the ⌈(n+1)(1−ε)⌉-th smallest of the n scores (split conformal, Vovk et al. 2005): a prompt
    exchangeable with them scores above it with probability at most ε.

    Prompts about one person or document resemble each other, so they are not exchangeable with prompts about another. With
    ``groups``, the groups are treated as exchangeable instead, and the expected share of a new group's prompts above the
    threshold is at most ε (conformal risk control, Angelopoulos et al. 2022; with one prompt per group, the same rule).

    Both rates are averages over all calibration sets that could have been drawn; the rate for a particular set may exceed ε.
    With a ``confidence`` of 1 − δ it exceeds ε with probability at most δ (risk-controlling prediction sets, Bates et al. 2021:
    an exact binomial bound; for groups, the Hoeffding–Bentkus bound).

    Args:
        scores: (n,) scores of retained prompts that training has not seen.
        tolerance: ε, the tolerated rate of false refusals, in (0, 1).
        groups: the group of each score, e.g. a person's name.
        confidence: 1 − δ, in (0, 1), or None for the bound on average.

    Raises:
        EUAError: if scores are NaN, or :func:`check_calibration` raises.
    """
    owners = check_calibration(len(scores), tolerance, groups, confidence)
    if torch.isnan(scores).any():
        raise EUAError(f"{int(torch.isnan(scores).sum())} of {len(scores)} scores are NaN: fix the model or the prompts first.")
    members = Counter(owners)
    count = len(members)
    # Every group has a total weight of 1.
    weights = torch.tensor([1 / members[owner] for owner in owners], dtype=torch.float64)
    order = scores.sort(descending=True)
    above = weights[order.indices].cumsum(0) - weights[order.indices]  # the weight of all scores before this one
    if confidence is None:  # all prompts of the new group may be refused, so 1 of the G + 1 shares is set aside for it
        allowed = tolerance * (count + 1) - 1
    else:
        p_value = _exact_p_value if groups is None else _hoeffding_bentkus_p_value
        allowed = max(x for x in above.tolist() if p_value(x, count, tolerance) <= 1 - confidence + 1e-12)
    return float(order.values[int((above <= allowed + 1e-9).sum()) - 1])


def check_calibration(
    prompts: int, tolerance: float, groups: Iterable[Hashable] | None = None, confidence: float | None = None
) -> list[Hashable]:
    """Check whether this number of prompts can calibrate a threshold, before any is scored; return the group of each prompt.

    >>> check_calibration(19, 0.05)[-1]
    18

    Raises:
        EUAError: if :func:`group_list` refuses the groups; if there are fewer than ⌈1/ε⌉ − 1 prompts or groups, or with a
            confidence fewer than ⌈ln δ / ln(1 − ε)⌉ (the text says how many are missing); if ε or 1 − δ is outside (0, 1).
    """
    if not 0 < tolerance < 1:
        raise EUAError(f"tolerance = {tolerance}, but a rate of false refusals lies strictly between 0 and 1, e.g. 0.05.")
    if confidence is not None and not 0 < confidence < 1:
        raise EUAError(f"confidence = {confidence}, but a probability lies strictly between 0 and 1, e.g. 0.95.")
    owners: list[Hashable] = list(range(prompts)) if groups is None else group_list(groups, prompts)
    count = len(set(owners))
    if confidence is None:
        needed, least = math.ceil(round(1 / tolerance, 9)) - 1, 1 / (count + 1)
    else:
        needed = math.ceil(round(math.log(1 - confidence) / math.log(1 - tolerance), 9))
        least = 1 - (1 - confidence) ** (1 / count)
    if count < needed:
        what = "calibration prompts" if groups is None else "groups of calibration prompts"
        how_sure = "" if confidence is None else f" with a confidence of {confidence:g}"
        raise EUAError(
            f"{count} {what} are too few for a false-refusal rate of {tolerance:g}{how_sure}, which needs {needed}: "
            f"add {needed - count} more that are held out, or tolerate at least {math.ceil(1000 * least) / 1000:g}."
        )
    return owners


def group_list(groups: Iterable[Hashable], count: int) -> list[Hashable]:
    """The group of each of ``count`` prompts, as a list.

    >>> group_list(("Ann", "Ann", "Bob"), 3)
    ['Ann', 'Ann', 'Bob']

    Raises:
        EUAError: one string, of which every letter would be a group; another number of groups; or a group that cannot be
            compared (a list, a dict).
    """
    if isinstance(groups, (str, bytes)):
        raise EUAError(
            f"groups = {groups!r} is one text, of which every letter would be a group: give a list with the group of every "
            f"prompt, e.g. [row[{groups!r}] for row in rows]."
        )
    listed = list(groups)
    if len(listed) != count:
        raise EUAError(f"{len(listed)} groups were given for {count} scores: name the group of every prompt.")
    for index, group in enumerate(listed):
        if not isinstance(group, Hashable):
            raise EUAError(
                f"Group {index} is a {type(group).__name__}, which cannot be compared with others: give texts or numbers."
            )
    return listed


def group_shares(scores: Tensor, threshold: float, groups: Iterable[Hashable]) -> dict[Hashable, float]:
    """The share of each group's scores above the threshold, largest first.

    >>> group_shares(torch.tensor([1.0, 3.0, 3.0]), 2.0, ["Ann", "Ann", "Bob"])
    {'Bob': 1.0, 'Ann': 0.5}

    Raises:
        EUAError: groups that :func:`group_list` refuses.
    """
    above: dict[Hashable, list[bool]] = {}
    for group, score in zip(group_list(groups, len(scores)), scores.tolist(), strict=True):
        above.setdefault(group, []).append(score > threshold)
    shares = {group: sum(of_group) / len(of_group) for group, of_group in above.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def bootstrap_interval(
    values: Tensor, groups: Iterable[Hashable] | None = None, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of the mean (percentile bootstrap, Efron 1979).

    Args:
        values: (n,), e.g. whether each forgotten prompt was refused.
        groups: the group of each value; if given, groups are resampled instead of values.
        level: the share of resampled means that the interval contains.
        draws: number of resamples.
        seed: of the resamples; the same seed gives the same interval.

    Raises:
        EUAError: if :func:`group_list` refuses the groups.
    """
    listed = list(range(len(values))) if groups is None else group_list(groups, len(values))
    owners = {owner: i for i, owner in enumerate(dict.fromkeys(listed))}
    index = torch.tensor([owners[owner] for owner in listed])
    sums = torch.zeros(len(owners), dtype=torch.float64).index_add(0, index, values.double())
    sizes = torch.zeros(len(owners), dtype=torch.float64).index_add(0, index, torch.ones(len(values), dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(owners), (draws, len(owners)), generator=generator)
    means = sums[drawn].sum(dim=1) / sizes[drawn].sum(dim=1)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = means.quantile(tails).tolist()
    return low, high


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive score exceeds a negative one; ties count half (Mann–Whitney)."""
    order = negative.sort().values
    below = torch.searchsorted(order, positive, right=False)
    up_to = torch.searchsorted(order, positive, right=True)
    return float((below + up_to).double().mean() / (2 * len(negative)))


def false_positive_rate(positive: Tensor, negative: Tensor, true_positive_rate: float = 0.95) -> float:
    """Share of negative scores at or above the threshold that keeps ``true_positive_rate`` of the positive ones."""
    rank = math.ceil(round(len(positive) * true_positive_rate, 9))
    threshold = positive.sort(descending=True).values[rank - 1]
    return float((negative >= threshold).double().mean())


def _exact_p_value(above: float, count: int, tolerance: float) -> float:
    """Probability that at most ``above`` of ``count`` prompts lie above the threshold if the rate of false refusals is ε."""
    return _binomial_cdf(round(above), count, tolerance)


def _hoeffding_bentkus_p_value(above: float, count: int, tolerance: float) -> float:
    """The same for the mean of shares in [0, 1], one per group (Bates et al. 2021, proposition 5)."""
    mean = min(above / count, tolerance)
    entropy = (1 - mean) * math.log((1 - mean) / (1 - tolerance)) + (mean * math.log(mean / tolerance) if mean else 0.0)
    return min(math.exp(-count * entropy), math.e * _binomial_cdf(math.ceil(above - 1e-9), count, tolerance))


def _binomial_cdf(most: int, count: int, probability: float) -> float:
    k = torch.arange(most + 1, dtype=torch.float64)
    n = torch.tensor(float(count), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return float((ways + k * math.log(probability) + (n - k) * math.log1p(-probability)).logsumexp(0).exp())
