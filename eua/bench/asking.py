"""Asks a model for a task's facts, as they are worded and with text around the questions, and says what the guard would refuse.

A prompt that the guard does not refuse is answered exactly as without the guard, so every answer is generated once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.bench.real_models import minilm_folder
from eua.bench.task import FORGOTTEN, Task
from eua.bench.wrappings import wrappings
from eua.data.keys import normalize
from eua.errors import EUAError
from eua.evaluation.leaks import SentenceEmbedder, Similarity, leak_curve, rouge_l_recall
from eua.evaluation.said import KeyedFact, SaidFact, said_in_wordings, said_summary
from eua.guard.guard import EnergyGuard

QUESTIONS, STATED = "the questions", "where the prompt states it"  # two forms; the others are those of wrappings()
_LEAKS = (1, 4, 16)  # numbers of sampled answers of which the worst one is reported
_GUARD_ON = ", guard on"  # ends the names of figures


@dataclass(frozen=True)
class Asked:
    """A fact that was asked for.

    Attributes:
        said: the answers, guard off. Facts that are only asked greedily have no samples.
        refused: (wordings,) bool, the questions that the guard refuses.
        guarded: the answers, guard on.
    """

    said: SaidFact
    refused: Tensor
    guarded: SaidFact


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, guard: EnergyGuard) -> dict[str, list[Asked]]:
    """Ask about all facts of a task; about those to forget also with prompts that state them.

    Answers are generated in the task's ``sampling_dtype``; the guard reads the model as it is.

    Returns:
        Form of the question → facts, first those to forget, then those to retain: :data:`QUESTIONS` with the task's samples,
        the keys of :func:`eua.bench.wrappings.wrappings` and :data:`STATED` greedily. Empty if the task has no facts.
    """
    writer = in_sampling_dtype(model, task) if task.facts else model
    few = task.samples if task.retained_samples is None else task.retained_samples
    found: dict[str, list[Asked]] = {}
    for way, facts in _ways(task).items():
        said: list[SaidFact] = []
        for is_forgotten, samples in ((True, task.samples), (False, few)):
            if group := [fact for fact in facts if (fact.group == FORGOTTEN) == is_forgotten]:
                samples = samples if way == QUESTIONS else 0
                said += said_in_wordings(writer, tokenizer, group, samples=samples, max_new_tokens=task.new_tokens)
        prompts = [wording for one in said for wording in one.fact.wordings]
        refused = guard.refuses(guard.score(model, tokenizer, prompts)).split([len(one.greedy) for one in said])
        found[way] = [
            Asked(one, of_fact, _guarded(one, of_fact, guard.refusal_text)) for one, of_fact in zip(said, refused, strict=True)
        ]
    return found


def in_sampling_dtype(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """The model, or a copy in the dtype in which the task's many answers are generated."""
    return model if task.sampling_dtype is None else copy.deepcopy(model).to(getattr(torch, task.sampling_dtype))


def _ways(task: Task) -> dict[str, list[KeyedFact]]:
    """Form of the question → the task's facts with these wordings."""
    if not task.facts:
        return {}
    other = far_question(task)
    ways: dict[str, list[KeyedFact]] = {QUESTIONS: list(task.facts)}
    for fact in task.facts:
        for way, texts in wrappings(fact.wordings[0], other).items():
            ways.setdefault(way, []).append(replace(fact, wordings=texts, trained=0))
        if fact.answer and fact.group == FORGOTTEN:
            stated = (f"{fact.answer} {fact.wordings[0]}",)
            ways.setdefault(STATED, []).append(replace(fact, wordings=stated, trained=0))
    return ways


def far_question(task: Task) -> str:
    """The question of a test row to retain whose question and answer share the fewest words with the facts to forget.

    If possible it is none of those that the facts are asked for with.
    """
    near = {word for fact in task.forgotten_facts for text in (*fact.wordings, fact.answer) for word in normalize(text).split()}
    rows = [row for one in task.test.values() if not one.forget for row in one.rows if "question" in row]
    asked = {wording for fact in task.facts for wording in fact.wordings}
    rows = [row for row in rows if row["question"] not in asked] or rows
    return str(min(rows, key=lambda row: len(near & set(normalize(f"{row['question']} {row['answer']}").split())))["question"])


def _guarded(said: SaidFact, refused: Tensor, refusal: str) -> SaidFact:
    """The same with a refusal in place of every answer to a question that is refused."""
    texts = [
        (refusal, (refusal,) * len(sampled)) if is_refused else (greedy, sampled)
        for is_refused, greedy, sampled in zip(refused.tolist(), said.greedy_texts, said.sampled_texts, strict=True)
    ]
    return SaidFact(
        said.fact,
        said.greedy & ~refused,
        said.sampled & ~refused[:, None],
        tuple(greedy for greedy, _ in texts),
        tuple(sampled for _, sampled in texts),
    )


def shares(asked: Mapping[str, Sequence[Asked]]) -> dict[str, float]:
    """The shares of facts that are said, and of answers that say their fact, when it is asked for in its wordings.

    A name ends with the group of facts if it is not that to forget, and with "guard on" where the guard is.
    """
    found: dict[str, float] = {}
    for suffix, answers in (
        ("", [one.said for one in asked.get(QUESTIONS, [])]),
        (_GUARD_ON, [one.guarded for one in asked.get(QUESTIONS, [])]),
    ):
        for group, parts in said_summary(answers).items():
            end = suffix if group == FORGOTTEN else f", {group}{suffix}"
            is_sampled = any(one.sampled.shape[1] for one in answers if one.fact.group == group)
            found |= {f"any wording{end}": parts["all"]["per_fact"]} if is_sampled else {}
            found |= {
                f"any wording, greedily{end}": parts["all"]["greedy"],
                f"share of {'' if is_sampled else 'greedy '}answers{end}": parts["all"]["per_try"],
            }
            if is_sampled and not suffix and "per_fact_by_chance" in parts["all"]:
                found[f"any wording, by chance{end}"] = parts["all"]["per_fact_by_chance"]
            if group == FORGOTTEN:
                found[f"the wording of the rows{end}"] = parts["trained"]["per_fact"]
                found |= {f"other wordings{end}": parts["unseen"]["per_fact"]} if "unseen" in parts else {}
    return found


def wrapped(asked: Mapping[str, Sequence[Asked]]) -> dict[str, float]:
    """The share of facts that at least one greedy answer says, by the form of the question, guard off and on.

    The names of figures of facts to retain, of which more is better, begin with "still said".
    """
    found: dict[str, float] = {}
    for way, every in asked.items():
        if way == QUESTIONS:
            continue
        for group, of_group in _by_group(every).items():
            name = f"said {way}" if group == FORGOTTEN else f"still said {way}, {group}"
            found[name] = _share([bool(one.said.greedy.any()) for one in of_group])
            found[f"{name}{_GUARD_ON}"] = _share([bool(one.guarded.greedy.any()) for one in of_group])
    return found


def refusals(asked: Mapping[str, Sequence[Asked]]) -> dict[str, float]:
    """The share of prompts that the guard refuses, by the form of the question, and by group where facts are to be retained."""
    return {
        way if group == FORGOTTEN else f"{way}, {group}": float(torch.cat([one.refused for one in of_group]).double().mean())
        for way, every in asked.items()
        for group, of_group in _by_group(every).items()
    }


def _by_group(every: Sequence[Asked]) -> dict[str, list[Asked]]:
    groups: dict[str, list[Asked]] = {}
    for one in every:
        groups.setdefault(one.said.fact.group, []).append(one)
    return groups


def _share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)


def leaks(asked: Mapping[str, Sequence[Asked]]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """leak@k of the facts to forget, scored in three ways, guard off and on; and what could not be measured, and why."""
    forgotten = [one for one in asked.get(QUESTIONS, []) if one.said.fact.group == FORGOTTEN]
    if not forgotten or not all(one.said.sampled.shape[1] for one in forgotten):
        return {}, {}
    ways: dict[str, Similarity | None] = {"the key": None}
    left_out: dict[str, str] = {}
    answered = [one for one in forgotten if one.said.fact.answer]
    if answered:
        ways["words in common"] = rouge_l_recall
        try:
            ways["meaning"] = SentenceEmbedder(minilm_folder())
        except EUAError as error:
            left_out["leak@k by meaning"] = str(error)
    found: dict[str, dict[str, float]] = {}
    for name, similarity in ways.items():
        facts = forgotten if similarity is None else answered
        found[name] = _curve([one.said for one in facts], similarity)
        found[f"{name}{_GUARD_ON}"] = _curve([one.guarded for one in facts], similarity)
    return found, left_out


def _curve(said: Sequence[SaidFact], similarity: Similarity | None) -> dict[str, float]:
    return {f"k = {k}": value for k, value in leak_curve(said, similarity, ks=_LEAKS).items()}


def answer_lines(asked: Mapping[str, Sequence[Asked]]) -> Iterator[dict[str, Any]]:
    """Every answer, guard off, as a line for :func:`eua.evaluation.results.write_results`, with the group as its set.

    "sample" is 0 for the greedy answer, "says" whether the answer has the key, and "refused" whether the guard refuses the
    question.
    """
    lines: dict[str, int] = {}
    for way, every in asked.items():
        for one in every:
            said = one.said
            for place, wording in enumerate(said.fact.wordings):
                texts = (said.greedy_texts[place], *said.sampled_texts[place])
                for sample, (text, says) in enumerate(zip(texts, said.tries[place].tolist(), strict=True)):
                    line = lines[said.fact.group] = lines.get(said.fact.group, -1) + 1
                    yield {
                        "set": said.fact.group,
                        "row": line,
                        "way": way,
                        "fact": said.fact.name,
                        "question": wording,
                        "sample": sample,
                        "answer": text,
                        "says": says,
                        "refused": bool(one.refused[place]),
                    }
