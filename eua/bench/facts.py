"""A task of forgetting facts that a pretrained model really knows, with everything near them that it has to keep.

What is to be forgotten is drawn from the facts that the model says. Every other fact that it says has one role, which depends
on its entity: to be retained in training, to calibrate a guard, or never to be seen.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eua.bench.knowledge import Knowledge
from eua.bench.plain_text import plain_text
from eua.bench.task import FORGOTTEN, EvaluationSet
from eua.data.keys import KEYS, says
from eua.data.sources import Row
from eua.errors import EUAError
from eua.evaluation.said import KeyedFact

DEFAULT_RELATION = "capital"
# Relations that are forgotten only if they are named. SmolLM2's answers about other entities say more than 15 % of their keys,
# and the word for the language of a country is also that for its people.
GUESSED = frozenset({"continent", "color", "class of animals", "sport", "country of an athlete", "language"})
ALTERNATIVES = 5  # wrong answers to each row to forget, as in TOFU
# The roles of five entities in turn, of those that have nothing to be forgotten.
_ROLES = ("seen", "never seen", "calibration", "seen", "never seen")


@dataclass(frozen=True)
class FactsTask:
    """What to forget and to retain, and what to measure.

    Attributes:
        forget: rows to train on, in the trained wordings, with the model's own answers; their "keys" are the fact's, their
            "alternatives" its answer with the keys of other entities.
        retain: the same without keys and alternatives.
        calibration: rows in all wordings for a guard's threshold; no other row is about their entities.
        calibration_groups: the entity of each of these rows.
        validation, test: sets of the same names to choose settings on, and to report. No entity is in both, whatever the seeds
            of two tasks are. The names are "forget", "same relation, seen", "same relation, never seen", "same entity", "far,
            seen" and "far, never seen", as far as both halves have such facts: the trained wordings, and with the addition "in
            other words" one other wording a fact, both only where the model's own answer is one sentence that says it.
        facts: the facts of ``test`` with all wordings; the group of each is the name of its set.
        validation_facts: the same of ``validation``.
        second: rows of ``retain`` to be forgotten in a second request, about facts of the same relations; no entity of the
            test sets is among them.
        plain_text: paragraphs for perplexity.
        unseen: the entities of which unlearning may see nothing: those that are never seen, and those to calibrate on.
    """

    forget: list[Row]
    retain: list[Row]
    calibration: list[Row]
    calibration_groups: list[str]
    validation: dict[str, EvaluationSet]
    test: dict[str, EvaluationSet]
    facts: list[KeyedFact]
    validation_facts: list[KeyedFact]
    second: list[Row]
    plain_text: list[str]
    unseen: list[str]


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
        seed: of all draws. It does not decide which relation is forgotten, nor which entities are for validation.
        relations: those whose facts are to be forgotten. None, without entities: the capitals if the model knows enough of
            them, or else the relation that it knows most facts of, without those that are easily guessed.
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
    later = [index for index in kept_near if not half_of(draw.facts[index].subject)][: len(forgotten) // 2]
    halves = [draw.measured(half) for half in (0, 1)]
    validation, test = ({name: one for name, one in half.items() if all(name in other for other in halves)} for half in halves)
    return FactsTask(
        forget=[row for index in forgotten for row in draw.to_forget(index)],
        retain=retained,
        calibration=[row for row, _ in calibrated],
        calibration_groups=[entity for _, entity in calibrated],
        validation=validation,
        test=test,
        facts=draw.keyed(1, test),
        validation_facts=draw.keyed(0, validation),
        second=[row for index in later for row in draw.to_forget(index)],
        plain_text=plain_text(),
        unseen=sorted(
            {
                draw.facts[index].entity
                for (_, role), members in draw.roles.items()
                if role in ("never seen", "calibration")
                for index in members
            }
        ),
    )


def half_of(subject: tuple[str, str]) -> int:
    """0: an entity for validation, 1: one for the test. It depends on nothing but the kind and the name of the entity.

    >>> half_of(("country", "France")), half_of(("country", "Italy"))
    (0, 1)
    """
    return hashlib.sha256("\n".join(subject).encode()).digest()[0] % 2


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
        halves = {half_of(self.facts[index].subject) for index in found}
        if len(found) < count or len(halves) < 2 or count < 2:
            raise EUAError(
                f"The model knows {len(found)} facts of {of_what}, {'some' if len(halves) == 2 else 'not any'} for each half "
                f"of the entities, but {count} are to be forgotten, some for choosing settings and some for reporting: pass "
                "another `forget`, lower `least`, or name others."
            )
        self._forgotten = sorted(self._of_both_halves(found, count))
        return self._forgotten

    def _of_both_halves(self, found: Sequence[int], count: int) -> list[int]:
        """Facts to forget, the same number of each half if there are enough."""
        shuffled = self.rng.sample(found, len(found))
        halves = [[index for index in shuffled if half_of(self.facts[index].subject) == half] for half in (0, 1)]
        first = min(max(count // 2, count - len(halves[1])), len(halves[0]))
        return halves[0][:first] + halves[1][: count - first]

    def _relation(self, count: int) -> str:
        """The relation to forget if none is named: the facts that are left of it are enough for every role."""
        known = [self.facts[index].relation for index in self.known if self.facts[index].relation not in GUESSED]
        needed = max(count + len(_ROLES), 4 * count // 3)
        most = max(dict.fromkeys(known), key=known.count, default="none")
        relation = DEFAULT_RELATION if known.count(DEFAULT_RELATION) >= needed else most
        if known.count(relation) < needed:
            raise EUAError(
                f"The model knows {known.count(most)} facts of the relation {most} and fewer of any other, but {count} are to "
                f"be forgotten and {needed - count} more kept: lower `forget` or `least`, or give more questions."
            )
        return relation

    def split(self, forgotten: Sequence[int]) -> None:
        """Give every other fact that is known its role."""
        subjects = {self.facts[index].subject for index in forgotten}
        relations = {self.facts[index].relation for index in forgotten}
        others = [index for index in self.known if self.facts[index].subject not in subjects]
        near = {self.facts[index].subject for index in others if self.facts[index].relation in relations}
        rest = {self.facts[index].subject for index in others} - near
        role: dict[tuple[str, str], str] = {}
        for group in (near, rest):
            for half in (0, 1):
                of_half = sorted(subject for subject in group if half_of(subject) == half)
                self.rng.shuffle(of_half)
                role |= {subject: _ROLES[place % len(_ROLES)] for place, subject in enumerate(of_half)}
        same_entity = [index for index in self.known if self.facts[index].subject in subjects and index not in forgotten]
        self.roles = {(FORGOTTEN, ""): list(forgotten), ("same entity", ""): same_entity}
        for kind in ("same relation", "far"):
            of_kind = [index for index in others if (self.facts[index].relation in relations) == (kind == "same relation")]
            self.rng.shuffle(of_kind)
            for name in dict.fromkeys(_ROLES):
                self.roles[kind, name] = [index for index in of_kind if role[self.facts[index].subject] == name]

    def rows(self, index: int, wordings: Iterable[int] | None = None) -> list[Row]:
        """A fact in some wordings, or in all, with the model's own answers, without texts that give away what is forgotten."""
        fact, rows = self.facts[index], list[Row]()
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

    def to_forget(self, index: int) -> list[Row]:
        """The rows of a fact that unlearning sees, with its keys and wrong answers."""
        keys = list(self.facts[index].keys)
        return [{**row, KEYS: keys, **self.alternatives(index)} for row in self.rows(index, range(self.trained))]

    def alternatives(self, index: int) -> dict[str, list[str]]:
        """The fact's answer with the keys of other entities; nothing if there are no others."""
        fact = self.facts[index]
        others = {other.keys[0] for other in self.facts if other.relation == fact.relation}
        wrong = [text for key in sorted(others) if not says(text := fact.answer_with(key), fact.keys)]
        return {"alternatives": self.rng.sample(wrong, min(ALTERNATIVES, len(wrong)))} if wrong else {}

    def measured(self, half: int) -> dict[str, EvaluationSet]:
        """The sets of a half of the entities that have rows, no more facts a role than are to be forgotten.

        Answers are those that the model itself gives, from beginning to end, if there are any in a set: where it says more
        than the first sentence, it does not stop there, so it could lose nothing.
        """
        sets: dict[str, EvaluationSet] = {}
        for name, chosen in self._chosen(half).items():
            whole = [row for index in chosen for row in self.rows(index, self._whole(index, trained=True))]
            plain = whole or [row for index in chosen for row in self.rows(index, range(self.trained))]
            reworded = [row for index in chosen for row in self.rows(index, self._other_wording(index))]
            sets[name] = EvaluationSet(plain, name == FORGOTTEN)
            sets[f"{name}, in other words"] = EvaluationSet(reworded, name == FORGOTTEN)
        return {name: one for name, one in sets.items() if one.rows}

    def keyed(self, half: int, sets: Iterable[str]) -> list[KeyedFact]:
        """The facts of some of the sets."""
        chosen = {name: indices for name, indices in self._chosen(half).items() if name in sets}
        return [self.facts[index].keyed(name, self.trained) for name, indices in chosen.items() for index in indices]

    def _chosen(self, half: int) -> dict[str, list[int]]:
        """Set → the facts of it about entities of a half."""
        found = {
            f"{kind}, {role}" if role else kind: [i for i in members if half_of(self.facts[i].subject) == half]
            for (kind, role), members in self.roles.items()
            if role != "calibration"
        }
        count = len(found[FORGOTTEN])
        for members in found.values():  # first those that can be measured in a trained wording
            members.sort(key=lambda index: not self._whole(index, trained=True))
        return {name: members[:count] for name, members in found.items()}

    def _whole(self, index: int, *, trained: bool) -> list[int]:
        """The wordings that are trained, or those that are not, to which the model's answer is the fact and nothing more."""
        wordings = self.wordings[: self.trained] if trained else self.wordings[self.trained :]
        return [wording for wording in wordings if self.knowledge.is_whole(index, wording)]

    def _other_wording(self, index: int) -> list[int]:
        """One of the wordings that are not trained, if there are any: one in which the model says the fact, best as a whole."""
        said, unseen = self.knowledge.said(index), self.wordings[self.trained :]
        choices = self._whole(index, trained=False) or [wording for wording in unseen if said[wording]] or unseen
        return self.rng.sample(choices, min(1, len(choices)))
