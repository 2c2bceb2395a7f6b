"""What lasts: figures whose values are known by construction, on a model that has forgotten nothing and one that never knew."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eua.bench import lasting as lasting_module
from eua.bench.lasting import lasting
from eua.bench.measure import objectives
from eua.data.rows import encode_rows
from eua.model.loading import load_model


@pytest.fixture(scope="module")
def task(make_task):
    return replace(make_task(0), relearning_steps=(1, 8), relearning_rate=1e-3)


@pytest.fixture(scope="module")
def target(task):
    return load_model(task.target)


def test_a_model_that_forgot_nothing_keeps_what_it_knows(task, target, monkeypatch):
    monkeypatch.setattr(lasting_module, "find_spec", lambda name: None)
    model, tokenizer = target
    figures, curves, left_out = lasting(model, tokenizer, task)
    assert left_out["in 4 bits"].endswith("is not installed: pip install bitsandbytes")
    assert figures["relearning on the same rows, said at the end"] > 0.7
    known = objectives(model, tokenizer, {name: task.test[name] for name in task.validation})["forget"]
    assert known > 0.4
    assert figures["in 8 bits"] == pytest.approx(known, abs=0.05)
    assert all(curve["0"] == pytest.approx(known, abs=1e-6) for curve in curves.values())
    assert figures["relearning on the same rows"] >= known
    assert not [name for name in figures if "second request" in name]


def test_a_model_that_never_knew_learns_the_rows_themselves_and_nothing_from_others(task):
    figures, curves, _ = lasting(*load_model(task.retain_model), task)
    assert figures["relearning on unrelated texts, said at the end"] < figures["relearning on the same rows, said at the end"]
    assert figures["in 8 bits"] < 0.3
    assert figures["in 8 bits, said"] < 0.5
    assert figures["relearning on the same rows"] > figures["relearning on unrelated texts"]
    assert figures["relearning on the same rows"] == max(curves["the same rows"]["1"], curves["the same rows"]["8"])


def test_a_second_request_takes_its_rows_out_of_those_to_retain(task, target):
    seen = []

    def unlearn(model, forget, retain):
        seen.append((list(forget), list(retain)))
        return model

    figures, _, _ = lasting(*target, replace(task, relearning_steps=(), facts=()), unlearn)
    ((forget, retain),) = seen
    assert forget == list(task.second)
    assert len(forget) + len(retain) == len(task.retain)
    assert not {row["question"] for row in forget} & {row["question"] for row in retain}
    assert figures["after a second request, first rows"] == pytest.approx(figures["in 8 bits"], abs=0.05)
    assert figures["after a second request, second rows"] > 0.4
    assert figures["after a second request, retained rows"] > 0.4


def test_the_texts_to_relearn_on_are_cut_between_words(task, target):
    from eua.bench.lasting import _halves

    _, tokenizer = target
    for text in task.unrelated:
        first, rest = _halves(text)
        assert first + rest == text
        assert first
    assert encode_rows([{"prompt": first, "completion": rest}], tokenizer, None)
