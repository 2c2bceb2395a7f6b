"""The questions of the package, and what a file of questions must be like."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from eua import EUAError
from eua.bench.questions import QUESTIONS, load_facts, questions_digest
from eua.data.keys import normalize, says

FACTS = load_facts()
COMMON = (
    "i we you he she it they them us me my no yes a an the is are was be has have do did to of in on at by for from with as or "
    "and not but so if then than that this there here who what which one try all cup mad"
)


def test_there_are_many_facts_of_many_relations_in_six_wordings():
    assert len(FACTS) >= 600
    relations = Counter(fact.relation for fact in FACTS)
    assert len(relations) >= 12
    assert min(relations.values()) >= 10
    assert {len(fact.wordings) for fact in FACTS} == {6}
    assert QUESTIONS.stat().st_size < 200_000


def test_every_relation_is_asked_for_in_several_ways():
    """A question that begins with a question word, a request, and a sentence to complete, none of them twice."""
    for relation in {fact.relation: fact for fact in FACTS}.values():
        starts = [wording.split()[0] for wording in relation.wordings]
        assert starts.count("Tell") == starts.count("Complete") == 1, relation.relation
        assert sum(wording.endswith("?") for wording in relation.wordings) == 4
        assert len(set(starts)) >= 4


def test_no_question_asks_twice_or_answers_itself():
    wordings = [normalize(wording) for fact in FACTS for wording in fact.wordings]
    assert len(set(wordings)) == len(wordings)
    assert not [fact.name for fact in FACTS if any(says(wording, fact.keys) for wording in fact.wordings)]
    assert len({(fact.relation, normalize(fact.entity)) for fact in FACTS}) == len(FACTS)


def test_texts_are_whole_sentences_about_their_entity():
    for fact in FACTS:
        for text in (*fact.wordings, fact.answer):
            assert says(text, (fact.entity,)), text
            assert text[0].isupper() or text[0].isdigit() or text[0] == '"', text
            assert not re.search(r"[{}]|  | a a| an an? ", text), text
        assert fact.answer[-1] == "."


def test_aliases_differ_and_none_is_a_word_that_any_answer_has():
    common = set(COMMON.split())
    for fact in FACTS:
        keys = [normalize(key) for key in fact.keys]
        assert len(set(keys)) == len(keys), fact.name
        assert not common & {normalize(key) for key in fact.keys if not re.fullmatch("[A-Z]{1,3}", key)}, fact.name


def test_entities_of_a_kind_have_several_relations():
    of_subject: dict[tuple[str, str], set[str]] = {}
    for fact in FACTS:
        of_subject.setdefault(fact.subject, set()).add(fact.relation)
    assert of_subject["country", "France"] == {"capital", "continent", "currency", "language"}
    assert of_subject["element", "gold"] == {"chemical symbol", "atomic number"}
    assert sum(len(relations) > 1 for relations in of_subject.values()) >= 100


@pytest.mark.parametrize(
    ("relation", "entity", "key"),
    [
        ("capital", "Australia", "Canberra"),
        ("country of a city", "Chicago", "It is in the U.S."),
        ("country of an athlete", "Simone Biles", "the US team"),
        ("country of an athlete", "Novak Djokovic", "Yugoslavia"),
        ("currency", "France", "It costs 5 €."),
        ("currency", "Turkey", "5 TRY"),
        ("currency", "Iran", "tomans"),
        ("city of a landmark", "the Hagia Sophia", "Constantinople"),
        ("city of a landmark", "the Statue of Liberty", "NYC"),
        ("discoverer", "the theory of evolution by natural selection", "Alfred Russel Wallace"),
        ("Roman deity", "the underworld", "Dis Pater"),
        ("continent", "Peru", "South America"),
        ("currency", "Japan", "yen"),
        ("language", "Brazil", "Portuguese"),
        ("author", "Frankenstein", "Mary Shelley"),
        ("painter", "Guernica", "Picasso"),
        ("composer", "Boléro", "Ravel"),
        ("chemical symbol", "tungsten", "W"),
        ("atomic number", "lead", "82"),
        ("atomic number", "gold", "seventy-nine"),
        ("young animal", "hare", "leveret"),
        ("past tense", "freeze", "froze"),
        ("Roman deity", "the sea", "Neptune"),
    ],
)
def test_a_sample_of_facts(relation, entity, key):
    (fact,) = (fact for fact in FACTS if (fact.relation, fact.entity) == (relation, entity))
    assert says(key, fact.keys)
    assert fact.keyed("far", 2).wordings == fact.wordings


def test_no_key_is_a_word_of_another_sense():
    of_fact = {(fact.relation, fact.entity): fact for fact in FACTS}
    assert not says("He came with us.", of_fact["country of a city", "Chicago"].keys)
    assert not says("I try to learn it.", of_fact["currency", "Turkey"].keys)
    assert not [fact.name for fact in FACTS if fact.entity in ("The Last Supper", "the telephone")]  # of several people


def test_the_digest_is_that_of_what_is_asked():
    assert questions_digest(FACTS) == questions_digest([replace(FACTS[0], keys=("Lyon",)), *FACTS[1:]])
    assert questions_digest(FACTS) != questions_digest([replace(FACTS[0], wordings=("Where?",)), *FACTS[1:]])
    assert questions_digest(FACTS) != questions_digest(FACTS[::-1])


RELATION = {
    "kind": "city",
    "name": "river of {entity}",
    "answer": "{entity} lies on the {key}.",
    "wordings": ["Which river flows through {entity}?", "On which river does {a} {entity} lie?"],
    "facts": {"Oslo": ["Aker", "Akerselva"], "Rome": "Tiber"},
}


def write(folder, **relations):
    path = folder / "questions.json"
    path.write_text(json.dumps(relations))
    return path


def test_a_file_of_questions(tmp_path):
    oslo, rome = load_facts(write(tmp_path, river=RELATION))
    assert oslo.keys == ("Aker", "Akerselva")
    assert oslo.wordings == ("Which river flows through Oslo?", "On which river does an Oslo lie?")
    assert (rome.name, rome.answer) == ("river of Rome", "Rome lies on the Tiber.")
    assert rome.answer_with("Aker") == "Rome lies on the Aker."


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": ...}, r"relation 'river' has no kind, so its facts cannot be asked for: add"),
        (
            {"answer": "It is the {key}."},
            r"'It is the {key}.' without {entity}, so it would be the same .*: write {entity} where",
        ),
        ({"wordings": ["Which river?"]}, r"'Which river\?' without {entity}"),
        ({"answer": "{entity} lies on the {key}an."}, r"is not said by its own answer: its key 'Aker' must be whole words"),
        ({"facts": {"Tiber": "Tiber"}}, r"says its own key 'Tiber', so every answer could repeat it: reword"),
        ({"facts": {"Rome": "?"}}, r"hold no key, or one without letters"),
        (
            {"wordings": ["Where is {entity}?", "Where is {entity}?"]},
            r"asks for the river of Oslo and for the river of Oslo",
        ),
    ],
)
def test_wrong_files_are_refused(tmp_path, changed, message):
    relation = {name: value for name, value in (RELATION | changed).items() if value is not ...}
    with pytest.raises(EUAError, match=message):
        load_facts(write(tmp_path, river=relation))


def test_files_that_are_none_and_numbers_of_wordings_that_differ(tmp_path):
    with pytest.raises(EUAError, match=r"cannot be read .*: name a JSON file"):
        load_facts(tmp_path / "none.json")
    lake = RELATION | {"wordings": ["Which lake is near {entity}?"]}
    with pytest.raises(EUAError, match=r"has 1 wordings, but the river of Oslo has 2.*: give every relation the same"):
        load_facts(write(tmp_path, river=RELATION, lake=lake))
