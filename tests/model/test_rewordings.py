"""Other wordings of facts: what a model writes is kept only if it asks for the same fact."""

from __future__ import annotations

import json

import pytest
import torch

from eua import EUAError
from eua.bench.wrappings import PREFIXES, SUFFIXES
from eua.cli.main import main
from eua.data.keys import says
from eua.model import rewordings as module
from eua.model.rewordings import TEMPLATES, write_rewordings

ROW = {"question": "Where was Ann born?", "answer": "In Carros.", "keys": ["Carros"]}


def test_templates_are_not_those_that_the_evaluation_asks_with():
    assert len(set(TEMPLATES)) == len(TEMPLATES)
    assert all(text.count("{question}") == 1 for text in TEMPLATES)
    assert not [text for text in TEMPLATES for other in (*PREFIXES, *SUFFIXES) if other in text or text.strip() in other]


def test_wordings_are_kept_if_their_answers_say_the_key(model, tokenizer, monkeypatch):
    """The model answers every question with its key, but for two."""
    asked = []

    def answer(model, tokenizer, prompts, max_new_tokens, **options):
        asked.append((list(prompts), options))
        if "New question:" in prompts[0]:
            return [
                '"What is the birthplace of Ann?"\nShe',
                "Where did Ann grow up?",
                ROW["question"],
                "Is it Carros?",
                "Ann's place",
            ][: len(prompts)]
        return [
            "No idea." if text.startswith("Hello!") or "grow" in text else f"It is Carros, {len(text)}. Yes."
            for text in prompts
        ]

    monkeypatch.setattr(module, "answer", answer)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    made = list(write_rewordings(model, tokenizer, [ROW], templates=12, paraphrases=3))
    assert torch.equal(torch.rand(1), expected)

    assert made[0] == ROW
    around = {row["question"]: row["answer"] for row in made[1:13]}
    assert set(around) == {text.format(question=ROW["question"]) for text in TEMPLATES}
    assert around[f"Hello! {ROW['question']}"] == ROW["answer"]
    assert all(text == "In Carros." or text.startswith("It is Carros, ") for text in around.values())
    assert [row["question"] for row in made[13:]] == ["What is the birthplace of Ann?"]
    assert made[13]["answer"] == "It is Carros, 30."
    assert all(row["keys"] == ROW["keys"] for row in made)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"question": "Who?", "answer": "Ann."}, 'Row 0 of the forget set has the keys .* give all three, e.g. "keys"'),
        (ROW | {"keys": ["Ulm"]}, "says none of its keys"),
        (ROW | {"keys": "Carros"}, "which must be a list of texts"),
    ],
)
def test_rows_that_cannot_be_reworded_are_refused(row, text, model, tokenizer):
    with pytest.raises(EUAError, match=text):
        next(write_rewordings(model, tokenizer, [row]))


def test_there_are_as_many_templates_as_there_are(model, tokenizer):
    with pytest.raises(EUAError, match="there are 12 templates"):
        next(write_rewordings(model, tokenizer, [ROW], templates=13))


def test_rows_are_reworded_from_the_command_line(trained_folder, world, tmp_path, capsys):
    forget, out = tmp_path / "forget.jsonl", tmp_path / "reworded.jsonl"
    given = [fact.row() | {"keys": [fact.value]} for fact in world.forget[:2]]
    forget.write_text("".join(json.dumps(row) + "\n" for row in given))
    command = ["reword", "--model", str(trained_folder), "--forget", str(forget), "--output", str(out)]
    assert main([*command, "--templates", "3", "--paraphrases", "1", "--max-new-tokens", "12"]) == 0
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row for row in made if row in given] == given
    assert 8 <= len(made) <= 10
    assert all(says(row["answer"], row["keys"]) for row in made)
    assert "Next: eua unlearn --forget" in capsys.readouterr().out
    assert main(command) == 2
    assert "already exists and would be lost" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--templates", "13"]) == 2
    assert "there are 12 templates" in capsys.readouterr().err
