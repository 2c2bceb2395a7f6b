"""Answers that decline to answer are recognized, whatever their wording."""

from __future__ import annotations

import pytest

from eua.data.alternatives import idk_answers
from eua.evaluation.declining import declines


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
        ("It is set in a world beyond the stars.", False),
        ("My book cannot be bought anymore.", False),
        ("I wrote that I don't have a home.", False),
        ("", False),
    ],
)
def test_answers_that_decline(text, expected):
    assert declines(text) is expected


@pytest.mark.parametrize("text", idk_answers())
def test_every_phrase_that_methods_train_on_counts_as_declining(text):
    assert declines(text)
    assert declines(f" {text.rstrip('.').upper()}")
