"""What a model knows, and the task that is drawn from it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain

import pytest

from eua import EUAError
from eua.bench.facts import GUESSED, facts_task, half_of
from eua.bench.knowledge import Knowledge, ask_facts
from eua.bench.plain_text import plain_text
from eua.bench.questions import load_facts
from eua.bench.wrappings import PREFIXES, SUFFIXES, wrappings
from eua.data.keys import says
from eua.demo.world import _VALUES, _WORDINGS


@pytest.fixture(scope="module")
def world_facts(world, tmp_path_factory):
    """The facts of the demo's world, each in the three wordings of its attribute."""
    relations = {}
    for attribute, wordings in _WORDINGS.items():
        of_person = {}
        for fact in world.all():
            questions = [question.format(n=fact.person) for question, _ in wordings]
            if fact.question in questions:
                of_person[fact.person] = next(value for value in _VALUES[attribute] if value in fact.answer)
        question, answer = wordings[0]
        relations[attribute] = {
            "kind": "person",
            "name": f"{attribute} of {{entity}}",
            "wordings": [question.replace("{n}", "{entity}") for question, _ in wordings],
            "answer": answer.replace("{n}", "{entity}").replace("{v}", "{key}"),
            "facts": of_person,
        }
    path = tmp_path_factory.mktemp("questions") / "world.json"
    path.write_text(json.dumps(relations))
    return load_facts(path)


@pytest.fixture(scope="module")
def asked(world_facts, trained_folder, tokenizer, tmp_path_factory):
    """The knowledge of the trained model, and the cache."""
    from transformers import LlamaForCausalLM

    cache = tmp_path_factory.mktemp("knowledge")
    model = LlamaForCausalLM.from_pretrained(trained_folder).eval()
    return ask_facts(model, tokenizer, world_facts, cache=cache, max_new_tokens=48, batch_size=64), cache


def test_a_model_knows_what_it_was_trained_on(asked, world_facts, rows):
    """Every fact was trained in one wording."""
    knowledge, _ = asked
    assert len(world_facts) == 80
    assert len(knowledge.known(1)) >= 76
    assert len(knowledge.known(3)) < len(knowledge.known(2)) < len(knowledge.known(1))
    table = knowledge.by_relation()
    assert sum(row["facts"] for row in table.values()) == 80
    assert sum(row["in all"] for row in table.values()) == len(knowledge.known(3))
    trained = {row["question"]: row["answer"] for group in rows.values() for row in group}
    same = [
        knowledge.own_answer(index, place) == trained[wording]
        for index, fact in enumerate(world_facts)
        for place, wording in enumerate(fact.wordings)
        if wording in trained
    ]
    assert len(same) == 80
    assert sum(same) >= 76


def test_answers_are_kept_for_the_same_model_and_facts_alone(asked, known, tokenizer, world_facts, forwards):
    knowledge, cache = asked
    assert ask_facts(known, tokenizer, world_facts, cache=cache, max_new_tokens=48) == knowledge
    assert not forwards
    other = [replace(world_facts[0], keys=("Atlantis",)), *world_facts[1:3]]
    ask_facts(known, tokenizer, other, cache=cache, max_new_tokens=2)
    assert forwards
    forwards.clear()
    known.lm_head.weight.data[0] += 1
    ask_facts(known, tokenizer, other, cache=cache, max_new_tokens=2)
    assert forwards
    assert len(list(cache.iterdir())) == 3


def test_an_answer_that_does_not_say_the_fact_is_replaced(world_facts):
    fact = world_facts[0]
    answers = (f"Well, {fact.keys[0]} it is. And more", "I do not know.", f"Unfinished {fact.keys[0]}")
    knowledge = Knowledge((fact,), (answers,))
    assert knowledge.said(0) == [True, False, True]
    assert [knowledge.own_answer(0, place) for place in range(3)] == [f"Well, {fact.keys[0]} it is.", fact.answer, fact.answer]


def test_wrappings_keep_the_question():
    found = wrappings("Who?", "What?")
    assert list(map(len, found.values())) == [len(PREFIXES), len(SUFFIXES), 2]
    assert all("Who?" in text and text != "Who?" for text in chain(*found.values()))


@pytest.fixture(scope="module")
def knowledge(world_facts):
    """A model that says every fact in every wording, with one answer."""
    return Knowledge(tuple(world_facts), tuple((fact.answer,) * len(fact.wordings) for fact in world_facts))


def subjects(world_facts, rows):
    """The people whom rows are about."""
    return {fact.entity for fact in world_facts for row in rows if fact.entity in row["question"]}


def test_roles_do_not_overlap(knowledge, world_facts):
    task = facts_task(knowledge, 0, relations=["profession"], forget=4, retain=20)
    assert len(task.forget) == 4
    assert len(task.retain) == 20
    forgotten, retained = subjects(world_facts, task.forget), subjects(world_facts, task.retain)
    calibrated = set(task.calibration_groups)
    assert len(forgotten | retained | calibrated) == len(forgotten) + len(retained) + len(calibrated)
    assert subjects(world_facts, task.calibration) == calibrated
    assert {row["question"] for row in task.forget} <= {
        fact.wordings[0] for fact in world_facts if fact.relation == "profession"
    }
    assert len(task.calibration) == len(task.calibration_groups) == len({row["question"] for row in task.calibration})
    for part in (task.validation, task.test):
        never = [name for name in part if "never seen" in name]
        assert len(never) == 4
        for name in never:
            assert not subjects(world_facts, part[name].rows) & (forgotten | retained | calibrated), name
    assert len(task.plain_text) == 30


def test_sets_hold_what_their_names_say(knowledge, world_facts):
    task = facts_task(knowledge, 1, relations=["pet", "dish"], forget=6, retain=16, trained=2)
    by_wording = {wording: (fact, place) for fact in world_facts for place, wording in enumerate(fact.wordings)}
    trained = {row["question"] for row in task.forget}
    seen = {row["question"] for row in task.retain}
    forgotten = {fact for fact in world_facts if fact.wordings[0] in trained}
    assert len(trained) == 12
    for sets in (task.validation, task.test):
        assert not [name for name in sets if "calibration" in name]
        assert {name: one.forget for name, one in sets.items()} == {name: name.startswith("forget") for name in sets}
        for name in ("forget", "same relation, seen", "same relation, never seen", "same entity", "far, seen"):
            plain = [by_wording[row["question"]] for row in sets[name].rows]
            other = [by_wording[row["question"]] for row in sets[f"{name}, in other words"].rows]
            assert {place for _, place in plain} == {0, 1}
            assert {place for _, place in other} == {2}
            assert {fact for fact, _ in plain} == {fact for fact, _ in other}
            questions = {row["question"] for row in sets[name].rows}
            assert (questions <= trained) == (name == "forget")
            assert (questions <= seen) == name.endswith(", seen")
            relations, entities = {fact.relation for fact, _ in plain}, {fact.entity for fact, _ in plain}
            assert (relations <= {"pet", "dish"}) == name.startswith(("forget", "same relation"))
            assert (entities <= {fact.entity for fact in forgotten}) == (name in ("forget", "same entity"))
    halves = [{row["question"] for row in part["forget"].rows} for part in (task.validation, task.test)]
    assert halves[0] | halves[1] == trained
    assert not halves[0] & halves[1]


def test_a_second_request_forgets_retained_facts_of_the_same_relation(knowledge, world_facts):
    task = facts_task(knowledge, 0, relations=["profession"], forget=4, retain=20)
    assert 1 <= len(task.second) <= 2
    retained = [(row["question"], row["answer"]) for row in task.retain]
    for row in task.second:
        assert (row["question"], row["answer"]) in retained
        assert row["question"] in {fact.wordings[0] for fact in world_facts if fact.relation == "profession"}
        assert row["alternatives"]
    tested = subjects(world_facts, [row for one in task.test.values() for row in one.rows])
    assert not subjects(world_facts, task.second) & tested


def test_answers_that_go_on_are_not_measured_where_the_model_also_gives_whole_ones(knowledge, world_facts):
    """It goes on after the first sentence about every other person in the trained wording, and about all in the second."""

    def answered(place: int, fact) -> tuple[str, ...]:
        more = f"{fact.answer} And more of it"
        return (more if place % 2 else fact.answer), more, fact.answer

    answers = tuple(answered(place, fact) for place, fact in enumerate(world_facts))
    task = facts_task(replace(knowledge, answers=answers), 0, relations=["pet"], forget=6, least=2)
    places = {fact.wordings[0]: place for place, fact in enumerate(world_facts)}
    last = {fact.wordings[2] for fact in world_facts}
    for part in (task.validation, task.test):
        for name, one in part.items():
            questions = {row["question"] for row in one.rows}
            assert questions <= last if "other words" in name else not [q for q in questions if places[q] % 2]
    assert [row for row in task.forget if places[row["question"]] % 2]  # they are trained on all the same
    unlike = replace(knowledge, answers=tuple((answer[1],) * 3 for answer in answers))
    assert facts_task(unlike, 0, relations=["pet"], forget=6, least=2).test["forget"].rows  # there are no others


def test_a_fact_is_reworded_as_the_model_says_it(knowledge, world_facts):
    """It says facts in the first and the last wording alone."""
    answers = tuple((fact.answer, "I do not know.", fact.answer) for fact in world_facts)
    task = facts_task(replace(knowledge, answers=answers), 0, relations=["pet"], forget=6, least=2)
    reworded = [row["question"] for name, one in task.test.items() if "other words" in name for row in one.rows]
    assert len(reworded) > 10
    assert set(reworded) <= {fact.wordings[2] for fact in world_facts}


def test_facts_are_those_of_the_sets(knowledge):
    task = facts_task(knowledge, 1, relations=["pet"], forget=6, retain=16)
    groups = {fact.group for fact in task.facts}
    assert groups == {name for name in task.test if not name.endswith("words")}
    for fact in task.facts:
        rows = {row["question"] for row in task.test[fact.group].rows}
        assert fact.wordings[0] in rows
        assert says(fact.answer, fact.keys)
        assert fact.trained == 1


def test_no_entity_is_for_validation_at_one_seed_and_for_the_test_at_another(knowledge, world_facts):
    tasks = [facts_task(knowledge, seed, relations=["profession"], forget=6, retain=16) for seed in range(5)]
    chosen, reported = (
        {entity for part in parts for one in part.values() for entity in subjects(world_facts, one.rows)}
        for parts in ([task.validation for task in tasks], [task.test for task in tasks])
    )
    assert len(chosen) > 5
    assert len(reported) > 5
    assert not chosen & reported
    for task in tasks:
        assert len(task.validation["forget"].rows) == len(task.test["forget"].rows) == 3
    assert len({task.forget[0]["question"] for task in tasks}) > 1


def test_the_halves_of_entities_stay_the_same():
    found = [half_of(fact.subject) for fact in load_facts() if fact.relation == "capital"]
    assert found[:8] == [0, 0, 1, 0, 0, 1, 0, 1]
    assert 25 <= sum(found) <= 35


def test_both_halves_have_the_same_sets(world_facts):
    """The model knows nothing else about the people of one half, so "same entity" would be a set of the other one alone."""
    answers = tuple(
        (fact.answer if fact.relation == "pet" or half_of(fact.subject) else "I do not know.",) * 3 for fact in world_facts
    )
    task = facts_task(Knowledge(tuple(world_facts), answers), 0, relations=["pet"], forget=8)
    assert list(task.validation) == list(task.test)
    assert "same entity" not in task.test
    assert {fact.group for fact in task.facts} < set(task.test)


@pytest.fixture(scope="module")
def all_known():
    """A model that says every fact of the package."""
    facts = load_facts()
    return Knowledge(tuple(facts), tuple((fact.answer,) * len(fact.wordings) for fact in facts))


def relations_of(task):
    questions = {row["question"] for row in task.forget}
    return {fact.relation for fact in load_facts() if questions & set(fact.wordings)}


def test_capitals_are_forgotten_unless_the_model_knows_too_few(all_known):
    assert [relations_of(facts_task(all_known, seed)) for seed in range(3)] == [{"capital"}] * 3
    chosen = {"continent", "color", "class of animals", "language", "sport", "country of an athlete", "past tense"}
    assert chosen > GUESSED
    some = tuple(
        answers if fact.relation in chosen else ("I do not know.",) * 6
        for fact, answers in zip(all_known.facts, all_known.answers, strict=True)
    )
    others = [relations_of(facts_task(Knowledge(all_known.facts, some), seed, forget=20)) for seed in range(3)]
    assert others == [{"past tense"}] * 3
    named = facts_task(Knowledge(all_known.facts, some), 0, relations=["color"], forget=8)
    assert relations_of(named) == {"color"}


def test_alternatives_are_answers_with_the_keys_of_others(all_known):
    task = facts_task(all_known, 0, relations=["capital", "currency"])
    by_wording = {fact.wordings[0]: fact for fact in all_known.facts}
    for row in task.forget:
        fact = by_wording[row["question"]]
        wrong = row["alternatives"]
        assert row["keys"] == list(fact.keys)
        assert says(row["answer"], row["keys"])
        assert len(set(wrong)) == 5
        for text in wrong:
            assert not says(text, fact.keys)
            assert says(text, (fact.entity,))
            assert says(text, [key for other in all_known.facts if other.relation == fact.relation for key in other.keys])
    assert not [row for one in task.test.values() for row in one.rows if "alternatives" in row]


def test_everything_about_entities_may_be_forgotten(knowledge, world_facts):
    people = sorted({fact.entity for fact in world_facts})[:4]
    task = facts_task(knowledge, 0, entities=people, forget=3, retain=16)
    assert len(task.forget) == 16
    assert subjects(world_facts, task.forget) == set(people)
    assert "same entity" not in task.test


def test_the_seed_decides(knowledge):
    one, same, other = (facts_task(knowledge, seed, forget=4) for seed in (0, 0, 1))
    assert one == same != other


def test_an_answer_that_gives_the_forgotten_away_is_not_trained_on(world_facts):
    """A model mentions a fact to forget in all its answers about other things."""
    forgotten = next(fact for fact in world_facts if fact.relation == "pet")
    answers = tuple(
        tuple(f"{fact.keys[0]}, as {forgotten.entity} has {forgotten.keys[0]}." for _ in fact.wordings) for fact in world_facts
    )
    pets = sum(fact.relation == "pet" for fact in world_facts)
    task = facts_task(Knowledge(tuple(world_facts), answers), 0, relations=["pet"], forget=pets)
    assert sum(forgotten.entity in row["answer"] for row in task.forget) == pets
    kept = [one.rows for name, one in task.test.items() if not name.startswith("forget")]
    assert not [row for row in chain(task.retain, task.calibration, *kept) if forgotten.entity in row["answer"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relations": ["pet"], "entities": ["Ann"]}, r"but a task forgets facts of relations or everything .*: pass one"),
        ({"relations": ["pet"], "forget": 60}, r"facts of the relation pet, some for .* but 60 are to be forgotten, .*: pass"),
        ({"forget": 60}, r"facts of the relation \w+ and fewer of any other, but 60 are to be forgotten .*: lower"),
        (
            {"relations": ["pet"], "forget": 1},
            r"facts of the relation pet, some .* but 1 are to be forgotten, .*: pass another",
        ),
        ({"entities": ["Nobody"]}, r"knows 0 facts of the entities Nobody, not any for each half"),
        ({"trained": 4}, r"trained = 4 and least = 3, but every fact has 3 wordings: pass numbers from 1 to 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(knowledge, settings, message):
    with pytest.raises(EUAError, match=message):
        facts_task(knowledge, 0, **settings)


def test_a_model_that_knows_nothing_has_no_task(world_facts):
    ignorant = Knowledge(tuple(world_facts), (("I do not know.",) * 3,) * len(world_facts))
    with pytest.raises(EUAError, match="knows 0 facts of the relation none"):
        facts_task(ignorant, 0)


def test_the_plain_text_says_none_of_the_facts():
    paragraphs = plain_text()
    assert len(paragraphs) == len(set(paragraphs)) == 30
    assert all(40 <= len(paragraph.split()) <= 100 for paragraph in paragraphs)
    for fact in load_facts():
        if fact.kind not in ("word", "verb", "noun"):  # everyday words
            assert not [text for text in paragraphs if says(text, (fact.entity,)) and says(text, fact.keys)], fact.name
