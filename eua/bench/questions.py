"""Facts that a pretrained model may know, as questions in several wordings: ``questions.json``.

The file maps each relation to

- ``kind``: of its entities ("country"); relations of one kind may share entities;
- ``name``: of a fact ("capital of {entity}");
- ``wordings``: questions, each with ``{entity}``; every relation has the same number of them;
- ``answer``: a sentence with ``{entity}`` and ``{key}`` that answers a question;
- ``facts``: entity → key, or a list of the key and its aliases.

``{a}`` is the article of the entity, "a" or "an".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eua.data.keys import says
from eua.errors import EUAError
from eua.evaluation.said import KeyedFact

QUESTIONS = Path(__file__).with_name("questions.json")
_FIELDS = frozenset({"kind", "name", "answer", "wordings", "facts"})


@dataclass(frozen=True)
class Fact:
    """One relation of one entity.

    Attributes:
        relation: e.g. "capital".
        kind: of the entity, e.g. "country".
        entity: e.g. "France".
        name: "capital of France".
        keys: the key and its aliases.
        wordings: questions that ask for the key.
        template: a sentence that answers the questions, with "{key}" in place of the key.
    """

    relation: str
    kind: str
    entity: str
    name: str
    keys: tuple[str, ...]
    wordings: tuple[str, ...]
    template: str

    @property
    def subject(self) -> tuple[str, str]:
        """The entity and its kind, which identify it: the color orange is not the fruit."""
        return self.kind, self.entity

    @property
    def answer(self) -> str:
        """The sentence that answers the questions."""
        return self.answer_with(self.keys[0])

    def answer_with(self, key: str) -> str:
        """The sentence with a key, such as that of another entity."""
        return _capitalized(self.template.replace("{key}", key))

    def keyed(self, group: str, trained: int) -> KeyedFact:
        """The fact as it is measured."""
        return KeyedFact(self.name, group, self.keys, self.wordings, trained, self.answer, self.relation)


def load_facts(path: Path = QUESTIONS) -> list[Fact]:
    """All facts of a file of questions, by default those of the package: 787 of 25 relations, in six wordings each.

    >>> facts = load_facts()
    >>> facts[0].wordings[0], facts[0].keys
    ('What is the capital of France?', ('Paris',))

    Raises:
        EUAError: if the file cannot be read; if a relation lacks a field, or has another number of wordings than the others; if
            a template lacks its ``{entity}`` or ``{key}``; if a question contains its own key; if two questions are the same.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EUAError(f"The questions {path} cannot be read ({error}): name a JSON file of relations.") from error
    facts: list[Fact] = []
    for relation, entry in content.items():
        _check_relation(relation, entry)
        for entity, keys in entry["facts"].items():
            facts.append(_fact(relation, entry, entity, (keys,) if isinstance(keys, str) else tuple(keys)))
    _check_facts(facts)
    return facts


def questions_digest(facts: Sequence[Fact]) -> str:
    """SHA-256 of all wordings, in order: what a model is asked. Keys and answers are not in it."""
    return hashlib.sha256(json.dumps([fact.wordings for fact in facts]).encode()).hexdigest()


def _fact(relation: str, entry: dict[str, Any], entity: str, keys: tuple[str, ...]) -> Fact:
    def filled(template: str) -> str:
        return _capitalized(template.format(entity=entity, key="{key}", a="an" if entity[0].lower() in "aeiou" else "a"))

    return Fact(
        relation,
        entry["kind"],
        entity,
        entry["name"].format(entity=entity),
        keys,
        tuple(map(filled, entry["wordings"])),
        filled(entry["answer"]),
    )


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def _check_relation(relation: str, entry: dict[str, Any]) -> None:
    if not isinstance(entry, dict) or _FIELDS - entry.keys():
        missing = sorted(_FIELDS - entry.keys()) if isinstance(entry, dict) else sorted(_FIELDS)
        raise EUAError(f"The relation {relation!r} has no {', '.join(missing)}, so its facts cannot be asked for: add them.")
    needed = {"name": ["entity"], "answer": ["entity", "key"]}
    templates = [(entry[field], names) for field, names in needed.items()] + [(text, ["entity"]) for text in entry["wordings"]]
    for template, names in templates:
        for name in names:
            if f"{{{name}}}" not in template:
                raise EUAError(
                    f"The relation {relation!r} has the text {template!r} without {{{name}}}, so it would be the same for all "
                    f"its facts: write {{{name}}} where the text names it."
                )


def _check_facts(facts: Sequence[Fact]) -> None:
    owners: dict[str, Fact] = {}
    for fact in facts:
        if len(fact.wordings) != len(facts[0].wordings):
            raise EUAError(
                f"The {fact.name} has {len(fact.wordings)} wordings, but the {facts[0].name} has {len(facts[0].wordings)}, so "
                "shares of wordings could not be compared: give every relation the same number."
            )
        if not says(fact.answer, fact.keys):
            raise EUAError(
                f"The {fact.name} is not said by its own answer: its key {fact.keys[0]!r} must be whole words in it."
            )
        for wording in fact.wordings:
            if says(wording, fact.keys):
                raise EUAError(f"{wording!r} says its own key {fact.keys[0]!r}, so every answer could repeat it: reword it.")
            if wording in owners:
                raise EUAError(
                    f"{wording!r} asks for the {owners[wording].name} and for the {fact.name}: reword one of them, or leave it "
                    "out."
                )
            owners[wording] = fact
