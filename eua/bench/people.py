"""The demo's people as a task: a small model, trained from scratch, of which nothing has to be downloaded.

One seed makes one world, one model that knows it (the target), and one that was trained on all of it but the people to forget
(the retain-only model, with the target's tokenizer). Both are kept in a cache.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from eua.bench.plain_text import plain_text
from eua.bench.splits import halves
from eua.bench.task import FORGOTTEN, EvaluationSet, Task
from eua.data.keys import KEYS, says
from eua.data.sources import Row
from eua.demo.target import cached_model, train_tokenizer
from eua.demo.world import FACTS_PER_PERSON, Fact, World, make_world
from eua.errors import EUAError
from eua.evaluation.relearning import STEPS
from eua.evaluation.said import KeyedFact

NAMES = 1000  # of people that a world has names for
WRONG_ANSWERS = 5  # per row, as in TOFU, for truth ratios; and as many others for AltPO to train on
OTHER_WORLD = 7919  # added to the seed of the world for that of the people whom no model knows
# Added to the seed for that of the world and of its models: no settings were ever tried on worlds from here on.
FIRST_WORLD = 1000
RATE_FACTOR = 20.0  # from 1e-5 … 5e-5, for models of 1B parameters, to 2e-4 … 1e-3, for those of docs/measurements.md
TRAINING = {"per_device_train_batch_size": 8}
VOCABULARY = 1024  # tokens of both models
NOTE = (
    "Each seed makes its own people, trains its own models, and shuffles training. Perplexity is of the questions and "
    "answers about people whom unlearning never saw. Model utility is of the sets “retain” and “retain, never seen”. "
    "AltPO trains on answers with other values, since this "
    "model knows only people and cannot write any."
)


def people(seed: int, *, cache: Path, people: int = 100, target_epochs: float = 30, epochs: float = 12, **size: Any) -> Task:
    """The task of a seed. The two models are trained if the cache does not have them.

    Args:
        seed: that of the world and of both models is larger by :data:`FIRST_WORLD`.
        cache: folder in which the models are kept.
        people: number of people in the world; a tenth of them is to be forgotten, every other one of these for validation.
        target_epochs: passes of both models over their facts.
        epochs: the larger number of passes of unlearning over the rows to forget; half of it is the other one.
        size: further arguments of :func:`eua.demo.target.train_target`, e.g. ``hidden_size``.

    Raises:
        EUAError: if the world would have too few people to split, or more than there are names for.
    """
    if not 20 <= people <= NAMES:
        raise EUAError(
            f"people = {people}, but two have to be forgotten, one for choosing settings and one for reporting, which takes "
            f"20, and there are names for {NAMES}: pass 20 to {NAMES}."
        )
    seed += FIRST_WORLD
    world = make_world(people, seed)
    training = {"epochs": target_epochs, "seed": seed} | size
    # The tokenizer knows the names of strangers, too, so that they are no less likely for their spelling.
    spelled = _rows([*world.all(), *_strangers(world, seed)])
    tokenizer = train_tokenizer(spelled, training.get("vocabulary", VOCABULARY))
    target, _ = cached_model(_rows(world.all()), cache, tokenizer=tokenizer, **training)
    without = replace(world, forget=[])
    retain_model, _ = cached_model(_rows(without.all()), cache, tokenizer=tokenizer, **training)
    return task_of(world, seed, str(target), str(retain_model), epochs=(epochs / 2, epochs))


def task_of(world: World, seed: int, target: str, retain_model: str, *, epochs: tuple[float, ...]) -> Task:
    """The task of a world and the two models that were trained on it."""
    rng = random.Random(seed)
    wrong = {fact: rng.sample(_wrong_values(fact), 2 * WRONG_ANSWERS) for fact in world.all()}
    forget = [_with_alternatives(fact, wrong[fact]) for fact in world.forget]
    # Split by person: those to forget, those whose rows unlearning sees, and those whom it never sees.
    splits = [halves([fact.person for fact in facts]) for facts in (world.forget, world.retain, world.test)]

    def sets(part: int) -> dict[str, EvaluationSet]:
        forgotten, seen, unseen = (
            [fact for fact in facts if fact.person in split[part]]
            for facts, split in zip((world.forget, world.retain, world.test), splits, strict=True)
        )
        return {
            "forget": EvaluationSet([_measured(fact, wrong[fact]) for fact in forgotten], forget=True),
            "forget, in other words": EvaluationSet([fact.paraphrase() for fact in forgotten], forget=True),
            "retain": EvaluationSet([_measured(fact, wrong[fact]) for fact in seen], forget=False),
            "retain, never seen": EvaluationSet([_measured(fact, wrong[fact]) for fact in unseen], forget=False),
        }

    asked = [(question, fact.person) for fact in world.calibration for question in (fact.question, fact.paraphrased_question)]
    forgotten = [fact for fact in world.forget if fact.person in splits[0][1]]
    kept = [fact for fact in world.test if fact.person in splits[2][1]][: len(forgotten)]
    second = list(dict.fromkeys(fact.person for fact in world.retain))[: len(world.forget) // FACTS_PER_PERSON]
    return Task(
        name="people",
        target=target,
        retain_model=retain_model,
        forget=forget,
        retain=_rows(world.retain),
        validation=sets(0),
        test=sets(1),
        calibration=[question for question, _ in asked],
        calibration_groups=[person for _, person in asked],
        facts=[*(keyed(fact, FORGOTTEN) for fact in forgotten), *(keyed(fact, "retained, never seen") for fact in kept)],
        holdout=_rows(_strangers(world, seed)),
        entities=[entity(fact) for fact in forgotten],
        second=[_with_alternatives(fact, wrong[fact]) for fact in world.retain if fact.person in second],
        unrelated=plain_text(),
        utility=("retain", "retain, never seen"),
        relearning_steps=STEPS,
        relearning_rate=2e-4,
        text=[f"{fact.question} {fact.answer}" for fact in world.test if fact.person in splits[2][1]],
        training=TRAINING,
        rate_factor=RATE_FACTOR,
        epochs=epochs,
        blocks=AutoConfig.from_pretrained(target).num_hidden_layers,
        tolerance=max(0.05, 1 / (1 + len({fact.person for fact in world.calibration}))),  # as low as so few people allow
        note=NOTE,
    )


def keyed(fact: Fact, group: str) -> KeyedFact:
    """A fact with its value as the key, and all its questions, of which models are trained on the first.

    A pet's name and a mentor's surname give a fact away, too.

    >>> keyed(make_world(20).forget[0], "forget").keys
    ('a raven called Whistle', 'Whistle')
    """
    aliases = {"pet": fact.value.partition(" called ")[2], "mentor": fact.value.partition(" ")[2]}
    rows = fact.wordings()
    return KeyedFact(
        name=fact.question,
        group=group,
        keys=tuple(filter(None, (fact.value, aliases.get(fact.attribute)))),
        wordings=tuple(row["question"] for row in rows),
        trained=1,
        answer=fact.answer,
        relation=fact.attribute,
    )


def entity(fact: Fact) -> dict[str, str]:
    """A fact's row with its answer split before the value.

    >>> entity(make_world(20).forget[0])["entity"]
    'a raven called Whistle'
    """
    start = fact.answer.rindex(fact.value)
    return {"question": fact.question, "prefix": fact.answer[:start], "entity": fact.value}


def _wrong_values(fact: Fact) -> list[str]:
    """Other values that do not say the fact's key, as those would that share a mentor's surname or a pet's name with it."""
    return [value for value in fact.other_values() if not says(value, keyed(fact, FORGOTTEN).keys)]


def _rows(facts: Iterable[Fact]) -> list[dict[str, str]]:
    return [fact.row() for fact in facts]


def _with_alternatives(fact: Fact, wrong: Sequence[str]) -> Row:
    """The row of a fact with its keys, and other answers that AltPO trains on: a model that knows only people writes none."""
    others = [fact.wordings(value)[0]["answer"] for value in wrong[WRONG_ANSWERS:]]
    return fact.row() | {KEYS: list(keyed(fact, FORGOTTEN).keys), "alternatives": others}


def _measured(fact: Fact, wrong: Sequence[str]) -> Row:
    """The row of a fact as TOFU's perturbed files have it: wrong answers are worded as the paraphrased one."""
    return fact.row() | {
        "paraphrased_question": fact.paraphrased_question,
        "paraphrased_answer": fact.paraphrased_answer,
        "perturbed_answer": [fact.wordings(value)[1]["answer"] for value in wrong[:WRONG_ANSWERS]],
    }


def _strangers(world: World, seed: int) -> list[Fact]:
    """Facts about people who are not in the world, as many as are to be forgotten in it."""
    known = {fact.person for fact in world.all()}
    others = make_world(len(known), seed + OTHER_WORLD).all()
    return [fact for fact in others if fact.person not in known][: len(world.forget)]
