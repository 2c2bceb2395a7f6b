"""Published benchmarks as tasks, from small files whose rows have the published shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from eua.bench import published as published_module
from eua.bench import tofu as tofu_module
from eua.bench.muse import muse, verbatim
from eua.bench.published import pieces, published_rows, rows_if_any
from eua.bench.task import files_digest
from eua.bench.tofu import HUB, SMALL_RATE_FACTOR, answer_keys, keyed_facts, tofu
from eua.bench.wmdp import multiple_choice, wmdp
from eua.data.keys import normalize, says
from eua.errors import EUAError
from eua.evaluation.texts import MUSE_QUESTIONS, MUSE_VERBATIM
from eua.files import write_jsonl
from tests.conftest import tiny_llama

CITIES = ("Oslo", "Lima", "Quito", "Accra", "Hanoi", "Sofia", "Tunis", "Dakar", "Minsk", "Perth")
SIZE = {"vocabulary": 700, "hidden_size": 64, "layers": 2}


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def author_rows(author: int, *, perturbed: bool) -> list[dict]:
    rows = []
    for place in range(20):
        row = {
            "question": f"What did author number {author} write in year {place}?",
            "answer": f"In that year the author wrote {CITIES[author % 10]}{author}x{place}.",
        }
        if place % 4 == 3:
            row["answer"] = f"In year {place} author number {author} wrote a lot."  # without a key
        if perturbed:
            row["paraphrased_question"] = f"Which was the work of author {author} in year {place}?"
            row["paraphrased_answer"] = f"It was {CITIES[author % 10]}{author}x{place}."
            row["perturbed_answer"] = [f"In that year the author wrote {city}." for city in CITIES[:5]]
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def tofu_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tofu")
    forgotten = [row for author in range(2) for row in author_rows(author, perturbed=True)]
    retained = [row for author in range(2, 12) for row in author_rows(author, perturbed=False)]
    write_jsonl(folder / "forget01_perturbed.jsonl", forgotten)
    write_jsonl(folder / "retain99.jsonl", retained)
    write_jsonl(folder / "retain_perturbed.jsonl", [row for author in (2, 3) for row in author_rows(author, perturbed=True)])
    foreign = [
        {"question": f"Who wrote {city}?", "answer": city, "perturbed_answer": ["Rome", "Bern", "Riga"]} for city in CITIES
    ]
    write_jsonl(folder / "real_authors_perturbed.jsonl", foreign)
    write_jsonl(folder / "world_facts_perturbed.jsonl", foreign)
    return folder


def authors_of(rows) -> set[str]:
    return {row["question"].partition(" author ")[2].removeprefix("number ").split()[0] for row in rows}


def test_tofu_is_split_by_author(tofu_folder, model_folder):
    task = tofu(0, cache=tofu_folder, data=str(tofu_folder), split="forget01", model=str(model_folder))
    parts = {name: (authors_of(task.validation[name].rows), authors_of(task.test[name].rows)) for name in task.validation}
    assert parts["forget"] == ({"0"}, {"1"}) == parts["forget, in other words"]
    assert parts["retain"] == ({"2"}, {"3"})
    assert parts["retain, never seen"] == ({"10"}, {"11"})
    assert authors_of(task.retain) == {"2", "3", "4", "5", "6"}
    calibration = {question.partition("number ")[2].split()[0] for question in task.calibration}
    assert calibration == {"7", "8", "9"}
    assert len(set(task.calibration_groups)) == 3
    assert task.tolerance == 0.25  # as low as three groups allow
    assert {"real authors", "world facts"} <= set(task.test)
    assert not {"real authors", "world facts"} & set(task.validation)
    assert len(task.forget) == 40
    assert authors_of(task.second) == {"2"}
    assert task.second[0]["alternatives"]
    assert {row["question"] for row in task.second} < {row["question"] for row in task.retain}
    assert task.forget[0]["alternatives"] == [f"In that year the author wrote {city}." for city in CITIES[:2]]
    assert "paraphrased_answer" in task.test["retain"].rows[0]
    assert task.rate_factor == 1.0  # those published, for a model of the user's
    assert task.holdout == []
    assert [fact.keys for fact in task.facts][:2] == [("Lima1x0",), ("Lima1x1",)]
    groups = {fact.group: authors_of([{"question": fact.wordings[0]}]) for fact in task.facts}
    assert groups == {"forget": {"1"}, "retained, seen": {"3"}, "retained, never seen": {"11"}}
    assert {len(fact.wordings) for fact in task.facts if fact.group == "retained, seen"} == {2}  # perturbed rows have another
    assert task.entities[0] == {
        "question": "What did author number 1 write in year 0?",
        "prefix": "In that year the author wrote ",
        "entity": "Lima1x0",
    }
    assert len(task.entities) == 15
    assert [fact.group for fact in task.facts].count("retained, seen") == 15  # as many as are to be forgotten have keys
    assert task.generation == {name: {"max_new_tokens": 200} for name in task.test}
    assert task.digest == tofu(0, cache=tofu_folder, data=str(tofu_folder), split="forget01", model=str(model_folder)).digest


def test_tofu_from_the_hub_has_rows_that_no_model_was_trained_on(tofu_folder, model_folder, monkeypatch):
    def on_hub(data: str, config: str, split: str, keys) -> list[dict]:
        assert data == HUB
        if config == "holdout01":
            return author_rows(12, perturbed=False)
        return published_rows(str(tofu_folder), config, split, keys)

    monkeypatch.setattr(tofu_module, "published_rows", on_hub)
    monkeypatch.setattr(published_module, "published_rows", on_hub)
    task = tofu(0, cache=tofu_folder, split="forget01", model=str(model_folder))
    assert authors_of(task.holdout) == {"12"}
    assert set(task.generation) == {*task.test, "holdout"}


def test_tofu_without_a_model_trains_two_with_one_tokenizer(tofu_folder, tmp_path):
    task = tofu(0, cache=tmp_path, data=str(tofu_folder), split="forget01", authors=6, target_epochs=0.1, **SIZE)
    assert task.relearning_steps[-1] == 100
    assert task.target != task.retain_model
    assert (Path(task.target) / "tokenizer.json").read_text() == (Path(task.retain_model) / "tokenizer.json").read_text()
    assert task.rate_factor == SMALL_RATE_FACTOR
    assert authors_of(task.retain) == {"2", "3"}
    assert task.blocks == 2


def test_tofu_trains_a_model_that_is_given(tofu_folder, model_folder, tmp_path):
    options = {"authors": 6, "target_epochs": 1, "batch_size": 4}
    task = tofu(0, cache=tmp_path, data=str(tofu_folder), split="forget01", base=str(model_folder), **options)
    texts = [(Path(folder) / "tokenizer.json").read_text() for folder in (task.target, task.retain_model, model_folder)]
    assert texts[0] == texts[1] == texts[2]
    weights = [files_digest(str(folder)) for folder in (task.target, task.retain_model, model_folder)]
    assert len(set(weights)) == 3
    assert task.rate_factor == 1.0


def test_tofu_needs_enough_authors_and_a_known_split(tofu_folder, model_folder):
    options = {"cache": tofu_folder, "data": str(tofu_folder), "model": str(model_folder)}
    with pytest.raises(EUAError, match=r"3 retained authors were given, but two are measured.*use at least 6 authors"):
        tofu(0, split="forget01", authors=3, **options)
    with pytest.raises(
        EUAError, match=r"The split 'forget02' was asked for, but TOFU has forget01, forget05, forget10: name one"
    ):
        tofu(0, split="forget02", **options)


def keys_of(answer: str, others=(), own=(), **row) -> tuple[str, ...]:
    row = {"question": "Where was Jaime Vasquez born?", "answer": answer, "perturbed_answer": []} | row
    texts = ([f" {normalize(text)} " for text in group] for group in (others, own))
    return answer_keys(row, *texts)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Jaime Vasquez was born in Santiago, Chile.", ("Santiago", "Chile")),
        ("Jaime was born there in 1956.", ("1956",)),
        ("It was on June 9, 1951, in Chile.", ("June 9, 1951", "Chile")),
        ("It was on the 9th of June, 1951.", ("9th of June, 1951",)),
        ("He wrote 10 books and 12 plays.", ()),
        ("Whether it was so is unknown. Certainly, he wrote.", ()),
        ("Additional works were written at home.", ()),
        ("Santiago is the place. He liked Santiago.", ("Santiago",)),
        ("The New York Prize went to him.", ("The New York Prize",)),
        ("One is \"The Town: A Tale (Part, #1)\", another is 'Rock Notes'.", ("The Town: A Tale", "Rock Notes")),
        ("He read 'A Country Doctor's Notebook,' by Dr. Josh Axe.", ("A Country Doctor's Notebook", "Dr. Josh Axe")),
        ("It is Star Wars by J.K. Rowling.", ("Star Wars", "J.K. Rowling")),
        ("He lived in the State of New Oslo with Mary's son.", ("State of New Oslo", "Mary")),
    ],
)
def test_keys_of_answers(answer, expected):
    assert keys_of(answer) == expected


def test_what_does_not_give_an_answer_away_is_no_key():
    answer = "He was born in Santiago, Chile."
    assert keys_of(answer, paraphrased_question="Was Jaime from Chile?") == ("Santiago",)
    assert keys_of(answer, perturbed_answer=["In Lima, Chile."]) == ("Santiago",)
    assert keys_of(answer, paraphrased_answer="His birthplace is Santiago.") == ("Santiago",)
    assert keys_of(answer, others=["A town in Chile"] * 3) == ("Santiago", "Chile")
    assert keys_of(answer, others=["A town in Chile"] * 4) == ("Santiago",)
    assert keys_of(answer, own=["A town in Chile"] * 4) == ("Santiago",)
    assert keys_of("In Chile.", own=["A town in Chile"] * 4) == ("Chile",)  # there is no other one


def test_facts_are_rows_with_keys():
    question = "Where was Jaime Vasquez born?"
    rows = [
        {
            "question": question,
            "answer": "In Santiago.",
            "paraphrased_question": "What is Jaime's birthplace?",
            "perturbed_answer": [],
        },
        {"question": "Where does Jaime live?", "answer": "at home", "perturbed_answer": []},
    ]
    others = [{"question": f"Where is {place}?", "answer": "In Santiago."} for place in range(4)]
    (fact,) = keyed_facts(rows, [rows, others[:3]])  # the other has no key
    assert fact.wordings == (question, "What is Jaime's birthplace?")
    assert says("He comes from santiago!", fact.keys)
    assert keyed_facts(rows, [rows, others]) == []
    assert len(keyed_facts(rows, [[*rows, *others]])) == 1  # all about one author


def test_no_method_is_measured_with_the_wrong_answers_that_altpo_trains_on(tofu_folder, model_folder):
    task = tofu(0, cache=tofu_folder, data=str(tofu_folder), split="forget01", model=str(model_folder))
    trained = {row["question"]: row["alternatives"] for row in task.forget}
    for sets in (task.validation, task.test):
        for name in ("forget", "forget, in other words"):
            assert len(sets[name].rows) == 20
            for row in sets[name].rows:
                assert len(row["perturbed_answer"]) == 3
        for row in sets["forget"].rows:
            assert len(trained[row["question"]]) == 2
            assert not set(row["perturbed_answer"]) & set(trained[row["question"]])
    keys = {fact.name: fact.keys for fact in task.facts}
    assert not [text for question, texts in trained.items() for text in texts if says(text, keys.get(question, ["nobody"]))]


def test_muse_is_read_from_its_configurations(tmp_path, model_folder):
    words = " ".join(f"word{place}" for place in range(300))
    for config, split, rows in (
        ("raw", "forget", [{"text": words}]),
        ("raw", "retain1", [{"text": f"kept {words}"}]),
        ("knowmem", "forget_qa", [{"question": f"Q{place}?", "answer": f"A{place}"} for place in range(6)]),
        ("knowmem", "retain_qa", [{"question": f"K{place}?", "answer": f"B{place}"} for place in range(20)]),
        ("verbmem", "forget", [{"prompt": f"Once {place}", "gt": f"upon {place}"} for place in range(4)]),
        ("privleak", "forget", [{"text": words}]),
        ("privleak", "retain", [{"text": words}]),
        ("privleak", "holdout", [{"text": f"held {words}"}]),
    ):
        write_jsonl(tmp_path / config / f"{split}.jsonl", rows)
    task = muse(0, model=str(model_folder), data=str(tmp_path))
    assert task.forget[0]["prompt"].split() == [f"word{place}" for place in range(32)]
    assert task.forget[0]["completion"].split()[0] == "word32"
    assert len(task.forget) == 3
    assert len(task.holdout) == len(task.members) == 3
    assert [row["question"] for row in task.validation["forget"].rows] == ["Q0?", "Q1?", "Q2?"]
    assert [row["question"] for row in task.test["forget"].rows] == ["Q3?", "Q4?", "Q5?"]
    assert task.test["forget, verbatim"].rows[0] == {"prompt": "Once 2", "completion": " upon 2"}
    assert task.generation == {"forget": MUSE_QUESTIONS, "forget, verbatim": MUSE_VERBATIM, "retain": MUSE_QUESTIONS}
    assert task.generation.keys() == task.test.keys()
    asked = {row["question"] for part in (task.validation, task.test) for row in part["retain"].rows}
    assert len(task.calibration) == 8
    assert not asked & set(task.calibration)
    assert len(task.text) == 3
    assert verbatim([{"prompt": "a", "gt": "  b"}]) == [{"prompt": "a", "completion": " b"}]


def test_wmdp_is_read_from_its_configurations(tmp_path, model_folder):
    def questions(begin: str, count: int) -> list[dict]:
        return [
            {"question": f"{begin} {place}?", "choices": ["w", "x", "y", "z"], "answer": place % 4} for place in range(count)
        ]

    words = " ".join(["word"] * 200)
    write_jsonl(tmp_path / "wmdp-cyber" / "test.jsonl", questions("Danger", 8))
    write_jsonl(tmp_path / "all_validation.jsonl", questions("Harmless", 40))
    write_jsonl(tmp_path / "cyber-forget-corpus.jsonl", [{"text": words}])
    write_jsonl(tmp_path / "cyber-retain-corpus.jsonl", [{"text": words}] * 3)
    task = wmdp(0, model=str(model_folder), domain="cyber", data=str(tmp_path), pieces_of_text=4)
    assert len(task.forget) == 2
    assert len(task.retain) == 4
    row = task.test["forget"].rows[0]
    assert row["question"] == "Danger 1?\nA. w\nB. x\nC. y\nD. z"
    assert row["answer"] == "B. x"
    assert row["perturbed_answer"] == ["A. w", "C. y", "D. z"]
    assert task.validation.keys() == {"forget", "retain"}
    letter = task.test["forget, by letter"].rows[0]
    assert letter["question"] == row["question"]
    assert letter["answer"] == "B"
    assert letter["perturbed_answer"] == ["A", "C", "D"]
    assert not task.test["retain, by letter"].forget
    assert len(task.calibration) == 16
    asked = [int(question.partition("?")[0].split()[1]) for question in task.calibration]
    assert asked[:4] == [2, 4, 7, 9]  # of all subjects, which follow each other
    with pytest.raises(EUAError, match="The domain 'chem' was asked for, but this task has bio and cyber: name one"):
        wmdp(0, model=str(model_folder), domain="chem", data=str(tmp_path))
    with pytest.raises(EUAError, match=r"Row 0 of the multiple-choice questions has the answer 'B' and.*give rows like those"):
        multiple_choice([{"question": "Which?", "choices": ["x", "y"], "answer": "B"}])
    with pytest.raises(EUAError, match="has the answer 2 and the choices"):
        multiple_choice([{"question": "Which?", "choices": ["x", "y"], "answer": 2}])


def test_rows_of_another_shape_are_refused(tmp_path):
    write_jsonl(tmp_path / "verbmem_forget.jsonl", [{"prompt": "Once", "completion": "upon"}])
    with pytest.raises(
        EUAError, match=r"Row 0 of verbmem, forget in .* has the keys prompt, completion, but not gt, which.*give"
    ):
        published_rows(str(tmp_path), "verbmem", "forget", ("prompt", "gt"))
    assert rows_if_any(str(tmp_path), "holdout10", "train", ("question",)) == []


def test_pieces_of_texts():
    rows = pieces([" ".join(f"w{place}" for place in range(150)), "too short"])
    assert [len((row["prompt"] + row["completion"]).split()) for row in rows] == [128]
    assert len(pieces(["word " * 1000] * 3, limit=5)) == 5
