"""The demo's people as a task: their worlds, and the keys that give a fact away."""

from __future__ import annotations

from eua.bench import people as people_module
from eua.bench.people import FIRST_WORLD, WRONG_ANSWERS, _measured, keyed, people
from eua.data.keys import says
from eua.demo.world import make_world
from tests.bench.conftest import WORLD


def test_worlds_are_others_than_those_on_which_settings_were_tried(monkeypatch, tmp_path):
    seeds = []

    def small(count: int, seed: int):
        seeds.append(seed)
        raise InterruptedError

    monkeypatch.setattr(people_module, "make_world", small)
    for seed in (0, 2):
        try:
            people(seed, cache=tmp_path)
        except InterruptedError:
            continue
    assert seeds == [FIRST_WORLD, FIRST_WORLD + 2]


def test_relearning_goes_on_for_a_hundred_steps(make_task):
    assert people(0, **make_task.keywords, **WORLD).relearning_steps[-1] == 100


def test_a_pets_name_and_a_mentors_surname_give_a_fact_away():
    facts = {fact.attribute: fact for fact in make_world(100, 3).forget}
    for attribute, joint in (("pet", " called "), ("mentor", " ")):
        fact = facts[attribute]
        alias = fact.value.partition(joint)[2]
        assert keyed(fact, "forget").keys == (fact.value, alias)
        assert says(f"I think it was {alias}.", keyed(fact, "forget").keys)
    for attribute in ("work", "prize", "dish", "birthplace"):
        assert keyed(facts[attribute], "forget").keys == (facts[attribute].value,)


def test_rows_to_forget_have_their_keys(make_task):
    task = people(0, **make_task.keywords, **WORLD)
    for row in [*task.forget, *task.second]:
        assert says(row["answer"], row["keys"])
        assert not [text for text in row["alternatives"] if says(text, row["keys"])]


def test_wrong_answers_are_worded_as_the_paraphrased_one():
    """Else a model that knows the fact prefers them, because it was trained on their wording."""
    for fact in make_world(20).forget:
        row = _measured(fact, fact.other_values())
        before, _, after = row["paraphrased_answer"].partition(fact.value)
        assert len(row["perturbed_answer"]) == WRONG_ANSWERS
        for value, text in zip(fact.other_values(), row["perturbed_answer"], strict=False):
            assert text == f"{before}{value}{after}" != row["answer"].replace(fact.value, value)
