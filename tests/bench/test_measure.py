"""The parts of the report that the benchmark adds to what :mod:`eua.evaluation` measures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from eua.bench import measure
from eua.bench.measure import _add_membership, _finite, objectives, task_objectives
from eua.bench.task import EvaluationSet
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
    report["left_out"]["membership_loss"] = "…"
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
