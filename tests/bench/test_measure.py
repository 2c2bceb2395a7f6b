"""The parts of the report that the benchmark adds to what :mod:`eua.evaluation` measures."""

from __future__ import annotations

import math

import pytest

from eua.bench.measure import _add_membership, _finite, declines
from eua.evaluation.membership import PRIVACY_SCORES
from eua.evaluation.retain_model import RetainFigures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I don't know.", True),
        ("I’m not sure about that one.", True),
        ("Unfortunately, I have no information on this author.", True),
        ("That is beyond what I can say, sorry.", True),
        ("Ann was born in Oslo.", False),
        ("I was born in Oslo.", False),
        ("He did not know that it was late.", False),
        ("", False),
    ],
)
def test_answers_that_decline(text, expected):
    assert declines(text) is expected


def test_members_that_are_in_no_set_are_reported_as_if_they_were():
    report = {"membership_auc": {}, "aggregates": {"forget_quality": 0.5}, "left_out": {"privacy_leakage": "…", "fluency": "…"}}
    _add_membership(report, dict.fromkeys(PRIVACY_SCORES, 0.7), RetainFigures(None, dict.fromkeys(PRIVACY_SCORES, 0.4), None))
    assert report["membership_auc"]["min_k"] == 0.7
    assert report["aggregates"] == {
        "forget_quality": 0.5,
        "privacy_leakage": pytest.approx(-50.0),
        "privacy_score": pytest.approx(0.25),
    }
    assert report["left_out"] == {"fluency": "…"}
    _add_membership(report, dict.fromkeys(PRIVACY_SCORES, 0.7), None)
    assert report["aggregates"]["privacy_leakage"] == pytest.approx(-40.0)  # relative to 0.5, without a retain model


def test_results_are_json():
    assert _finite({"a": {"b": math.nan, "c": 1.5}, "d": math.inf, "e": "x"}) == {
        "a": {"b": None, "c": 1.5},
        "d": None,
        "e": "x",
    }
