"""Splits of rows into those to choose settings on, to report, and to calibrate a guard with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eua.errors import EUAError


def halves(groups: Sequence[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Every second group for validation, the others for the test.

    >>> halves(["Ann", "Ann", "Bob", "Cleo"]) == (frozenset({"Ann", "Cleo"}), frozenset({"Bob"}))
    True

    Raises:
        EUAError: if there is only one group, which cannot be in both.
    """
    distinct = list(dict.fromkeys(groups))
    if len(distinct) < 2:
        raise EUAError(
            f"{len(distinct)} group ({', '.join(distinct)}) cannot be split into one for choosing settings and one for "
            "reporting: give rows of at least two groups (people, authors)."
        )
    return frozenset(distinct[::2]), frozenset(distinct[1::2])


def every_second(rows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Rows that belong to nobody in particular, split into those for validation and those for the test.

    >>> every_second(["a", "b", "c"])
    (['a', 'c'], ['b'])
    """
    return list(rows[::2]), list(rows[1::2])


def half(rows: Sequence[Any], part: int) -> list[Any]:
    """The first or the second half of rows whose neighbours may be about the same thing.

    >>> half(["a", "b", "c"], 0), half(["a", "b", "c"], 1)
    (['a', 'b'], ['c'])
    """
    middle = (len(rows) + 1) // 2
    return list(rows[middle:] if part else rows[:middle])


def spread(rows: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """A share of rows, taken at equal distances, and the others, both in order: for rows that are ordered by subject.

    >>> spread(["a", "b", "c", "d", "e"], 0.4)
    (['c', 'e'], ['a', 'b', 'd'])
    """
    taken = [int((place + 1) * share) > int(place * share) for place in range(len(rows))]
    return [row for row, yes in zip(rows, taken, strict=True) if yes], [
        row for row, yes in zip(rows, taken, strict=True) if not yes
    ]
