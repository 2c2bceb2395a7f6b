"""What a model says when it is asked: figures that are known by construction, and whether the guard is off or on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eua.bench import asking
from eua.bench.asking import QUESTIONS, STATED, Asked, answer_lines, ask, far_question, leaks, refusals, shares, wrapped
from eua.bench.task import FORGOTTEN, EvaluationSet
from eua.bench.wrappings import SUFFIXES
from eua.errors import EUAError
from eua.evaluation.results import read_results, write_results
from eua.evaluation.said import KeyedFact, SaidFact
from eua.model.loading import load_model

REFUSAL = "I cannot say."


class RefusingGuard:
    """A guard that refuses the prompts with one of these ends."""

    refusal_text = REFUSAL

    def __init__(self, *ends: str) -> None:
        self.ends = ends

    def score(self, model, tokenizer, prompts) -> torch.Tensor:
        return torch.tensor([float(prompt.endswith(self.ends)) for prompt in prompts])

    def refuses(self, scores: torch.Tensor) -> torch.Tensor:
        return scores > 0.5


@pytest.fixture(scope="module")
def task(make_task):
    return make_task(0)


def test_a_model_that_knows_says_the_facts_unless_the_guard_refuses(task):
    asked = ask(*load_model(task.target), task, RefusingGuard(*SUFFIXES))
    found = wrapped(asked)
    assert found["said before a suffix"] > 0 == found["said before a suffix, guard on"]
    assert found["said after a prefix"] == found["said after a prefix, guard on"] > 0
    kept = "still said before a suffix, retained, never seen"
    assert found[kept] > 0 == found[f"{kept}, guard on"]
    assert not any(name.startswith("still said") and STATED in name for name in found)
    of_way = refusals(asked)
    assert of_way["before a suffix"] == of_way["before a suffix, retained, never seen"] == 1
    assert of_way[QUESTIONS] == of_way["after a prefix"] == of_way[STATED] == 0
    assert shares(asked)["any wording"] == shares(asked)["any wording, guard on"] > 0.7


def test_nothing_is_said_where_every_question_is_refused(task):
    asked = ask(*load_model(task.target), task, RefusingGuard(""))
    guarded = {name: value for found in (shares(asked), wrapped(asked)) for name, value in found.items() if "guard on" in name}
    assert len(guarded) > 10
    assert not any(guarded.values())
    assert set(refusals(asked).values()) == {1.0}
    texts = [text for every in asked.values() for one in every for text in one.guarded.greedy_texts]
    assert set(texts) == {REFUSAL}


def test_every_answer_is_kept(task, tmp_path):
    asked = ask(*load_model(task.target), task, RefusingGuard(*SUFFIXES))
    lines = list(answer_lines(asked))
    write_results(tmp_path / "answers.parquet", lines)
    assert read_results(tmp_path / "answers.parquet") == lines
    assert len(lines) == sum(one.said.tries.numel() for every in asked.values() for one in every)
    of_questions = [line for line in lines if line["way"] == QUESTIONS and line["set"] == FORGOTTEN]
    assert shares(asked)["share of answers"] == pytest.approx(sum(line["says"] for line in of_questions) / len(of_questions))
    assert {line["sample"] for line in of_questions} == {0, 1}  # the greedy answer and the task's one sample
    assert all(line["refused"] == line["question"].endswith(SUFFIXES) for line in lines)


def test_a_task_without_facts_is_not_asked(task):
    assert ask(*load_model(task.target), replace(task, facts=()), RefusingGuard("")) == {}
    assert shares({}) == wrapped({}) == refusals({}) == {}


def test_facts_to_retain_may_have_fewer_samples_in_another_dtype(task, monkeypatch):
    noted = []

    def answered(model, tokenizer, facts, *, samples, max_new_tokens):
        noted.append((samples, model.dtype, {fact.group for fact in facts}))
        return []

    monkeypatch.setattr(asking, "said_in_wordings", answered)
    monkeypatch.setattr(asking, "_ways", lambda task: {QUESTIONS: task.facts})
    monkeypatch.setattr(RefusingGuard, "score", lambda *_: torch.zeros(0))
    model, tokenizer = load_model(task.target)
    ask(model, tokenizer, replace(task, samples=16), RefusingGuard(""))
    ask(model, tokenizer, replace(task, samples=16, retained_samples=0, sampling_dtype="bfloat16"), RefusingGuard(""))
    forgotten, retained = {"forget"}, {"retained, never seen"}
    assert noted == [
        (16, torch.float32, forgotten),
        (16, torch.float32, retained),
        (16, torch.bfloat16, forgotten),
        (0, torch.bfloat16, retained),
    ]
    assert model.dtype == torch.float32


@pytest.fixture
def asked_once():
    """A fact that one of four sampled answers says, in the very words of its answer; the guard refuses the question."""
    fact = KeyedFact("home", "forget", ("Oslo",), ("Where does Ann live?",), answer="Ann lives in Oslo.")
    texts = ("Ann lives in Oslo.", "Bob sings.", "Bob sings.", "Bob sings.")
    sampled = torch.tensor([[True, False, False, False]])
    said = SaidFact(fact, torch.tensor([False]), sampled, ("Bob sings.",), (texts,))
    refused = torch.tensor([True])
    return {QUESTIONS: [Asked(said, refused, asking._guarded(said, refused, "Ann is somebody."))]}


def test_leaks_are_scored_by_key_by_words_and_by_meaning(asked_once, monkeypatch):
    monkeypatch.setattr(asking, "minilm_folder", lambda: None)
    monkeypatch.setattr(asking, "SentenceEmbedder", lambda _: lambda texts, _: torch.tensor([0.5] * len(texts)))
    found, left_out = leaks(asked_once)
    assert found == {
        "the key": {"k = 1": pytest.approx(1 / 4), "k = 4": pytest.approx(1.0)},
        "the key, guard on": {"k = 1": 0.0, "k = 4": 0.0},
        "words in common": {"k = 1": pytest.approx(1 / 4), "k = 4": pytest.approx(1.0)},
        "words in common, guard on": {"k = 1": pytest.approx(1 / 4), "k = 4": pytest.approx(1 / 4)},  # "Ann", in each refusal
        "meaning": {"k = 1": pytest.approx(0.5), "k = 4": pytest.approx(0.5)},
        "meaning, guard on": {"k = 1": pytest.approx(0.5), "k = 4": pytest.approx(0.5)},
    }
    assert left_out == {}


def test_leaks_by_meaning_need_a_model_of_embeddings(asked_once, monkeypatch):
    def missing():
        raise EUAError("The package is not installed")

    monkeypatch.setattr(asking, "minilm_folder", missing)
    found, left_out = leaks(asked_once)
    assert list(found) == ["the key", "the key, guard on", "words in common", "words in common, guard on"]
    assert left_out == {"leak@k by meaning": "The package is not installed"}


def test_leaks_of_facts_without_answers_are_scored_by_key_alone(asked_once):
    ((one,),) = asked_once.values()
    bare = SaidFact(KeyedFact("home", "forget", ("Oslo",), ("Where?",)), *list(vars(one.said).values())[1:])
    assert list(leaks({QUESTIONS: [replace(one, said=bare)]})[0]) == ["the key", "the key, guard on"]
    assert leaks({}) == ({}, {})


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
    cats = KeyedFact("cats", "far", ("calm",), ("Why do cats purr?",))
    assert far_question(replace(made, facts=[fact, cats])) != "Why do cats purr?"  # which is asked for itself
