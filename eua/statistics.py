"""Statistics of scores: conformal thresholds (method.md §5), intervals of shares, and how well two groups separate."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

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
        # The p-value grows with the weight above the threshold, which is sorted.
        possible = bisect_right(above.tolist(), 1 - confidence + 1e-12, key=lambda x: p_value(x, count, tolerance))
        allowed = float(above[possible - 1])
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
    """The group of each of ``count`` prompts, as a list in which equal groups are equal. Numbers in tensors become numbers.

    >>> group_list(("Ann", "Ann", "Bob"), 3)
    ['Ann', 'Ann', 'Bob']

    Raises:
        EUAError: one string, of which every letter would be a group; another number of groups; a group that is missing (None,
            NaN) or that cannot be compared with others (a list, a dict, an object that equals only itself).
    """
    if isinstance(groups, (str, bytes)):
        raise EUAError(
            f"groups = {groups!r} is one text, of which every letter would be a group: give a list with the group of every "
            f"prompt, e.g. [row[{groups!r}] for row in rows]."
        )
    listed = [_plain_group(group, index) for index, group in enumerate(groups)]
    if len(listed) != count:
        raise EUAError(f"{len(listed)} groups were given for {count} scores: name the group of every prompt.")
    return listed


def _plain_group(group: Any, index: int) -> Hashable:
    if isinstance(group, tuple):
        return tuple(_plain_group(part, index) for part in group)
    if getattr(group, "ndim", None) == 0:  # a number of PyTorch or NumPy, which may equal only itself as a key
        group = group.item()
    if group is None or _is_unequal_to_itself(group):
        raise EUAError(
            f"Group {index} is {group!r}, so it is missing, and it is unknown which prompts belong together: name the group of "
            "every prompt, or leave the prompt out."
        )
    if not isinstance(group, Hashable) or isinstance(group, Tensor) or type(group).__eq__ is object.__eq__:
        raise EUAError(
            f"Group {index} is a {type(group).__name__}, which cannot be compared with others: give texts or numbers."
        )
    return group


def _is_unequal_to_itself(group: Any) -> bool:
    """Whether it is NaN or another sign of a missing value."""
    try:
        return bool(group != group)
    except (TypeError, ValueError, RuntimeError):  # the NA of pandas; an array, which is refused for what it is
        return isinstance(group, Hashable) and not isinstance(group, Tensor)


def independent_groups(prompts: Iterable[Hashable], groups: Iterable[Hashable] | None = None) -> list[Hashable]:
    """The group of each prompt, where groups that share a prompt are one; without groups, equal prompts are one group.

    Copies of a prompt have the same score, so they say no more than one of them, in one group or in several.

    >>> independent_groups(["a", "b", "a"])
    [0, 1, 0]
    >>> independent_groups(["a", "b", "a", "c"], ["Ann", "Ann", "Bob", "Cleo"])
    [0, 0, 0, 3]

    Raises:
        EUAError: groups that :func:`group_list` refuses.
    """
    listed = list(prompts)
    owners = list(range(len(listed))) if groups is None else group_list(groups, len(listed))
    parent = list(range(len(listed)))  # of each prompt, the first one that it is known to belong to

    def first(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    for keys in (listed, owners):
        seen: dict[Hashable, int] = {}
        for index, key in enumerate(keys):
            one, other = sorted((first(seen.setdefault(key, index)), first(index)))
            parent[other] = one
    return [first(index) for index in range(len(listed))]


def group_shares(scores: Tensor, threshold: float, groups: Iterable[Hashable]) -> dict[Hashable, float]:
    """The share of each group's scores above the threshold, largest first.

    >>> group_shares(torch.tensor([1.0, 3.0, 3.0]), 2.0, ["Ann", "Ann", "Bob"])
    {'Bob': 1.0, 'Ann': 0.5}

    Raises:
        EUAError: groups that :func:`group_list` refuses.
    """
    above: dict[Hashable, list[bool]] = {}
    for group, score in zip(group_list(groups, len(scores)), scores.tolist(), strict=True):
        above.setdefault(group, []).append(not score <= threshold)  # NaN is refused
    shares = {group: sum(of_group) / len(of_group) for group, of_group in above.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def share_interval(values: Tensor, groups: Iterable[Hashable] | None = None, *, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a share, from whether each of n prompts counts.

    Without groups it is exact (Clopper & Pearson 1934): it contains the share with a probability of at least ``level``. With
    groups, the n prompts count as that number of independent prompts whose share has the same variance, with a correction for
    few groups (Korn & Graubard 1998). If all or none of the prompts count, every group is one observation.

    >>> [round(end, 2) for end in share_interval(torch.ones(20))]
    [0.83, 1.0]

    Args:
        values: (n,), 0 or 1, e.g. whether each forgotten prompt was refused.
        groups: the group of each value. Prompts in different groups are independent of each other.
        level: of confidence, in (0, 1).

    Returns:
        The ends of the interval. For a single group it is (0, 1), since other groups may differ.

    Raises:
        EUAError: if there are no values, or if :func:`group_list` refuses the groups.
    """
    if not len(values):
        raise EUAError("There are no values, so their share has no interval: give at least one.")
    share, size = float(values.double().mean()), float(len(values))
    if groups is not None:
        size = min(size, _effective_size(values.double(), group_list(groups, len(values)), level))
    if size <= 1 < len(values):
        return 0.0, 1.0
    low = 0.0 if share == 0 else _beta_quantile((1 - level) / 2, share * size, (1 - share) * size + 1)
    high = 1.0 if share == 1 else _beta_quantile((1 + level) / 2, share * size + 1, (1 - share) * size)
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


def harmonic_mean(values: Sequence[float]) -> float:
    """``n / Σ 1/x`` of n values; 0 if one of them is 0.

    >>> round(harmonic_mean([0.5, 1.0]), 6)
    0.666667

    Raises:
        EUAError: if there are no values, or if one is negative, for which the mean has no meaning.
    """
    if not values or min(values) < 0:
        raise EUAError(
            f"A harmonic mean of {list(values)} has no meaning: it needs at least one value, and none below 0. Check what was "
            "measured."
        )
    return 0.0 if 0 in values else len(values) / sum(1 / value for value in values)


def _exact_p_value(above: float, count: int, tolerance: float) -> float:
    """Probability that at most ``above`` of ``count`` prompts lie above the threshold if the rate of false refusals is ε."""
    return _binomial_cdf(round(above), count, tolerance)


def _hoeffding_bentkus_p_value(above: float, count: int, tolerance: float) -> float:
    """The same for the mean of shares in [0, 1], one per group (Bates et al. 2021, proposition 5)."""
    mean = min(above / count, tolerance)
    entropy = (1 - mean) * math.log((1 - mean) / (1 - tolerance)) + (mean * math.log(mean / tolerance) if mean else 0.0)
    return min(math.exp(-count * entropy), math.e * _binomial_cdf(math.ceil(above - 1e-9), count, tolerance))


def _effective_size(values: Tensor, groups: Sequence[Hashable], level: float) -> float:
    """The number of independent values that say as much about the mean of a share as these values, which come in groups."""
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index, count = torch.tensor([numbers[group] for group in groups]), len(numbers)
    share = float(values.mean())
    if count == 1 or share in (0, 1):
        return count
    excess = torch.zeros(count, dtype=torch.float64).index_add(0, index, values - share)
    variance = count / (count - 1) * float(excess.square().sum()) / len(values) ** 2
    if variance == 0:
        return len(values)
    correction = _t_quantile((1 + level) / 2, len(values) - 1) / _t_quantile((1 + level) / 2, count - 1)
    return share * (1 - share) / variance * correction**2


def _t_quantile(probability: float, freedom: int) -> float:
    """Of Student's t distribution, by Fisher's expansion about the normal quantile, which is poor for 1 and 2 degrees."""
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z, n = NormalDist().inv_cdf(probability), freedom
    terms = (
        z,
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
    )
    return sum(terms)


def _beta_quantile(probability: float, a: float, b: float) -> float:
    """Of the beta distribution, by summing its density over the logit, in which it has no poles."""
    logit = torch.linspace(-40, 40, 80001, dtype=torch.float64)
    density = (a * nn.functional.logsigmoid(logit) + b * nn.functional.logsigmoid(-logit)).softmax(0)
    return float(logit[min(int((density.cumsum(0) < probability).sum()), len(logit) - 1)].sigmoid())


def _binomial_cdf(most: int, count: int, probability: float) -> float:
    k = torch.arange(most + 1, dtype=torch.float64)
    n = torch.tensor(float(count), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return float((ways + k * math.log(probability) + (n - k) * math.log1p(-probability)).logsumexp(0).exp())
