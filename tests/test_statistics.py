"""Tests of thresholds, with simulations of their promise, and of the other statistics."""

from __future__ import annotations

import math

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eua import EUAError, statistics
from eua.statistics import (
    _exact_p_value,
    _hoeffding_bentkus_p_value,
    auroc,
    conformal_threshold,
    false_positive_rate,
    group_list,
    group_shares,
    harmonic_mean,
    independent_groups,
    share_interval,
)


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


def exact_coverage(share: float, size: int) -> float:
    """The probability that the interval contains the share, summed over all outcomes."""
    covered = 0.0
    for count in range(size + 1):
        low, high = share_interval((torch.arange(size) < count).float())
        covered += (low <= share <= high) * math.comb(size, count) * share**count * (1 - share) ** (size - count)
    return covered


@pytest.mark.parametrize("size", [20, 60, 200])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_interval_of_single_prompts_contains_their_share_often_enough(share, size):
    assert 0.95 <= exact_coverage(share, size) < 0.999
    assert share_interval(torch.ones(size)) == (pytest.approx(0.025 ** (1 / size), abs=1e-3), 1.0)
    assert share_interval(torch.zeros(size)) == (0.0, pytest.approx(1 - 0.025 ** (1 / size), abs=1e-3))


@pytest.mark.parametrize(("groups", "each"), [(10, 10), (20, 1), (20, 10), (40, 5)])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("alike", [0.02, 0.3, 0.98], ids=["independent", "similar", "alike"])
def test_the_interval_of_groups_contains_the_share_of_new_ones_often_enough(share, alike, groups, each):
    """A group's share is drawn from a beta distribution whose intraclass correlation is ``alike``."""
    torch.manual_seed(0)
    runs, owners = 300, [i // each for i in range(groups * each)]
    a, b = (torch.tensor(x * (1 / alike - 1)) for x in (share, 1 - share))
    covered = 0
    for _ in range(runs):
        of_groups = torch.distributions.Beta(a, b).sample((groups,))
        values = (torch.rand(groups, each) < of_groups[:, None]).float().flatten()
        low, high = share_interval(values, owners)
        covered += low <= share <= high
    assert covered / runs > 0.95 - 3 * math.sqrt(0.05 * 0.95 / runs)


def test_the_interval_of_groups_is_as_wide_as_they_are_alike():
    values = (torch.arange(400) % 5 < 4).float()
    low, high = share_interval(values)
    error = math.sqrt(0.8 * 0.2 / 400)
    assert (low, high) == (pytest.approx(0.8 - 1.96 * error, abs=4e-3), pytest.approx(0.8 + 1.96 * error, abs=4e-3))
    same = share_interval(values, range(400))
    assert same == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))
    wide = share_interval(values.sort().values, [i // 20 for i in range(400)])  # 20 groups of 20 equal values
    assert wide[1] - wide[0] > 3 * (high - low)
    assert share_interval(torch.ones(100), [i // 10 for i in range(100)]) == share_interval(torch.ones(10))
    assert share_interval(torch.ones(7), ["Ann"] * 7) == (0.0, 1.0)  # nothing is known about anyone else
    with pytest.raises(EUAError, match="There are no values"):
        share_interval(torch.empty(0))


# ---- groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [lambda: torch.tensor(7), lambda: np.int64(7), lambda: np.array(7), lambda: ("author", torch.tensor(7))]
)
def test_groups_are_the_same_if_their_values_are(number):
    assert len(set(group_list([number() for _ in range(25)], 25))) == 1


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (math.nan, "Group 3 is nan, so it is missing"),
        (None, "Group 3 is None, so it is missing"),
        (pandas.NA, "Group 3 is <NA>, so it is missing"),
        (pandas.NaT, "Group 3 is NaT, so it is missing"),
        (torch.tensor(math.nan), "Group 3 is nan, so it is missing"),
        (("Ann", math.nan), "Group 3 is nan, so it is missing"),
        ([1], "Group 3 is a list, which cannot be compared"),
        (torch.ones(2), "Group 3 is a Tensor, which cannot be compared"),
        (object(), "Group 3 is a object, which cannot be compared"),
    ],
)
def test_groups_that_are_missing_or_equal_only_themselves_are_refused(group, text):
    with pytest.raises(EUAError, match=text):
        conformal_threshold(torch.zeros(25), 0.05, [0, 1, 2, group, *range(4, 25)])


def test_copies_of_a_prompt_are_one_observation():
    assert independent_groups(["a", "b", "a", "c", "b"]) == [0, 1, 0, 3, 1]
    assert independent_groups(["a", "b", "c", "b", "d"], ["Ann", "Ann", "Bob", "Bob", "Cleo"]) == [0, 0, 0, 0, 4]
    assert independent_groups("abcd", list("xyzx")) == [0, 1, 2, 0]


def test_a_score_that_is_not_a_number_counts_as_refused():
    assert group_shares(torch.tensor([math.nan, 0.0]), 1.0, ["Ann", "Bob"]) == {"Ann": 1.0, "Bob": 0.0}


@given(
    scores=st.lists(st.integers(0, 6), min_size=8, max_size=40),
    people=st.integers(4, 40),
    grouped=st.booleans(),
    tolerance=st.sampled_from([0.2, 0.35, 0.5]),
    confidence=st.sampled_from([0.5, 0.8, 0.9]),
)
def test_the_confident_threshold_is_found_as_by_trying_all(scores, people, grouped, tolerance, confidence):
    values = torch.tensor(scores).float()
    groups = [i % people for i in range(len(scores))] if grouped else None
    try:
        found = conformal_threshold(values, tolerance, groups, confidence)
    except EUAError:
        return  # too few
    owners = groups or list(range(len(scores)))
    count = len(set(owners))
    weights = [1 / owners.count(owner) for owner in owners]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    p_value = _hoeffding_bentkus_p_value if grouped else _exact_p_value
    above = [sum(weights[i] for i in order[:place]) for place in range(len(order))]
    allowed = [values[i] for i, w in zip(order, above, strict=True) if p_value(w, count, tolerance) <= 1 - confidence + 1e-9]
    assert found == min(allowed)


def test_a_confident_threshold_of_many_prompts_takes_no_minutes(monkeypatch):
    tried = []
    exact = statistics._exact_p_value
    monkeypatch.setattr(statistics, "_exact_p_value", lambda *of: tried.append(of) or exact(*of))
    conformal_threshold(torch.randn(16_000), 0.05, confidence=0.95)
    assert len(tried) < 20


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


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (30, 2.042)])
def test_quantiles_of_the_t_distribution(freedom, quantile):
    """Values from printed tables, two-sided 95 %."""
    assert statistics._t_quantile(0.975, freedom) == pytest.approx(quantile, rel=0.01)


def test_harmonic_means():
    assert harmonic_mean([2.0]) == 2
    assert harmonic_mean([0.5, 1.0]) == pytest.approx(2 / 3)
    assert harmonic_mean([0.0, 1.0]) == 0
    for wrong in ([], [1.0, -0.5]):
        with pytest.raises(EUAError, match=r"has no meaning: it needs at least one value, .* Check what was measured"):
            harmonic_mean(wrong)
