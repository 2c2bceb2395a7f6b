"""The parts of the report that the benchmark adds to what :mod:`eua.evaluation` measures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from eua.bench import measure
from eua.bench.measure import _add_membership, _finite, _leaks, _said, objectives, task_objectives
from eua.bench.task import EvaluationSet
from eua.errors import EUAError
from eua.evaluation.membership import PRIVACY_SCORES
from eua.evaluation.retain_model import RetainFigures
from eua.evaluation.said import KeyedFact, SaidFact
from eua.model.loading import load_model


def test_every_row_counts_the_same_in_the_objectives(make_task):
    task = make_task(0)
    model, tokenizer = load_model(task.target)
    rows = [row for one in task.validation.values() if not one.forget for row in one.rows]
    unknown = [{"question": "Who is that?", "answer": "zebra quartz violin"}]
    forget = {"forget": task.validation["forget"]}
    together = objectives(model, tokenizer, forget | {"all": EvaluationSet([*rows, *unknown], forget=False)})
    apart = objectives(
        model, tokenizer, forget | {"known": EvaluationSet(rows, forget=False), "unknown": EvaluationSet(unknown, forget=False)}
    )
    assert apart["retain"] == pytest.approx(together["retain"], abs=1e-6)
    assert apart["retain"] > 0.4  # two sets of which one is not known would halve it


def test_members_that_are_in_no_set_are_reported_as_if_they_were():
    report = {"membership_auc": {}, "aggregates": {"forget_quality": 0.5}, "left_out": {"privacy_leakage": "…", "fluency": "…"}}
    _add_membership(report, dict.fromkeys(PRIVACY_SCORES, 0.7), RetainFigures(None, dict.fromkeys(PRIVACY_SCORES, 0.4), None))
    assert report["membership_auc"]["min_k"] == 0.7
    assert report["aggregates"] == {
        "forget_quality": 0.5,
        "privacy_leakage": pytest.approx(-50.0),
        "privacy_score": pytest.approx(0.25),
    }
    assert report["left_out"] == {"fluency": "…"}
    _add_membership(report, dict.fromkeys(PRIVACY_SCORES, 0.7), None)
    assert report["aggregates"]["privacy_leakage"] == pytest.approx(-40.0)  # relative to 0.5, without a retain model


@pytest.fixture
def said_once():
    """A fact that one of four sampled answers says, in the very words of its answer."""
    fact = KeyedFact("home", "forget", ("Oslo",), ("Where does Ann live?",), answer="Ann lives in Oslo.")
    texts = ("Ann lives in Oslo.", "Bob sings.", "Bob sings.", "Bob sings.")
    sampled = torch.tensor([[True, False, False, False]])
    return SaidFact(fact, torch.tensor([False]), sampled, ("Bob sings.",), (texts,))


def test_leaks_are_scored_by_key_by_words_and_by_meaning(said_once, monkeypatch):
    monkeypatch.setattr(measure, "minilm_folder", lambda: None)
    monkeypatch.setattr(measure, "SentenceEmbedder", lambda _: lambda texts, _: torch.tensor([0.5] * len(texts)))
    leaks, left_out = _leaks([said_once])
    assert leaks == {
        "the key": {"k = 1": pytest.approx(1 / 4), "k = 4": pytest.approx(1.0)},
        "words in common": {"k = 1": pytest.approx(1 / 4), "k = 4": pytest.approx(1.0)},
        "meaning": {"k = 1": pytest.approx(0.5), "k = 4": pytest.approx(0.5)},
    }
    assert left_out == {}


def test_leaks_by_meaning_need_a_model_of_embeddings(said_once, monkeypatch):
    def missing():
        raise EUAError("The package is not installed")

    monkeypatch.setattr(measure, "minilm_folder", missing)
    leaks, left_out = _leaks([said_once])
    assert list(leaks) == ["the key", "words in common"]
    assert left_out == {"leak@k by meaning": "The package is not installed"}


def test_leaks_of_facts_without_answers_are_scored_by_key_alone(said_once):
    bare = SaidFact(KeyedFact("home", "forget", ("Oslo",), ("Where?",)), *list(vars(said_once).values())[1:])
    assert list(_leaks([bare])[0]) == ["the key"]
    assert _leaks([]) == ({}, {})


def test_facts_to_retain_may_have_fewer_samples_in_another_dtype(make_task, monkeypatch):
    asked = []

    def noted(model, tokenizer, facts, *, samples, max_new_tokens):
        asked.append((samples, model.dtype, {fact.group for fact in facts}))
        return []

    monkeypatch.setattr(measure, "said_in_wordings", noted)
    task = make_task(0)
    model, tokenizer = load_model(task.target)
    _said(model, tokenizer, replace(task, samples=16))
    _said(model, tokenizer, replace(task, samples=16, retained_samples=0, sampling_dtype="bfloat16"))
    forgotten, retained = {"forget"}, {"retained, never seen"}
    assert asked == [
        (16, torch.float32, forgotten),
        (16, torch.float32, retained),
        (16, torch.bfloat16, forgotten),
        (0, torch.bfloat16, retained),
    ]
    assert model.dtype == torch.float32


def test_settings_may_be_chosen_by_what_greedy_answers_say(make_task, monkeypatch):
    def answered(name: str, group: str, said: list[bool]) -> SaidFact:
        fact = KeyedFact(name, group, (name,), tuple(f"{name} {place}?" for place in range(len(said))))
        return SaidFact(fact, torch.tensor(said), torch.zeros(len(said), 0), ("",) * len(said), ((),) * len(said))

    answers = {
        "Oslo": answered("Oslo", "forget", [True, False, False, False]),
        "Rome": answered("Rome", "near", [True, True]),
        "Bern": answered("Bern", "far", [True, False, False, False, False, False]),
        "Lima": answered("Lima", "forget", [True]),
    }
    asked = []

    def noted(model, tokenizer, facts, *, samples, max_new_tokens):
        asked.append((samples, model.dtype))
        return [answers[fact.name] for fact in facts]

    monkeypatch.setattr(measure, "said_in_wordings", noted)
    facts = [one.fact for one in answers.values()]
    task = replace(make_task(0), facts=facts[1:], validation_facts=facts[:3], sampling_dtype="bfloat16")
    model, tokenizer = load_model(task.target)
    assert task_objectives(model, tokenizer, task, test=False) == {"forget": 1 / 4, "retain": 3 / 8}  # of all answers
    assert task_objectives(model, tokenizer, task, test=True) == {"forget": 1.0, "retain": 3 / 8}
    assert asked == [(0, torch.bfloat16)] * 2
    assert task.objective == "said greedily"
    assert make_task(0).objective == "extraction strength"


def test_results_are_json():
    assert _finite({"a": {"b": math.nan, "c": 1.5}, "d": math.inf, "e": "x"}) == {
        "a": {"b": None, "c": 1.5},
        "d": None,
        "e": "x",
    }
