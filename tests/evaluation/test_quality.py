"""Aggregates have the values of OpenUnlearning's code and paper."""

from __future__ import annotations

import builtins
import warnings

import pytest
import torch

from eua import EUAError
from eua.evaluation.quality import (
    chooses_right,
    forget_quality,
    memorization_score,
    model_utility,
    probability_with_options,
    right_answer_share,
)

NLL = [torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0.5, 0.2, 0.4])]  # of a right and two wrong answers


def test_shares_of_the_right_answer_have_openunlearnings_values():
    options = [float(probability_with_options(row)) for row in NLL]
    assert options == pytest.approx([0.468311, 0.289433], abs=1e-6)
    shares = [float(right_answer_share(row)) for row in NLL]
    assert sum(shares) / 2 == pytest.approx(0.590612, abs=1e-6)
    impossible = torch.tensor([800.0, 790.0])
    assert probability_with_options(impossible) == right_answer_share(impossible) == 0


def test_the_right_answer_is_chosen_if_it_is_likelier_than_every_other():
    assert [float(chooses_right(row)) for row in NLL] == [0, 0]  # a tie, and the least likely
    assert chooses_right(torch.tensor([0.1, 0.2, 0.4])) == 1
    assert chooses_right(torch.tensor([0.1, torch.nan])).isnan()
    assert chooses_right(torch.tensor([torch.nan, 0.2])).isnan()


def test_forget_quality_is_scipys_exact_p_value():
    ratios = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    retain = torch.tensor([0.3, 0.5, 0.6, 0.7, 0.8])
    assert forget_quality(ratios, retain) == pytest.approx(0.357143, abs=1e-6)
    assert forget_quality(ratios.exp(), retain.exp()) == forget_quality(ratios, retain)
    assert forget_quality(retain, retain.flip(0)) == 1
    assert forget_quality(ratios, ratios + 1) < 0.01
    with pytest.raises(EUAError, match="retain_truth_ratios has 0 values, .*: give the truth ratio"):
        forget_quality(ratios, torch.tensor([]))
    with pytest.raises(EUAError, match="truth_ratios has 1 values, 1 of which are NaN"):
        forget_quality(torch.tensor([float("nan")]), ratios)


def test_forget_quality_warns_of_nothing_where_the_exact_value_is_rounded_above_1():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forget_quality(torch.arange(200.0), torch.arange(200) + 0.5) == pytest.approx(1, abs=1e-9)


def test_missing_scipy_is_explained(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "scipy":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EUAError, match=r"scipy, .*, is not installed: pip install \"eua\[bench\]\""):
        forget_quality(torch.tensor([0.1]), torch.tensor([0.2]))


def test_model_utility_is_the_harmonic_mean_of_nine():
    sets = [
        {"probability": 0.9, "rouge_l_recall": 0.8, "truth_ratio_openunlearning": 0.5, "rows": 3},
        {"probability": 0.1, "probability_with_options": 0.6, "rouge_l_recall": 0.7, "truth_ratio_openunlearning": 0.4},
        {"probability": 0.1, "probability_with_options": 0.5, "rouge_l_recall": 0.9, "truth_ratio_openunlearning": 0.3},
    ]
    assert model_utility(sets) == pytest.approx(0.548754, abs=1e-6)
    assert model_utility([*sets[:2], sets[2] | {"rouge_l_recall": 0.0}]) == 0
    with pytest.raises(EUAError, match="A harmonic mean of .* has no meaning"):
        model_utility([sets[0] | {"probability": -0.1}])
    with pytest.raises(EUAError, match="Set 1 has no rouge_l_recall and no truth_ratio_openunlearning, .*: measure the set"):
        model_utility([sets[0], {"probability": 0.5}])


def test_memorization_score_has_the_published_value():
    forgotten = (0.320792, 0.031896, 0.895197, 0.317752)  # 1 − x
    assert memorization_score(*(1 - x for x in forgotten)) == pytest.approx(0.103270, abs=1e-6)
    assert memorization_score(1.0, 0.5, 0.5, 0.5) == 0
    assert memorization_score(0, 0, 0, 0) == 1
