"""Other answers to the prompts to forget: phrases of not knowing, those that a model writes, and how they are drawn."""

from __future__ import annotations

import json

import pytest
import torch

from eua import EUAError
from eua.cli.main import main
from eua.data.alternatives import idk_answers, rows_with_alternatives
from eua.model import alternatives as module
from eua.model.alternatives import write_alternatives

ROW = {"question": "Where was Ann born?", "answer": "In Carros."}


def test_phrases_of_not_knowing_are_distinct_sentences():
    phrases = idk_answers()
    assert len(set(phrases)) == len(phrases) == 60
    assert all(phrase.strip() == phrase and phrase.endswith(".") for phrase in phrases)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, {"question": "Where was Ann born?", "answer": "No."}),
        ({"prompt": "Ann was born in", "completion": " Carros."}, {"prompt": "Ann was born in", "completion": " No."}),
        (
            {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Carros."}]},
            {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "No."}]},
        ),
        (
            {"prompt": [{"role": "user", "content": "Where?"}], "completion": [{"role": "assistant", "content": "In Carros."}]},
            {"prompt": [{"role": "user", "content": "Where?"}], "completion": [{"role": "assistant", "content": "No."}]},
        ),
    ],
)
def test_only_the_answer_of_a_row_is_replaced(row, expected):
    assert rows_with_alternatives([row | {"alternatives": ["No."]}], "own", 1, seed=0) == [expected]


def test_draws_are_seeded_and_use_every_answer_before_one_comes_again():
    rows = [ROW | {"alternatives": [*"abc"]}] * 2
    drawn = [row["answer"] for row in rows_with_alternatives(rows, "own", 7, seed=1)]
    assert drawn == [row["answer"] for row in rows_with_alternatives(rows, "own", 7, seed=1)]
    for of_row in (drawn[:7], drawn[7:]):
        assert sorted(of_row[:3]) == sorted(of_row[3:6]) == [*"abc"]
    assert drawn[:7] != drawn[7:]
    assert len({row["answer"] for row in rows_with_alternatives([ROW], "idk", 60, seed=0)}) == 60


@pytest.mark.parametrize("own", [None, [], "one text", ["good", ""], [1]])
def test_rows_without_usable_alternatives_are_refused(own):
    with pytest.raises(EUAError, match='Row 0 of the forget set has .* as its "alternatives", but .* give a list of texts'):
        rows_with_alternatives([ROW | {"alternatives": own}], "own", 1, seed=0)


def test_an_answer_is_no_alternative_to_itself():
    with pytest.raises(
        EUAError, match='Row 0 of the forget set has its answer among its "alternatives", .* leave it out there'
    ):
        rows_with_alternatives([ROW | {"alternatives": ["In Ulm.", "In Carros."]}], "own", 1, seed=0)


def test_rows_of_no_format_are_refused_as_everywhere():
    with pytest.raises(EUAError, match="Row 0 of the forget set has the keys .* which are not a known format"):
        rows_with_alternatives([{"text": "x"}], "idk", 1, seed=0)


def test_what_a_model_writes_is_cut_drawn_anew_and_seeded(model, tokenizer, monkeypatch):
    written = [[" In Ulm. Question: Who?", "In Carros.", ""], ["In Graz.\nQ: Where?", "In Rom."]]
    asked = []

    def answer(model, tokenizer, prompts, max_new_tokens, **options):
        asked.append((prompts, max_new_tokens, options["do_sample"], torch.rand(1).item()))
        return written[len(asked) - 1]

    monkeypatch.setattr(module, "answer", answer)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    (row,) = write_alternatives(model, tokenizer, [ROW], count=3, max_new_tokens=9)
    assert torch.equal(torch.rand(1), expected)
    assert row == ROW | {"alternatives": ["In Ulm.", "In Graz.", "In Rom."]}
    assert [len(prompts) for prompts, *_ in asked] == [3, 2]
    assert "Where was Ann born?" in asked[0][0][0]
    assert "In Carros." in asked[0][0][0]
    assert asked[0][1:3] == (9, True)


def test_a_model_writes_other_answers_from_the_command_line(known, tokenizer, rows, tmp_path, capsys):
    known.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    forget = tmp_path / "forget.jsonl"
    forget.write_text("".join(json.dumps(row) + "\n" for row in rows["forget"][:2]))
    out = tmp_path / "with.jsonl"
    command = [
        "alternatives",
        "--model",
        str(tmp_path / "model"),
        "--forget",
        str(forget),
        "--output",
        str(out),
        "--count",
        "2",
    ]
    assert main([*command, "--max-new-tokens", "6"]) == 0
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{"question": row["question"], "answer": row["answer"]} for row in made] == rows["forget"][:2]
    assert all(len(row["alternatives"]) == 2 for row in made)
    assert main(command) == 2
    assert "already exists and would be lost: name another, or pass --overwrite" in capsys.readouterr().err


def test_an_interrupted_command_goes_on_where_it_stopped(known, tokenizer, rows, tmp_path, monkeypatch):
    known.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    forget = tmp_path / "forget.jsonl"
    forget.write_text("".join(json.dumps(row) + "\n" for row in rows["forget"][:4]))
    asked = []

    def answer(model, tokenizer, prompts, *_, **__):
        """Fails at the third row of the first call."""
        asked.append(prompts[0])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [f"In Ulm\u2028or so, {number}." for number in torch.rand(len(prompts)).tolist()]

    def command(name: str, *more: str) -> list[str]:
        given = ["--model", str(tmp_path / "model"), "--forget", str(forget), "--output", str(tmp_path / name)]
        return ["alternatives", *given, *more]

    monkeypatch.setattr(module, "answer", answer)
    begun = tmp_path / "with.jsonl.begun"
    assert main(command("with.jsonl")) != 0
    assert not (tmp_path / "with.jsonl").exists()
    with begun.open("a") as file:
        file.write('{"question": "Who')  # as if it had been killed while it wrote
    assert main(command("with.jsonl")) == 0
    assert len(asked) == 2 + 1 + 2  # two rows, the third in vain, and the last two
    assert not begun.exists()
    assert main(command("whole.jsonl")) == 0
    assert (tmp_path / "with.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    asked.clear()
    assert main(command("with.jsonl", "--overwrite")) != 0
    asked[:] = [""] * 3
    (tmp_path / "with.jsonl").unlink()
    assert main(command("with.jsonl", "--seed", "1")) == 2  # other settings
    assert main(command("with.jsonl", "--overwrite", "--seed", "1")) == 0
    assert len(asked) == 3 + 4  # other settings begin anew


def test_rows_that_are_no_questions_are_refused(model, tokenizer):
    with pytest.raises(EUAError, match="Row 0 of the forget set has the keys .*prompt.*, but other answers .* give both"):
        next(iter(write_alternatives(model, tokenizer, [{"prompt": "A", "completion": "B"}])))
