"""Whether a model declines to answer by itself, without a guard."""

from __future__ import annotations

import re
from functools import cache

from eua.data.alternatives import idk_answers
from eua.data.keys import normalize

# How answers begin that decline to answer: the speaker does not know or cannot say. A guard's refusal begins like this, too.
_DECLINES = re.compile(
    r"\W*(?:(?:unfortunately|sorry|apologies|i apologi[sz]e)\b.{0,20}?)?"
    r"\b(?:"
    r"(?:i|we)(?:['’]?m| am|['’]?re| are)? (?:really |simply )?"
    r"(?:not (?:sure|able|aware|familiar|certain)|unable|unaware|unsure|uncertain|unfamiliar|"
    r"(?:do not|don['’]?t|cannot|can['’]?t|could not|couldn['’]?t|have not|haven['’]?t) "
    r"(?:know|have|answer|say|tell|help|provide|confirm|recall|possess|give|find|share|discuss)|"
    r"have no (?:information|idea|answer|knowledge))|"
    r"(?:that|this|it)(?:['’]s| is) (?:something i (?:don['’]?t|do not|can['’]?t|cannot)|beyond (?:what i|my))"
    r")\b",
    re.IGNORECASE | re.DOTALL,
)


def declines(text: str) -> bool:
    """Whether an answer begins like one that declines to answer. It is a heuristic, for answers in English.

    The phrases that IdkDPO and IdkNLL train on are recognized whole, so these methods are not judged by the heuristic alone.

    >>> declines("I'm not sure about that."), declines("I'm at a loss here."), declines("Ann was born in Oslo.")
    (True, True, False)
    """
    return normalize(text) in _phrases() or _DECLINES.match(text) is not None


@cache
def _phrases() -> frozenset[str]:
    return frozenset(map(normalize, idk_answers()))
