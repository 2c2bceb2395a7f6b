"""Keeps the measures of every row in a Parquet file, one line per row of a set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eua.data.sources import Row, read_rows
from eua.errors import EUAError
from eua.files import replacing

KEYS = ("set", "row")  # every line has them: the name of the set, and the index of the row in it


def write_results(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the measures of rows as Parquet, completely or not at all.

    >>> write_results(Path("rows.parquet"), [{"set": "forget", "row": 0, "probability": 0.9}])     # doctest: +SKIP

    Args:
        path: the file to write.
        results: one mapping per row, with ``set`` (the name of its set), ``row`` (its index in the set), and measures: numbers,
            texts, or lists of numbers such as ``energies``. A measure may be missing from some rows.

    Raises:
        EUAError: if a line lacks ``set`` or ``row``, if two lines are about the same row, if a measure has values of several
            types, or if the file cannot be written.
    """
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    from pyarrow.parquet import write_table  # type: ignore[import-untyped, unused-ignore]

    _check_keys(results, "results")
    columns = list(dict.fromkeys(key for line in results for key in (*KEYS, *line)))
    try:
        table = pyarrow.table({column: [line.get(column) for line in results] for column in columns})
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise EUAError(
            f"The results for {path} have a measure with values of several types ({error}), which no column can hold: "
            "give each measure one type."
        ) from error
    with replacing(path) as temporary:
        write_table(table, temporary)


def read_results(path: Path) -> list[Row]:
    """The lines that :func:`write_results` wrote, without the measures that a row does not have.

    >>> read_results(Path("rows.parquet"))     # doctest: +SKIP
    [{'set': 'forget', 'row': 0, 'probability': 0.9}]

    Raises:
        EUAError: if the file does not exist, is not Parquet, or does not hold results.
    """
    results = read_rows(Path(path), "results")
    _check_keys(results, f"results in {path}")
    return results


def _check_keys(results: Sequence[Mapping[str, Any]], name: str) -> None:
    seen: set[tuple[Any, ...]] = set()
    for index, line in enumerate(results):
        key = tuple(line.get(name) for name in KEYS)
        if None in key or key in seen:
            why = 'lacks "set" or "row"' if None in key else f"is about row {key[1]} of the set {key[0]!r} again"
            raise EUAError(
                f"Line {index} of the {name} {why}, so it is unknown what it measures: give every row of every set one line."
            )
        seen.add(key)
