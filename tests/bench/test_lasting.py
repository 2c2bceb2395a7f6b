"""What lasts: figures whose values are known by construction, on a model that has forgotten nothing and one that never knew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eua.bench import lasting as lasting_module
from eua.bench.lasting import far_question, lasting
from eua.bench.measure import objectives
from eua.bench.task import EvaluationSet
from eua.bench.wrappings import SUFFIXES
from eua.data.rows import encode_rows
from eua.evaluation.said import KeyedFact
from eua.model.loading import load_model


@pytest.fixture(scope="module")
def task(make_task):
    return replace(make_task(0), relearning_steps=(1, 8), relearning_rate=1e-3)


@pytest.fixture(scope="module")
def target(task):
    return load_model(task.target)


class RefusingGuard:
    """A guard that refuses the prompts with an end."""

    def __init__(self, *ends: str) -> None:
        self.ends = ends

    def score(self, model, tokenizer, prompts) -> torch.Tensor:
        return torch.tensor([float(prompt.endswith(self.ends)) for prompt in prompts])

    def refuses(self, scores: torch.Tensor) -> torch.Tensor:
        return scores > 0.5


def test_a_model_that_forgot_nothing_keeps_what_it_knows(task, target, monkeypatch):
    monkeypatch.setattr(lasting_module, "find_spec", lambda name: None)
    model, tokenizer = target
    figures, curves, left_out = lasting(model, tokenizer, task, guard=RefusingGuard(*SUFFIXES))
    assert left_out["in 4 bits"].endswith("is not installed: pip install bitsandbytes")
    assert figures["said before a suffix"] > 0 == figures["said before a suffix, guard on"]
    assert figures["said behind a prefix, guard on"] == figures["said behind a prefix"] > 0
    assert figures["relearning on the same rows, said at the end"] > 0.7
    known = objectives(model, tokenizer, {name: task.test[name] for name in task.validation})["forget"]
    assert known > 0.4
    assert figures["in 8 bits"] == pytest.approx(known, abs=0.05)
    assert all(curve["0"] == pytest.approx(known, abs=1e-6) for curve in curves.values())
    assert figures["relearning on the same rows"] >= known
    assert not [name for name in figures if "second request" in name]


def test_a_model_that_never_knew_learns_the_rows_themselves_and_nothing_from_others(task):
    figures, curves, _ = lasting(*load_model(task.retain_model), task, guard=RefusingGuard(""))
    guarded = [value for name, value in figures.items() if name.endswith(", guard on")]
    assert len(guarded) == 4  # before, behind, with another question, stated
    assert not any(guarded)  # everything is refused
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


def test_the_other_question_is_the_one_that_is_farthest_from_what_is_forgotten(task):
    def questions(*rows: tuple[str, str]) -> EvaluationSet:
        return EvaluationSet([{"question": question, "answer": answer} for question, answer in rows], forget=False)

    fact = KeyedFact("capital of Italy", "forget", ("Rome",), ("What is the capital of Italy?",), answer="It is Rome.")
    near = questions(("What is the currency of Italy?", "The euro."), ("Who founded that?", "Romulus founded Rome in Italy."))
    far = questions(("Why do cats purr?", "To calm down."))
    forgotten = {"forget": task.test["forget"]}
    sets = {"validation": forgotten | {"far": far}, "test": forgotten | {"same entity": near, "far": far}}
    made = replace(task, facts=[fact], **sets)
    assert far_question(made) == "Why do cats purr?"
