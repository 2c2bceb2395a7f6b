"""A task of forgetting facts that a pretrained model really knows, with everything near them that it has to keep.

What is to be forgotten is drawn from the facts that the model says. Every other fact that it says has one role, which depends
on its entity: to be retained in training, to calibrate a guard, or never to be seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from eua.bench.knowledge import Knowledge
from eua.bench.wrappings import wrappings
from eua.errors import EUAError
from eua.evaluation.said import KeyedFact, says

PLAIN_TEXT = Path(__file__).with_name("plain_text.txt")
FORGET = "forget"
# The roles of five entities in turn, of those that have nothing to be forgotten.
_ROLES = ("seen", "never seen", "calibration", "seen", "never seen")

Row: TypeAlias = dict[str, str]


@dataclass(frozen=True)
class FactSet:
    """Rows to measure, and whether they are to be forgotten."""

    rows: list[Row]
    forget: bool


@dataclass(frozen=True)
class Measured:
    """What is measured of a half of the entities.

    Attributes:
        sets: name → rows. For "forget", "same relation, seen", "same relation, never seen", "same entity", "far, seen" and
            "far, never seen", as far as there are such facts: the trained wordings, and with the addition "in other words" one
            other wording a fact, in which the model says it. For "forget" and "never seen" (same relation and far): "behind a
            prefix", "before a suffix", "with another question", and "in context", where the prompt states the fact before it
            asks. Those in context are not to be forgotten.
        facts: the same facts, with all wordings, and those in context; the group of each is the name of its set.
    """

    sets: dict[str, FactSet]
    facts: list[KeyedFact]


@dataclass(frozen=True)
class FactsTask:
    """What to forget and to retain, and what to measure.

    Attributes:
        forget, retain: rows to train on, in the trained wordings, with the model's own answers.
        calibration: rows in all wordings for a guard's threshold; no other row is about their entities.
        calibration_groups: the entity of each of these rows.
        validation, test: what to choose settings on, and what to report. No entity is in both.
        plain_text: paragraphs for perplexity.
    """

    forget: list[Row]
    retain: list[Row]
    calibration: list[Row]
    calibration_groups: list[str]
    validation: Measured
    test: Measured
    plain_text: list[str]


def facts_task(
    knowledge: Knowledge,
    seed: int,
    *,
    relations: Sequence[str] | None = None,
    entities: Sequence[str] | None = None,
    forget: int = 24,
    retain: int = 96,
    trained: int = 1,
    least: int = 3,
) -> FactsTask:
    """Draw a task from what a model knows.

    >>> task = facts_task(knowledge, seed=0, relations=["capital"])           # doctest: +SKIP
    >>> task.forget[0]                                                         # doctest: +SKIP
    {'question': 'What is the capital of Italy?', 'answer': 'The capital of Italy is Rome.'}

    Args:
        knowledge: of the model, see :func:`eua.bench.knowledge.ask_facts`.
        seed: of all draws.
        relations: those whose facts are to be forgotten. None, without entities: the seed draws one of
            which the model knows enough.
        entities: those of whom all facts that the model knows are to be forgotten, in place of relations.
        forget: number of facts of the relations to forget. It has no effect with entities, of whom everything is forgotten.
        retain: largest number of facts to retain, half of them of the same relation if there are as many.
        trained: the first ``trained`` wordings are trained on.
        least: in how many wordings the model must say a fact for it to count as known.

    Raises:
        EUAError: if both relations and entities are given; if ``trained`` or ``least`` is not a number of wordings; if the
            model knows too few of these facts, or nothing else that it could retain.
    """
    draw = _Draw(knowledge, random.Random(seed), trained, least)
    forgotten = draw.forgotten(relations, entities, forget)
    draw.split(forgotten)
    near, far = (draw.roles[kind, "seen"] for kind in ("same relation", "far"))
    kept_near = near[: max(retain // 2, retain - len(far))]
    kept = kept_near + far[: retain - len(kept_near)]
    draw.roles["same relation", "seen"], draw.roles["far", "seen"] = kept_near, far[: retain - len(kept_near)]
    calibration = draw.roles["same relation", "calibration"] + draw.roles["far", "calibration"]
    retained = [row for index in kept for row in draw.rows(index, range(trained))]
    calibrated = [(row, draw.facts[index].entity) for index in calibration for row in draw.rows(index)]
    if not retained or not calibrated:
        raise EUAError(
            f"The model knows {len(kept)} facts to retain and {len(calibration)} to calibrate on, but at least one of each is "
            "needed: lower `least`, forget less, or give more questions."
        )
    return FactsTask(
        forget=[row for index in forgotten for row in draw.rows(index, range(trained))],
        retain=retained,
        calibration=[row for row, _ in calibrated],
        calibration_groups=[entity for _, entity in calibrated],
        validation=draw.measured(0),
        test=draw.measured(1),
        plain_text=plain_text(),
    )


def plain_text() -> list[str]:
    """Thirty short paragraphs on nothing in particular, written for this package, to measure a model's perplexity on."""
    return PLAIN_TEXT.read_text(encoding="utf-8").strip().split("\n\n")


class _Draw:
    """The draws of one task: which fact has which role."""

    def __init__(self, knowledge: Knowledge, rng: random.Random, trained: int, least: int) -> None:
        wordings = len(knowledge.facts[0].wordings)
        if not 1 <= trained <= wordings or not 1 <= least <= wordings:
            raise EUAError(
                f"trained = {trained} and least = {least}, but every fact has {wordings} wordings: pass numbers from 1 to "
                f"{wordings}."
            )
        self.knowledge, self.facts, self.rng, self.trained = knowledge, knowledge.facts, rng, trained
        self.known = knowledge.known(least)
        self.wordings = range(wordings)
        self.roles: dict[tuple[str, str], list[int]] = {}
        self._forgotten: list[int] = []

    def forgotten(self, relations: Sequence[str] | None, entities: Sequence[str] | None, count: int) -> list[int]:
        """The facts to forget: of relations, or all of some entities."""
        if relations and entities:
            raise EUAError(
                f"relations = {list(relations)} and entities = {list(entities)} were given, but a task forgets facts of "
                "relations or everything about entities: pass one of the two."
            )
        if entities:
            found = [index for index in self.known if self.facts[index].entity in entities]
            count = len(found)
        else:
            relations = relations or [self._relation(count)]
            found = [index for index in self.known if self.facts[index].relation in relations]
        of_what = f"the entities {', '.join(entities)}" if entities else f"the relation {', '.join(relations or [])}"
        distinct = len({self.facts[index].subject for index in found})
        if len(found) < count or distinct < 2:
            raise EUAError(
                f"The model knows {len(found)} facts of {of_what} about {distinct} entities, but {count} are to be forgotten, "
                "of at least two entities, one for choosing settings and one for reporting: lower `forget` or `least`, or name "
                "others."
            )
        self._forgotten = sorted(self.rng.sample(found, count))
        return self._forgotten

    def _relation(self, count: int) -> str:
        """A relation of which the model knows so many facts that others of it are left in every role."""
        known = [self.facts[index].relation for index in self.known]
        needed = max(count + len(_ROLES), 4 * count // 3)
        enough = [relation for relation in dict.fromkeys(known) if known.count(relation) >= needed]
        if not enough:
            most = max(set(known), key=known.count, default="none")
            raise EUAError(
                f"The model knows {known.count(most)} facts of the relation {most} and fewer of any other, but {count} are to "
                f"be forgotten and {needed - count} more kept: lower `forget` or `least`, or give more questions."
            )
        return self.rng.choice(enough)

    def split(self, forgotten: Sequence[int]) -> None:
        """Give every other fact that is known its role."""
        subjects = {self.facts[index].subject for index in forgotten}
        relations = {self.facts[index].relation for index in forgotten}
        others = [index for index in self.known if self.facts[index].subject not in subjects]
        near = {self.facts[index].subject for index in others if self.facts[index].relation in relations}
        rest = {self.facts[index].subject for index in others} - near
        role: dict[tuple[str, str], str] = {}
        for group in (near, rest):
            shuffled = self.rng.sample(sorted(group), len(group))
            role |= {subject: _ROLES[place % len(_ROLES)] for place, subject in enumerate(shuffled)}
        same_entity = [index for index in self.known if self.facts[index].subject in subjects and index not in forgotten]
        self.roles = {(FORGET, ""): list(forgotten), ("same entity", ""): same_entity}
        for kind in ("same relation", "far"):
            of_kind = [index for index in others if (self.facts[index].relation in relations) == (kind == "same relation")]
            self.rng.shuffle(of_kind)
            for name in dict.fromkeys(_ROLES):
                self.roles[kind, name] = [index for index in of_kind if role[self.facts[index].subject] == name]

    def rows(self, index: int, wordings: Iterable[int] | None = None) -> list[Row]:
        """A fact in some wordings, or in all, with the model's own answers, without texts that give away what is forgotten."""
        fact, rows = self.facts[index], []
        for wording in self.wordings if wordings is None else wordings:
            question, own = fact.wordings[wording], self.knowledge.own_answer(index, wording)
            if index in self._forgotten:
                rows.append({"question": question, "answer": own})
                continue
            answer = next((text for text in (own, fact.answer) if not self._gives_away(f"{question} {text}")), None)
            if answer is not None:
                rows.append({"question": question, "answer": answer})
        return rows

    def _gives_away(self, text: str) -> bool:
        """Whether a text names the entity and the key of a fact to forget, e.g. as what another city is not."""
        facts = (self.facts[index] for index in self._forgotten)
        return any(says(text, fact.keys) and says(text, (fact.entity,)) for fact in facts)

    def measured(self, half: int) -> Measured:
        """Sets and facts of every second entity of each role, no more facts a role than are to be forgotten."""
        sets: dict[str, FactSet] = {}
        facts: list[KeyedFact] = []
        never_seen: list[int] = []
        largest = len(self._half(self.roles[FORGET, ""], half))
        for (kind, role), members in self.roles.items():
            if role == "calibration":
                continue
            name = f"{kind}, {role}" if role else kind
            chosen = self._half(members, half)[:largest]
            never_seen += chosen if role == "never seen" else []
            forget = kind == FORGET
            sets[name] = FactSet([row for index in chosen for row in self.rows(index, range(self.trained))], forget)
            reworded = [row for index in chosen for row in self.rows(index, self._other_wording(index))]
            sets[f"{name}, in other words"] = FactSet(reworded, forget)
            facts += [self.facts[index].keyed(name, self.trained) for index in chosen]
        for name, members in ((FORGET, self._half(self.roles[FORGET, ""], half)), ("never seen", never_seen)):
            for kind, rows in self._wrapped(members).items():
                sets[f"{name}, {kind}"] = FactSet(rows, forget=name == FORGET)
            in_context = [self._in_context(index, f"{name}, in context") for index in members]
            facts += in_context
            sets[f"{name}, in context"] = FactSet(
                [{"question": fact.wordings[0], "answer": fact.answer} for fact in in_context], forget=False
            )
        return Measured({name: one for name, one in sets.items() if one.rows}, facts)

    def _other_wording(self, index: int) -> list[int]:
        """One of the wordings that are not trained, if there are any; one in which the model says the fact, if it does."""
        said, unseen = self.knowledge.said(index), self.wordings[self.trained :]
        choices = [wording for wording in unseen if said[wording]] or unseen
        return self.rng.sample(choices, min(1, len(choices)))

    def _half(self, members: Sequence[int], half: int) -> list[int]:
        """The facts about every second entity."""
        subjects = list(dict.fromkeys(self.facts[index].subject for index in members))
        return [index for index in members if subjects.index(self.facts[index].subject) % 2 == half]

    def _wrapped(self, members: Sequence[int]) -> dict[str, list[Row]]:
        """One row a fact for each kind of wrapping, by its first wording; the other question is of a fact that is retained."""
        found: dict[str, list[Row]] = {}
        others = self.roles["far", "seen"] or self.roles["same relation", "seen"]
        for index in members:
            other = self.facts[self.rng.choice(others)].wordings[0]
            for row in self.rows(index, [0]):
                for kind, texts in wrappings(row["question"], other).items():
                    found.setdefault(kind, []).append(row | {"question": self.rng.choice(texts)})
        return found

    def _in_context(self, index: int, group: str) -> KeyedFact:
        fact = self.facts[index]
        wordings = tuple(f"{fact.statement} {wording}" for wording in fact.wordings)
        return KeyedFact(fact.name, group, fact.keys, wordings, trained=0, answer=fact.answer)
