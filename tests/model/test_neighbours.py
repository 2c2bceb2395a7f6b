"""Questions near those to forget, which a model writes and answers itself."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch

from eua import EUAError
from eua.cli.main import main
from eua.data.keys import says
from eua.model import neighbours as module
from eua.model.neighbours import write_neighbours

ROWS = [
    {"question": "What is the capital of Italy?", "answer": "Rome.", "keys": ["Rome"]},
    {"question": "What is the capital of Portugal?", "answer": "It is Lisbon."},
]
BEGINNINGS = {"", "What", "What is", "What is the", "What is the capital", "What is the capital of"}


@pytest.fixture
def scripted(monkeypatch):
    """The model continues questions with names in turn, and answers with their length."""
    names = ["Chile", "Italy", "Peru", "Cuba", "Rome", "Kenya", "Chile", "Iraq", "Mali", "Oman", "Togo", "Fiji", "Laos"]
    begun = []

    def continued(model, tokenizer, beginning, count, max_new_tokens):
        begun.append(beginning)
        place = 2 * (len(begun) - 1)
        return [f"{beginning} {name}?".strip() for name in (names * 9)[place : place + 2]]

    def answer(model, tokenizer, prompts, max_new_tokens):
        return ["It is Lisbon. Or not." if "Kenya" in text else f"It is {len(text)}. Yes." for text in prompts]

    monkeypatch.setattr(module, "_continued", continued)
    monkeypatch.setattr(module, "answer", answer)
    return begun


def test_neighbours_begin_as_rows_to_forget_do_and_say_nothing_of_them(scripted, model, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = write_neighbours(model, tokenizer, ROWS, count=12, avoid=["Cuba"])
    assert torch.equal(torch.rand(1), expected)
    assert len(found) == 12
    assert set(scripted) <= BEGINNINGS
    assert len(set(scripted)) > 3
    questions = [row["question"] for row in found]
    assert len(set(questions)) == 12
    assert not [text for text in questions if says(text, ["Cuba", "Rome", "Kenya"])]
    assert ROWS[0]["question"] not in questions
    assert {row["answer"] for row in found} == {f"It is {len(text)}." for text in questions}
    assert write_neighbours(model, tokenizer, ROWS, count=3, neutral=1.0)
    assert set(scripted[-2:]) == {""}


def test_longer_beginnings_are_drawn_more_often():
    rng, counts = random.Random(0), Counter[str]()
    for _ in range(4000):
        counts[module._drawn(["Who", "Who wrote", "Who wrote the"], rng)] += 1
    assert counts["Who wrote"] == pytest.approx(2 * counts["Who"], rel=0.15)
    assert counts["Who wrote the"] == pytest.approx(4 * counts["Who"], rel=0.15)


def test_no_row_says_what_is_to_be_avoided(scripted, monkeypatch, model, tokenizer):
    """Neither a question nor its answer."""

    def answer(model, tokenizer, prompts, max_new_tokens):
        return ["As in Cuba." if "Fiji" in text else "It is so." for text in prompts]

    monkeypatch.setattr(module, "answer", answer)
    found = write_neighbours(model, tokenizer, ROWS, count=12, surest=1.0, avoid=["Cuba", "Peru"])
    assert not [row for row in found if says(f"{row['question']} {row['answer']}", ["Cuba", "Peru"])]


def test_the_rows_are_kept_that_the_model_is_surest_of(scripted, monkeypatch, model, tokenizer):
    """As many as asked for of all that were written, in the order in which they were."""
    everything = write_neighbours(model, tokenizer, ROWS, count=12, surest=1.0)
    unsure = torch.rand(12, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "answer_nll", lambda model, rows, *_: list(unsure[: len(rows)].split(1)))
    scripted.clear()
    found = write_neighbours(model, tokenizer, ROWS, count=4, surest=1 / 3)
    assert found == [everything[index] for index in sorted(unsure.argsort()[:4].tolist())]


def test_a_model_that_writes_nothing_new_is_refused(scripted, model, tokenizer):
    with pytest.raises(EUAError, match=r"The model wrote \d+ of 500 rows near the forget set before 20 attempts"):
        write_neighbours(model, tokenizer, ROWS, count=500)


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        (ROWS, {"count": 0}, "at least one row is written"),
        (ROWS, {"neutral": 1.5}, "a share lies between 0 and 1"),
        (ROWS, {"surest": 0.0}, "a share lies between 0 and 1"),
        ([{"prompt": "Ann was born in", "completion": " Ulm."}], {}, 'Row 0 of the forget set .* a "question"'),
        ([ROWS[0] | {"keys": "Rome"}], {}, "must be a list of texts"),
    ],
)
def test_what_cannot_be_is_refused(rows, options, text, model, tokenizer):
    with pytest.raises(EUAError, match=text):
        write_neighbours(model, tokenizer, rows, **options)


def test_a_turn_is_continued_up_to_the_end_of_its_first_sentence(known, tokenizer):
    """The prompt is what stands before the question and its beginning; special tokens end the turn."""
    prompts, generate = [], known.generate
    texts = [" Chile? And of Peru?", " Chile", "\nChile?", "<eos> Chile?", " J. Smith's country?"]

    def scripted(input_ids, **options):
        prompts.append(tokenizer.decode(input_ids[0]))
        assert options["do_sample"]
        assert options["top_k"] == 0
        ids = [tokenizer(text)["input_ids"] for text in texts]
        width = max(map(len, ids))
        written = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
        return torch.cat([input_ids, written], dim=1)

    known.generate = scripted
    found = module._continued(known, tokenizer, "What is the capital of", len(texts), 8)
    assert prompts == ["Question: What is the capital of"]
    assert found == ["What is the capital of Chile?", "What is the capital of J."]
    known.generate = generate
    torch.manual_seed(0)
    assert isinstance(module._continued(known, tokenizer, "", 4, 8), list)


def test_rows_to_retain_are_written_from_the_command_line(trained_folder, rows, tmp_path, capsys, monkeypatch):
    forget, out = tmp_path / "forget.jsonl", tmp_path / "near.jsonl"
    forget.write_text("".join(json.dumps(row) + "\n" for row in rows["forget"]))
    monkeypatch.setattr(module, "_continued", lambda *_: [f"Where was {torch.rand(1).item()} born?"])
    command = ["neighbours", "--model", str(trained_folder), "--forget", str(forget), "--output", str(out), "--count", "2"]
    assert main([*command, "--max-new-tokens", "24"]) == 0
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(row) for row in made] == [{"question", "answer"}] * 2
    assert main(command) == 2
    assert "already exists and would be lost" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--neutral", "2"]) == 2
    assert "a share lies between 0 and 1" in capsys.readouterr().err
