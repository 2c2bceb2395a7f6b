"""What a task of the benchmark has to have."""

from __future__ import annotations

import pytest

from eua.bench.task import EvaluationSet, Task
from eua.errors import EUAError

ROWS = [{"question": "Who?", "answer": "Ann."}]
SETS = {"forget": EvaluationSet(ROWS, forget=True), "retain": EvaluationSet(ROWS, forget=False)}


def test_every_set_for_validation_has_one_for_the_test():
    more = SETS | {"same entity": EvaluationSet(ROWS, forget=False)}
    made = Task("people", "target", None, ROWS, ROWS, SETS, more, ["Who?"], ["Ann"])
    assert list(made.test) == ["forget", "retain", "same entity"]
    with pytest.raises(EUAError, match=r"sets same entity of the task people have no test sets of the same .*: give both"):
        Task("people", "target", None, ROWS, ROWS, more, SETS, ["Who?"], ["Ann"])
