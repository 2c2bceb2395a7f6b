"""Reads the rows of published benchmarks, from a data set on the hub or from a folder of files of the same names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from eua.data.sources import READ_SUFFIXES, Row, read_rows
from eua.errors import EUAError

PROMPT_WORDS, ANSWER_WORDS = 32, 96  # of a piece of a text to train on: what is given, and what follows


def published_rows(data: str, config: str, split: str, keys: Sequence[str]) -> list[Row]:
    """The rows of a configuration and split of a data set, each with the given keys.

    ``data`` is a name on the hub, a folder of the same layout, or a folder with a file for each configuration, such as
    ``forget10.jsonl``, or for each split of it, such as ``knowmem/forget_qa.jsonl`` or ``knowmem_forget_qa.parquet``.

    >>> published_rows("locuslab/TOFU", "forget10", "train", ("question", "answer"))      # doctest: +SKIP

    Raises:
        EUAError: if there are no such rows, or if one lacks a key.
    """
    name = f"{config}, {split}"
    rows = read_rows(_file(Path(data), config, split) or f"{data}:{config}:{split}", name)
    for index, row in enumerate(rows):
        missing = [key for key in keys if key not in row]
        if missing:
            raise EUAError(
                f"Row {index} of {name} in {data} has the keys {', '.join(row)}, but not {' and '.join(missing)}, which the "
                "published rows have: give the data set of the benchmark, or rename the keys."
            )
    return rows


def rows_if_any(data: str, config: str, split: str, keys: Sequence[str]) -> list[Row]:
    """The same, or no rows if a folder of files does not have them."""
    if Path(data).is_dir() and _file(Path(data), config, split) is None:
        return []
    return published_rows(data, config, split, keys)


def _file(folder: Path, config: str, split: str) -> Path | None:
    stems = [f"{config}/{split}", f"{config}_{split}", *([config] if split == "train" else [])]
    candidates = (folder / f"{stem}{suffix}" for stem in stems for suffix in READ_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def pieces(texts: Sequence[str], limit: int | None = None) -> list[dict[str, str]]:
    """Texts as rows to train on: the first words of every piece are its prompt, the others its answer.

    >>> pieces(["one two"]), len(pieces(["word " * 300]))
    ([], 3)

    Args:
        texts: a rest of a text that is too short for both is left out.
        limit: the largest number of rows; None: all.
    """
    found: list[dict[str, str]] = []
    for text in texts:
        words = text.split()
        for part in _parts(words):
            if limit is not None and len(found) >= limit:
                return found
            found.append({"prompt": " ".join(part[:PROMPT_WORDS]), "completion": " " + " ".join(part[PROMPT_WORDS:])})
    return found


def _parts(words: Sequence[str]) -> Iterator[Sequence[str]]:
    size = PROMPT_WORDS + ANSWER_WORDS
    for start in range(0, len(words), size):
        part = words[start : start + size]
        if len(part) > PROMPT_WORDS:
            yield part
