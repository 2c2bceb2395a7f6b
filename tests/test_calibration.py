"""Thresholds, and the promise they make, by simulation."""

from __future__ import annotations

import math

import pytest
import torch

from eua import EUAError
from eua.calibration import conformal_threshold
from eua.separation import auroc, false_positive_rate


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
    """Scores share a person's offset: pooling 25 people's prompts breaks the promise for new people, groups keep it."""
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


def test_unequal_groups_weigh_the_same():
    scores = torch.tensor([9.0] * 10 + [1.0, 2.0, 3.0])
    groups = ["a"] * 10 + ["b", "c", "d"]
    assert conformal_threshold(scores, 0.4, groups) == 3.0  # of five shares two may go: the new group's, and all of a's
    assert conformal_threshold(scores, 0.4) == 9.0


@pytest.mark.parametrize(
    ("scores", "tolerance", "groups", "text"),
    [
        (torch.zeros(18), 0.05, None, "18 calibration prompts are too few .* needs 19: add 1 more"),
        (torch.zeros(40), 0.05, [0] * 20 + [1] * 20, "2 groups of calibration prompts are too few .* add 17 more"),
        (torch.zeros(40), 0.05, [0] * 3, "3 groups were given for 40 scores"),
        (torch.zeros(40), 0.0, None, "tolerance = 0.0"),
        (torch.tensor([math.nan] * 40), 0.05, None, "40 of 40 scores are NaN"),
    ],
)
def test_bad_calibration_is_told_what_is_wrong(scores, tolerance, groups, text):
    with pytest.raises(EUAError, match=text):
        conformal_threshold(scores, tolerance, groups)


def test_auroc_and_false_positive_rate():
    positive, negative = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 2.0, -1.0])
    pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / 12)
    assert false_positive_rate(positive, negative, 0.95) == 0.5
    assert false_positive_rate(positive, negative, 0.6) == 0.25
