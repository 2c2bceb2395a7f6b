"""Results of rows survive a file, and a file of something else is refused."""

from __future__ import annotations

import math

import pyarrow.parquet
import pytest

from eua import EUAError
from eua.evaluation.results import read_results, write_results

RESULTS = [
    {"set": "forget", "row": 0, "probability": 0.25, "energies": [-3.5, -2.0], "generated": "Ann, 'né' Ö\n"},
    {"set": "forget", "row": 1, "probability": 1.0, "exact_memorization_openunlearning": math.nan},
    {"set": "retain", "row": 0, "rouge_l_recall": 0.5, "generated": ""},
]


def test_results_are_read_as_written(tmp_path):
    path = tmp_path / "new" / "rows.parquet"
    write_results(path, RESULTS)
    read = read_results(path)
    assert math.isnan(read[1].pop("exact_memorization_openunlearning"))
    assert read == [RESULTS[0], {"set": "forget", "row": 1, "probability": 1.0}, RESULTS[2]]
    assert [file.name for file in path.parent.iterdir()] == ["rows.parquet"]
    assert pyarrow.parquet.read_schema(path).names[:3] == ["set", "row", "probability"]


def test_a_failed_write_keeps_what_was_there(tmp_path):
    path = tmp_path / "rows.parquet"
    write_results(path, RESULTS)
    with pytest.raises(EUAError, match="have a measure with values of several types .*: give each measure one type"):
        write_results(path, [*RESULTS, {"set": "retain", "row": 1, "probability": "high"}])
    assert len(read_results(path)) == 3


def test_lines_without_a_row_of_their_own_are_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    with pytest.raises(EUAError, match='Line 1 of the results lacks "set" or "row", .*: give every row'):
        write_results(path, [RESULTS[0], {"set": "forget", "probability": 0.5}])
    with pytest.raises(EUAError, match="Line 3 of the results is about row 0 of the set 'retain' again"):
        write_results(path, [*RESULTS, RESULTS[2]])
    assert not path.exists()
    pyarrow.parquet.write_table(pyarrow.table({"question": ["Who?"]}), path)
    with pytest.raises(EUAError, match='Line 0 of the results in .*rows.parquet lacks "set" or "row"'):
        read_results(path)
    with pytest.raises(EUAError, match="is not a file"):
        read_results(tmp_path / "none.parquet")
    path.write_text("no Parquet")
    with pytest.raises(EUAError, match="cannot be read as Parquet"):
        read_results(path)
