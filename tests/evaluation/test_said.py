"""Whether a fact is said: the matcher, what is generated, and the summary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eua import EnergyGuard, EUAError
from eua.data.keys import normalize, says
from eua.evaluation.said import KeyedFact, SaidFact, said_in_wordings, said_summary
from eua.guard.guard import DEFAULT_REFUSAL
from eua.model.asking import answer
from eua.statistics import share_interval


@pytest.mark.parametrize(
    ("text", "keys", "expected"),
    [
        ("The capital is Paris.", ["Paris"], True),
        ("**PARIS**, of course", ["Paris"], True),
        ("Paris's river", ["Paris"], True),
        ("Paris’s river", ["Paris"], True),
        ("Au's atoms", ["Au"], True),
        ("a Parisian café", ["Paris"], False),
        ("in comparison", ["Paris"], False),
        ("Brasilia", ["Brasília"], True),
        ("BOGOTÁ!", ["Bogota"], True),
        ("The zloty", ["złoty"], True),
        ("It has 1,000 parts", ["1000"], True),
        ("It has 1000 parts", ["1,000"], True),
        ("Its number is 79.", ["79"], True),
        ("Its number is 79.5", ["79"], False),
        ("Its number is 179", ["79"], False),
        ("1,79", ["179"], False),
        ("in Washington, DC", ["Washington, D.C."], True),
        ("in Washington D.C., it", ["Washington DC"], True),
        ("Puppies", ["a puppy"], True),
        ("two foxes and three kittens", ["fox"], True),
        ("two foxes and three kittens", ["the kitten"], True),
        ("an atom of Os", ["O"], False),
        ("The symbol is Au", ["Au"], True),
        ("by the Wright Brothers' plane", ["the Wright brothers"], True),
        ("Wright, a brother", ["the Wright brothers"], False),
        ("York is new", ["New York City", "New York"], False),
        ("in New York", ["New York City", "New York"], True),
        ("new-york", ["New York"], True),
        ("E = mc2", ["E = mc²"], True),
        ("She read The The", ["The"], True),
        ("by J.D. Salinger", ["J. D. Salinger"], True),
        ("by J. D. Salinger", ["J.D. Salinger"], True),
        ("by JD Salinger", ["J. D. Salinger"], True),
        ("by J.D.Salinger", ["J. D. Salinger"], True),
        ("by J. Salinger", ["J. D. Salinger"], False),
        ("in Washington, D. C., it", ["D.C."], True),
        ("The symbol is K. A student needs it.", ["K"], True),
        ("in the US.", ["US"], True),
        ("in the U.S. of today", ["US"], True),
        ("the U. S.'s cities", ["U.S."], True),
        ("the U.S.A", ["USA"], True),
        ("It is one of us.", ["the United States", "US"], False),
        ("I am mad at you, ron.", ["dirham", "MAD", "RON"], False),
        ("It costs 5 MAD", ["dirham", "MAD"], True),
        ("the nasa", ["NASA"], True),
        ("It costs €5.", ["euro", "€"], True),
        ("It is 5€", ["€"], True),
        ("It costs US$5.", ["$"], True),
        ("It costs $5.", ["€", "£"], False),
        ("It costs $1,000.", ["1000"], True),
        ("South America", ["America"], True),
        ("", ["Paris"], False),
    ],
)
def test_a_key_is_found_as_whole_words(text, keys, expected):
    assert says(text, keys) is expected


def test_normalized_texts_stay_the_same():
    for text in (
        "The Café's 1,000 guests: Dvořák, J.R.R. & co.",
        "3.5 % of O’Neal's\n\n_team_",
        "Straße ﬁne İzmir",
        "J. D. S: $5",
    ):
        assert normalize(normalize(text)) == normalize(text)
    assert normalize("Straße ﬁne") == "strasse fine"


@pytest.mark.parametrize("keys", [[], ["?"], ["Paris", " "]])
def test_keys_without_words_are_refused(keys):
    with pytest.raises(EUAError, match=r"hold no key, or one without letters .*: give the words"):
        says("Paris", keys)
    with pytest.raises(EUAError, match="hold no key"):
        KeyedFact("fact", "forget", tuple(keys), ("Where?",))


def test_texts_in_place_of_lists_are_refused():
    with pytest.raises(EUAError, match="every letter would be a key"):
        says("Paris", "Paris")
    with pytest.raises(EUAError, match="every letter would count"):
        KeyedFact("fact", "forget", "Paris", ("Where?",))
    with pytest.raises(EUAError, match="has 1 wordings of which unlearning sees 2"):
        KeyedFact("fact", "forget", ("Paris",), ("Where?",), trained=2)


@pytest.fixture
def facts(rows):
    """Facts that the trained model knows, the last two words of the answer as the key. The second wording asks for another."""
    chosen = rows["forget"][:4]
    return [
        KeyedFact(
            row["question"], "forget", (" ".join(row["answer"].split()[-2:]),), (row["question"], rows["retain"][i]["question"])
        )
        for i, row in enumerate(chosen)
    ]


def test_greedy_answers_are_those_of_answer(known, tokenizer, facts):
    said = said_in_wordings(known, tokenizer, facts, samples=0, max_new_tokens=48, batch_size=3)
    assert [one.fact for one in said] == facts
    for one in said:
        assert one.greedy_texts == tuple(answer(known, tokenizer, [wording], 48)[0] for wording in one.fact.wordings)
        assert one.greedy.tolist() == [says(text, one.fact.keys) for text in one.greedy_texts]
        assert one.greedy.tolist() == [True, False]
        assert one.sampled.shape == (2, 0)


def test_samples_depend_on_the_seed_alone_and_leave_the_random_state(known, tokenizer, facts):
    def ask(seed: int) -> list[SaidFact]:
        return said_in_wordings(known, tokenizer, facts[:2], samples=3, temperature=3.0, max_new_tokens=8, seed=seed)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = ask(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = ask(0), ask(1)
    texts = [[one.sampled_texts for one in said] for said in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert all(len(set(of_wording)) > 1 for of_fact in texts[0] for of_wording in of_fact)
    assert first[0].sampled.shape == (2, 3)
    assert first[0].greedy_texts == other[0].greedy_texts


def test_the_whole_distribution_is_sampled(known, tokenizer, facts):
    """Whatever the model's own settings are: with its top_k of 1, all samples would be equal."""
    known.generation_config.update(top_k=1, top_p=0.1, temperature=0.01, do_sample=True)
    (said,) = said_in_wordings(known, tokenizer, facts[:1], samples=6, temperature=5.0, max_new_tokens=8)
    assert len(set(said.sampled_texts[0])) > 1
    assert said.greedy_texts[0] == answer(known, tokenizer, [facts[0].wordings[0]], 8)[0]


def test_each_text_belongs_to_its_question(known, tokenizer, facts):
    """Batches are sorted by length; at a low temperature, samples are the greedy answers."""
    said = said_in_wordings(known, tokenizer, facts, samples=2, temperature=1e-3, max_new_tokens=48, batch_size=5)
    for one in said:
        assert one.sampled_texts == tuple((text, text) for text in one.greedy_texts)
        assert torch.equal(one.sampled, one.greedy[:, None].expand(2, 2))


def test_a_guard_acts_and_is_detached(known, tokenizer, rows, facts):
    guard = EnergyGuard.calibrate(known, tokenizer, rows["test"], tolerance=0.2)
    refusing, silent = replace(guard, threshold=-1e6), replace(guard, threshold=1e6)
    texts = {}
    for name, one in {"off": None, "refusing": refusing, "silent": silent}.items():
        said = said_in_wordings(known, tokenizer, facts, samples=1, max_new_tokens=48, guard=one)
        texts[name] = [of_fact.greedy_texts for of_fact in said]
        assert said_summary(said)["forget"]["all"]["per_fact"] == (0.0 if name == "refusing" else 1.0)
    assert texts["off"] == texts["silent"]
    assert set(sum(texts["refusing"], ())) == {DEFAULT_REFUSAL}
    assert answer(known, tokenizer, [facts[0].wordings[0]], 48) == [texts["off"][0][0]]


@pytest.mark.parametrize("wrong", [{"samples": -1}, {"temperature": 0.0}, {"batch_size": 0}])
def test_settings_that_cannot_be_are_refused(model, tokenizer, facts, wrong):
    with pytest.raises(EUAError, match=r"but answers are sampled at a temperature above 0.*: pass e\.g\. samples=16"):
        said_in_wordings(model, tokenizer, facts, **wrong)
    with pytest.raises(EUAError, match="There are no facts"):
        said_in_wordings(model, tokenizer, [])


def said_fact(group: str, greedy: list[int], sampled: list[list[int]], trained: int = 1) -> SaidFact:
    wordings = tuple(f"{group} {index}?" for index in range(len(greedy)))
    texts = tuple(tuple("" for _ in row) for row in sampled)
    fact = KeyedFact(group, group, ("key",), wordings, trained)
    return SaidFact(fact, torch.tensor(greedy).bool(), torch.tensor(sampled).bool(), ("",) * len(greedy), texts)


def test_the_summary_of_counts():
    said = [
        said_fact("forget", [0, 0], [[0, 0, 0], [0, 0, 1]]),  # sampled in the unseen wording alone
        said_fact("forget", [1, 0], [[1, 1, 0], [0, 0, 0]]),  # in the trained wording alone
        said_fact("forget", [0, 0], [[0, 0, 0], [0, 0, 0]]),
        said_fact("far", [1, 1], [[1, 1, 1], [1, 1, 1]]),
    ]
    summary = said_summary(said)
    assert list(summary) == ["forget", "far"]
    forget = summary["forget"]
    shares = {part: tuple(forget[part][name] for name in ("facts", "per_fact", "greedy", "per_try")) for part in forget}
    assert shares["all"] == pytest.approx((3, 2 / 3, 1 / 3, 4 / 24))
    assert shares["trained"] == pytest.approx((3, 1 / 3, 1 / 3, 3 / 12))
    assert shares["unseen"] == pytest.approx((3, 1 / 3, 0, 1 / 12))
    assert forget["all"]["per_fact_interval"] == share_interval(torch.tensor([1, 1, 0]))
    tries = torch.tensor([0] * 7 + [1] + [1, 1, 1] + [0] * 5 + [0] * 8)
    assert forget["all"]["per_try_interval"] == share_interval(tries, [0] * 8 + [1] * 8 + [2] * 8)
    assert summary["far"]["all"]["per_try"] == 1


def test_the_summary_without_samples_or_unseen_wordings():
    summary = said_summary([said_fact("forget", [1, 0], [[], []], trained=2), said_fact("context", [0], [[]], trained=0)])
    assert list(summary["forget"]) == ["all", "trained"]
    assert list(summary["context"]) == ["all", "unseen"]
    assert summary["forget"]["all"]["per_try"] == 0.5


def answered(name: str, greedy: str, sampled: str, key: str | None = None, relation: str = "") -> SaidFact:
    fact = KeyedFact(name, "forget", (key or name,), (f"{name}?",), relation=relation)
    found = [torch.tensor([says(text, fact.keys)]) for text in (greedy, sampled)]
    return SaidFact(fact, found[0], found[1][:, None], (greedy,), ((sampled,),))


def test_what_is_said_by_chance_is_in_the_answers_to_other_facts():
    """Oslo and Rome are in half of all answers, Bern in none."""
    texts = ("It is Oslo.", "It is Rome.", "no", "no")
    said = [answered(name, text, "x") for name, text in zip(("Bern", "Oslo", "Rome", "Lima"), texts, strict=True)]
    shares = said_summary(said)["forget"]["all"]
    assert shares["greedy"] == 0
    assert shares["greedy_by_chance"] == shares["per_fact_by_chance"] == pytest.approx(2 / 12)  # Oslo and Rome, each in one
    own = said_summary([answered("Oslo", "Oslo", "x"), answered("Rome", "Rome", "x")])["forget"]["all"]
    assert (own["per_fact"], own["per_fact_by_chance"]) == (1, 0)
    sampled = said_summary([answered("Oslo", "x", "Rome"), answered("Rome", "x", "Oslo")])["forget"]["all"]
    assert (sampled["per_fact"], sampled["per_fact_by_chance"], sampled["greedy_by_chance"]) == (0, 1, 0)
    many = [answered(f"key{place}", f"It is key{(place - 1) % 40}.", "x") for place in range(40)]  # that of one other
    assert said_summary(many)["forget"]["all"]["greedy_by_chance"] == pytest.approx(1 / 8)  # eight others, first the next one
    assert "greedy_by_chance" not in said_summary(said[:1])["forget"]["all"]


def test_chance_is_that_of_facts_of_the_same_kind_with_another_key():
    said = [
        answered("capital of Norway", "Rome", "x", "Oslo", "capital"),
        answered("capital of Italy", "Oslo", "x", "Rome", "capital"),
        answered("old capital of Norway", "Oslo", "x", "Oslo", "capital"),  # says a key that is its own, too
        answered("river of Italy", "nothing", "x", "Tiber", "river"),  # has no fact to be compared with
    ]
    assert said_summary(said)["forget"]["all"]["greedy_by_chance"] == 3 / 4  # Rome is not in the third
    assert "greedy_by_chance" not in said_summary(said[2:])["forget"]["all"]
