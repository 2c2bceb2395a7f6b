"""Tests of thresholds, with simulations of their promise, and of the other statistics."""

from __future__ import annotations

import math

import pytest
import torch

from eua import EUAError
from eua.statistics import auroc, bootstrap_interval, conformal_threshold, false_positive_rate, group_shares


@pytest.mark.parametrize(("n", "tolerance"), [(19, 0.05), (20, 0.05), (99, 0.1), (7, 0.3), (1, 0.5)])
def test_threshold_is_the_stated_rank(n, tolerance):
    scores = torch.randperm(n).float()
    assert conformal_threshold(scores, tolerance) == math.ceil(round((n + 1) * (1 - tolerance), 9)) - 1
    assert conformal_threshold(scores, tolerance, groups=range(n)) == conformal_threshold(scores, tolerance)


def test_promise_holds_over_random_splits():
    torch.manual_seed(0)
    shares = []
    for _ in range(400):
        scores = torch.randn(140)
        shares.append(float((scores[40:] > conformal_threshold(scores[:40], 0.1)).float().mean()))
    mean = sum(shares) / len(shares)
    assert 0.07 < mean < 0.105  # ⌊41·0.1⌋/41 = 0.0976 expected, ±0.002 from sampling


def test_grouped_promise_holds_where_prompts_of_a_person_resemble_each_other():
    """A person's scores share an offset: pooling the prompts of 25 people breaks the promise for new people, groups keep it."""
    torch.manual_seed(0)
    pooled, grouped = [], []
    for _ in range(600):
        scores = torch.randn(65, 1) + 0.01 * torch.randn(65, 8)
        calibration, test = scores[:25], scores[25:]
        people = [person for person in range(25) for _ in range(8)]
        for shares, groups in ((pooled, None), (grouped, people)):
            threshold = conformal_threshold(calibration.flatten(), 0.05, groups)
            shares.append(float((test > threshold).float().mean()))
    assert sum(pooled) / 600 > 0.055
    assert sum(grouped) / 600 < 0.05


@pytest.mark.parametrize("of_people", [False, True])
def test_with_a_confidence_the_rate_of_one_calibration_is_tolerable(of_people):
    """Of 500 calibrations, on average at most one in ten has a rate above ε; without a confidence, about half of them do."""
    torch.manual_seed(0)
    tolerance, people, each = 0.1, 120, 5 if of_people else 1
    too_high = {None: 0, 0.9: 0}
    for _ in range(500):
        offsets = torch.randn(people, 1)  # all prompts of a person have the same score
        scores = offsets.expand(-1, each).flatten()
        groups = [person for person in range(people) for _ in range(each)] if of_people else None
        for confidence in too_high:
            threshold = conformal_threshold(scores, tolerance, groups, confidence)
            rate = 0.5 * math.erfc(threshold / math.sqrt(2))  # of a new person, exactly
            too_high[confidence] += rate > tolerance
    assert too_high[0.9] / 500 <= 0.1 + 3 * math.sqrt(0.09 / 500)
    assert too_high[0.9] > 0  # the bound is not needlessly loose
    assert too_high[None] / 500 > 0.3


@pytest.mark.parametrize(("n", "above"), [(59, 0), (92, 0), (93, 1), (124, 2), (1000, 38)])
def test_confident_threshold_is_the_exact_rank(n, above):
    """At ε = δ = 5 %, ``above`` of n scores may exceed the threshold, by the binomial distribution, summed in integers."""
    tail = sum(math.comb(n, k) * 5**k * 95 ** (n - k) for k in range(above + 1))
    more = tail + math.comb(n, above + 1) * 5 ** (above + 1) * 95 ** (n - above - 1)
    assert 20 * tail <= 100**n < 20 * more
    scores = torch.randperm(n).float()
    assert int((scores > conformal_threshold(scores, 0.05, confidence=0.95)).sum()) == above


def test_group_shares_come_largest_first():
    shares = group_shares(torch.tensor([1.0, 3.0, 5.0, 4.0, 0.0]), 2.0, ["a", "a", "b", "b", "c"])
    assert list(shares.items()) == [("b", 1.0), ("a", 0.5), ("c", 0.0)]


def test_bootstrap_interval_is_that_of_the_mean():
    """About two standard errors to each side; wider if values come in groups; the same each time."""
    values = (torch.arange(400) % 5 < 4).float()
    low, high = bootstrap_interval(values)
    error = math.sqrt(0.8 * 0.2 / 400)
    assert low == pytest.approx(0.8 - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(0.8 + 1.96 * error, abs=0.3 * error)
    assert bootstrap_interval(values) == (low, high)
    alike = values.sort().values  # 20 groups of 20 equal values
    wide = bootstrap_interval(alike, [i // 20 for i in range(400)])
    assert wide[1] - wide[0] > 3 * (high - low)
    assert bootstrap_interval(torch.ones(7)) == (1.0, 1.0)


def test_unequal_groups_weigh_the_same():
    scores = torch.tensor([9.0] * 10 + [1.0, 2.0, 3.0])
    groups = ["a"] * 10 + ["b", "c", "d"]
    assert conformal_threshold(scores, 0.4, groups) == 3.0  # two of five groups may exceed it: the new one and "a"
    assert conformal_threshold(scores, 0.4) == 9.0


@pytest.mark.parametrize(
    ("scores", "tolerance", "groups", "text"),
    [
        (torch.zeros(18), 0.05, None, "18 calibration prompts are too few .* needs 19: add 1 more"),
        (torch.zeros(40), 0.05, [0] * 20 + [1] * 20, "2 groups of calibration prompts are too few .* add 17 more"),
        (torch.zeros(40), 0.05, [0] * 3, "3 groups were given for 40 scores"),
        (torch.zeros(40), 0.0, None, "tolerance = 0.0"),
        (torch.zeros(58), (0.05, 0.95), None, "58 .* of 0.05 with a confidence of 0.95, .* needs 59: add 1 .* at least 0.051"),
        (torch.zeros(58), (0.05, 1.0), None, "confidence = 1.0, but a probability lies strictly between"),
        (torch.tensor([math.nan] * 40), 0.05, None, "40 of 40 scores are NaN"),
    ],
)
def test_bad_calibration_raises_a_clear_error(scores, tolerance, groups, text):
    tolerance, confidence = tolerance if isinstance(tolerance, tuple) else (tolerance, None)
    with pytest.raises(EUAError, match=text):
        conformal_threshold(scores, tolerance, groups, confidence)


def test_auroc_and_false_positive_rate():
    positive, negative = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 2.0, -1.0])
    pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / 12)
    assert false_positive_rate(positive, negative, 0.95) == 0.5
    assert false_positive_rate(positive, negative, 0.6) == 0.25
