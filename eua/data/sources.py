"""Reads rows and prompts from files, data sets and objects in memory, for every public function that takes them.

A source of rows is one of

- the path of a file, as a string or a ``Path``: JSONL, a JSON array, CSV or Parquet; text in UTF-8, with or without a byte
  order mark;
- the name of a data set on the Hugging Face Hub, ``name``, ``name:config`` or ``name:config:split`` (``name::split`` if there
  is one configuration), e.g. ``"locuslab/TOFU:forget10:train"``; a folder of the same layout has the same syntax;
- a ``datasets.Dataset`` or ``IterableDataset``, or a ``DatasetDict`` of one split;
- a pandas ``DataFrame``;
- a list, or any other iterable, of mappings.

A string is never a list of letters: it is a file or a data set or, for functions that ask questions, one question.

Many formats store an empty value for a key that a row lacks, so these values count as absent: ``None`` (of a column, or of a
key within a chat message), a missing cell of a ``DataFrame`` (NaN, ``pandas.NA``), and an empty cell of a CSV file. CSV cells
are texts and stay unchanged: ``007`` is not a number, and ``NA`` and ``null`` are words. A CSV column without a name is left
out; pandas writes its index as one.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from eua.errors import EUAError

# datasets and pyarrow take seconds to import, so the functions that need one of them import it: `import eua` does not.

ROW_FORMATS = '"question"/"answer", "prompt"/"completion", or "messages" that end with the assistant\'s'
ROW_KEYS = frozenset({"question", "prompt", "messages"})  # every format has one of them
EXAMPLE_NAME = "locuslab/TOFU:forget10:train"
READ_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
# Files that are not read. A string that ends with one of these suffixes is still a path, and is never sent to the hub.
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
OTHER_SUFFIXES = (*COMPRESSED, ".tsv", ".txt", ".md", ".xls", ".xlsx", ".arrow", ".pkl", ".yaml", ".py")
_JSON_ERRORS = (ValueError, RecursionError)  # not JSON, a number of too many digits; too many brackets in each other
_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


class DataFrame(Protocol):
    """The part of a pandas ``DataFrame`` that is used here."""

    def to_dict(self, orient: Any) -> Any: ...


Row: TypeAlias = Mapping[str, Any]
Source: TypeAlias = str | os.PathLike[str] | Iterable[Row] | Mapping[str, Iterable[Row]] | DataFrame
Prompts: TypeAlias = Source | Iterable[Row | str]


def read_rows(source: Source, name: str = "dataset") -> list[Row]:
    """Read the rows of a file, a data set on the hub or in memory, a ``DataFrame`` or a list, see :mod:`eua.data.sources`.

    >>> read_rows([{"question": "Who?", "answer": "Ann.", "topic": None}])
    [{'question': 'Who?', 'answer': 'Ann.'}]

    Args:
        source: where the rows are. A ``Path`` is a file or a folder, never a name on the hub.
        name: what error messages call the rows.

    Raises:
        EUAError: if the source does not exist, cannot be read, is empty, or contains something that is not a row.
    """
    rows = []
    for index, item in enumerate(_items(source, name)):
        if not isinstance(item, Mapping):
            raise EUAError(f"Row {index} of the {name} is {_a(item)}, not a mapping: give {ROW_FORMATS}.")
        rows.append(_row(item, index, name))
    return _not_empty(rows, name)


def read_prompts(prompts: Prompts, name: str = "prompts", *, string_is_question: bool = False) -> list[Row | str]:
    """Read prompts (questions as strings, rows, or both) from the sources of :func:`read_rows`.

    >>> read_prompts(["Who?", {"question": "Where?"}])
    ['Who?', {'question': 'Where?'}]

    Args:
        prompts: where the prompts are.
        name: what error messages call the prompts.
        string_is_question: whether one string as ``prompts`` is a question rather than a file or a data set.

    Raises:
        EUAError: as in :func:`read_rows`, and if a string is ambiguous: a path where a question is expected, or a list of paths
            where one path is expected.
    """
    if string_is_question and isinstance(prompts, str):
        if _ends_as_file(prompts) and not re.search(r"\s", prompts):
            raise EUAError(
                f"{prompts!r} was given as the {name}, which names a file, but one string is one question here: pass "
                f"Path({prompts!r}) to read the file, or [{prompts!r}] to ask this question."
            )
        return [prompts]
    read: list[Row | str] = []
    for index, item in enumerate(_items(prompts, name)):
        if isinstance(item, Mapping):
            read.append(_row(item, index, name))
        elif not isinstance(item, str):
            raise EUAError(
                f"Row {index} of the {name} is {_a(item)}, neither a question nor a row: give texts, or {ROW_FORMATS}."
            )
        elif not string_is_question and _names_a_source(item):
            raise EUAError(
                f"Row {index} of the {name} is {item!r}, which names a file or a data set, but strings in a list are "
                "questions: pass one name without a list, or the rows that eua.data.sources.read_rows returns."
            )
        else:
            read.append(item)
    return _not_empty(read, name)


def _not_empty(rows: list[Any], name: str) -> list[Any]:
    if not rows:
        are = "are" if name.endswith("s") else "is"
        raise EUAError(f"The {name} {are} empty, so there is nothing to train on or to measure: give at least one row.")
    return rows


def _row(item: Mapping[Any, Any], index: int, name: str) -> Row:
    for key in item:
        if not isinstance(key, str):
            raise EUAError(
                f"Row {index} of the {name} has the key {key!r}, which is not a text: name the columns {ROW_FORMATS}."
            )
    try:
        row: Row = _present(item)
    except RecursionError as error:
        raise EUAError(
            f"Row {index} of the {name} has values inside each other, too deep to read: leave them out of the row."
        ) from error
    return row


def _present(value: Any) -> Any:
    """The value in plain Python types, without keys whose value is None, at any depth."""
    if isinstance(value, Mapping):
        row = {key: _present(part) for key, part in value.items() if part is not None}
        if _is_in_parts(row.get("content")):  # as some data sets and clients write a text
            row["content"] = "".join(part["text"] for part in row["content"])
        return row
    if isinstance(value, (list, tuple)):
        return [_present(part) for part in value]
    if type(value).__module__ == "numpy":  # an array or a scalar
        return _present(value.tolist())
    return value


def _is_in_parts(content: Any) -> bool:
    """Whether a message's content is a list of ``{"type": "text", "text": …}``."""
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    )


def _a(item: Any) -> str:
    kind = type(item).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def _given(item: Any) -> str:
    text = _a(item)
    return text[0].upper() + text[1:]


# ---- what is in memory ----------------------------------------------------------------------------------------------


def _items(source: Any, name: str) -> Iterable[Any]:
    """The items of a source, not yet checked to be rows."""
    if isinstance(source, str):
        return _read_named(source, name)
    if isinstance(source, os.PathLike):
        return _read_path(os.fspath(source), name)
    if _is_of(source, "datasets", "DatasetDict", "IterableDatasetDict"):
        source = _only_split(source, name)
    if _is_of(source, "datasets", "Dataset", "IterableDataset"):
        return source.with_format(None)  # texts, numbers and lists, not arrays or tensors
    if _is_of(source, "pandas", "DataFrame"):
        return _read_frame(source, name)
    if isinstance(source, Mapping):
        raise EUAError(
            f"One mapping with the keys {_listed(source)} was given as the {name}, but rows are expected: give a list of "
            "mappings, one for each row (datasets.Dataset.from_dict turns columns into rows)."
        )
    if isinstance(source, (bytes, bytearray, io.IOBase)) or not _is_iterable(source):
        raise EUAError(
            f"{_given(source)} was given as the {name}, which contains no rows: give the path of a "
            f"file ({', '.join(READ_SUFFIXES)}), the name of a data set on the hub, a Dataset, a DataFrame, or a list of rows."
        )
    return source


def _is_of(source: Any, library: str, *classes: str) -> bool:
    """Whether ``source`` is an instance of a class of a library, which is imported if such an object exists."""
    loaded = sys.modules.get(library)  # it may be another module of that name, without these classes
    found = [getattr(loaded, name, None) for name in classes]
    return isinstance(source, tuple(kind for kind in found if isinstance(kind, type)))


def _is_iterable(source: Any) -> bool:
    try:
        iter(source)
    except TypeError:
        return False
    return True


def _only_split(splits: Mapping[str, Any], name: str) -> Any:
    if len(splits) != 1:
        raise EUAError(
            f"A {type(splits).__name__} of the splits {_listed(splits)} was given as the {name}, but rows come from "
            f"a single split: pass one, e.g. dataset[{next(iter(splits), 'train')!r}]."
        )
    return next(iter(splits.values()))


def _read_frame(frame: Any, name: str) -> list[dict[str, Any]]:
    if not frame.columns.is_unique:
        twice = sorted({str(column) for column in frame.columns[frame.columns.duplicated()]})
        raise EUAError(
            f"A DataFrame with several columns named {', '.join(twice)} was given as the {name}, but a row has one value "
            "per key: rename or drop all but one."
        )
    rows = zip(frame.to_dict("records"), frame.notna().to_dict("records"), strict=True)
    return [{key: cell for key, cell in row.items() if is_there[key]} for row, is_there in rows]


# ---- files ----------------------------------------------------------------------------------------------------------


def _read_file(path: Path, name: str) -> list[Any]:
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        raise EUAError(f"{path}, given as the {name}, is compressed, and compressed files cannot be read: unpack it first.")
    if suffix == ".parquet":
        return _read_parquet(path, name)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EUAError(f"{path}, given as the {name}, is not UTF-8 text ({error}): save it as UTF-8.") from None
    except OSError as error:
        raise EUAError(f"{path}, given as the {name}, cannot be read ({error}): check the file and its permissions.") from error
    return _read_csv(text, path, name) if suffix == ".csv" else _read_json(text, path, name)


def _read_json(text: str, path: Path, name: str) -> list[Any]:
    """Rows of an array, or of one value per line. The text decides which of the two it is, not the suffix of the file."""
    start = text.lstrip()[:1]
    try:
        whole = json.loads(text)
    except _JSON_ERRORS as error:
        if start != "[":
            return _read_json_lines(text, path, name)
        line = f"Line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "A line"
        raise EUAError(
            f"{line} of the {name} {path} is not JSON ({error}): correct it, or give one JSON object per line."
        ) from None
    if isinstance(whole, list):
        return whole
    holds_others = isinstance(whole, dict) and any(isinstance(value, (list, dict)) for value in whole.values())
    if holds_others and not ROW_KEYS & whole.keys():
        raise EUAError(
            f"{path}, given as the {name}, is one JSON object with the keys {_listed(whole)}, not rows: save the "
            "list of rows in it as a JSON array, or one row per line."
        )
    return [whole]


def _read_json_lines(text: str, path: Path, name: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except _JSON_ERRORS as error:
            raise EUAError(f"Line {number} of the {name} {path} is not JSON ({error}): give one object per line.") from None
    return rows


def _read_csv(text: str, path: Path, name: str) -> list[dict[str, str | None]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    rows: list[dict[str, str | None]] = []
    try:
        for cells in reader:
            if not cells:
                continue  # an empty line
            if not columns:
                columns = cells
                _check_columns(columns, path, name)
            elif len(cells) != len(columns):
                raise EUAError(
                    f"Line {reader.line_num} of the {name} {path} ends a row of {len(cells)} cells under {len(columns)} "
                    f"columns ({', '.join(columns)}): put cells that contain a comma or a line break in double quotes."
                )
            else:
                rows.append({key: cell or None for key, cell in zip(columns, cells, strict=True) if key})
    except csv.Error as error:
        raise EUAError(
            f"Line {reader.line_num} of the {name} {path} is not CSV ({error}): correct it, or save the rows as JSONL."
        ) from None
    return rows


def _check_columns(columns: list[str], path: Path, name: str) -> None:
    twice = sorted({column for column in columns if column and columns.count(column) > 1})
    if twice:
        raise EUAError(
            f"{path}, given as the {name}, has several columns named {', '.join(twice)}: rename or remove all but one."
        )
    if not ROW_KEYS & set(columns):
        raise EUAError(
            f"The first line of the {name} {path} names the columns {_listed(columns)}, which are not a known format: "
            'name them in the first line, separated by commas, e.g. "question,answer".'
        )


def _read_parquet(path: Path, name: str) -> list[Any]:
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped, unused-ignore]

    try:
        with ParquetFile(path) as file:  # not read_table, which turns folders named key=value into columns
            rows: list[Any] = file.read().to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise EUAError(f"{path}, given as the {name}, cannot be read as Parquet ({_reason(error)}): save it again.") from error
    return rows


# ---- names ----------------------------------------------------------------------------------------------------------


def _read_named(text: str, name: str) -> Iterable[Any]:
    """The rows of a file, a folder or a data set on the hub, named by a string."""
    if _exists(text) or _looks_like_file(text):
        return _read_path(text, name)
    place, config, split = _parts(text)
    if not _HUB_NAME.fullmatch(place):
        raise EUAError(
            f"{text!r}, given as the {name}, is not a file on this machine, and cannot be the name of a data set on "
            f'the hub: give the path of a file ({", ".join(READ_SUFFIXES)}), or a name such as "{EXAMPLE_NAME}".'
        )
    return _load(place, config, split, text, name, "not a file on this machine, and cannot be loaded from the hub")


def _read_path(text: str, name: str) -> Iterable[Any]:
    """The rows of a file or a folder, without a look at the hub."""
    path = os.path.expanduser(text)
    if os.path.isfile(path):
        return _read_file(Path(path), name)
    place, config, split = _parts(path)
    if os.path.isdir(place):
        # An absolute path, since load_dataset has loaders with names like "json".
        return _load(os.path.abspath(place), config, split, text, name, "a folder that cannot be loaded as a data set")
    raise EUAError(f"The {name} {text} is not a file: check the path ({', '.join(READ_SUFFIXES)} are read).")


def _parts(text: str) -> tuple[str, str | None, str | None]:
    """The parts of ``name:config:split``. A split may itself contain colons (``train[:100]``)."""
    place, config, split, *_ = [*text.split(":", 2), "", ""]
    return place, config or None, split or None


def _exists(text: str) -> bool:
    path = os.path.expanduser(text)
    return os.path.isfile(path) or os.path.isdir(_parts(path)[0])


def _looks_like_file(text: str) -> bool:
    """Whether a string looks like a path, so that the hub is not asked for it."""
    is_written_as_path = text.startswith(("/", "./", "../", "~", ".\\", "..\\")) or re.match(r"[A-Za-z]:[\\/]", text)
    return bool(is_written_as_path) or _ends_as_file(text)


def _ends_as_file(text: str) -> bool:
    return _parts(text)[0].lower().endswith(READ_SUFFIXES + OTHER_SUFFIXES)


def _names_a_source(text: str) -> bool:
    """Whether a string in a list of questions names a file or a data set instead."""
    if re.search(r"\s", text):
        return False
    place = _parts(text)[0]
    return _looks_like_file(text) or ("/" in place and _HUB_NAME.fullmatch(place) is not None)


def _load(place: str, config: str | None, split: str | None, text: str, name: str, what: str) -> Any:
    """A data set in a folder or on the hub, by ``datasets.load_dataset``, which does not run code from the data set."""
    import datasets

    try:
        if config is None:
            config = _only(datasets.get_dataset_config_names(place), "configurations", text, name)
        if split is None:
            split = _only(datasets.get_dataset_split_names(place, config), "splits", text, name, config)
        return datasets.load_dataset(place, config, split=split)
    except EUAError:
        raise
    except Exception as error:  # from datasets, huggingface_hub, httpx and pyarrow, without another common base class
        raise EUAError(
            f"{text!r}, given as the {name}, is {what} ({_reason(error)}): check the path or name (name:config:split, e.g. "
            f'"{EXAMPLE_NAME}"), and for the hub the connection and, if the data set is private, `hf auth login`.'
        ) from error


def _only(found: list[str], what: str, text: str, name: str, config: str | None = None) -> str:
    if len(found) != 1:
        example = ":".join([_parts(text)[0], *([] if config is None else [config]), found[0] if found else "NAME"])
        raise EUAError(
            f"{text!r}, given as the {name}, has the {what} {', '.join(found)}, but the name selects none of them: "
            f"pass one, e.g. {example!r}."
        )
    return found[0]


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _listed(keys: Iterable[Any]) -> str:
    return ", ".join(map(repr, keys))
