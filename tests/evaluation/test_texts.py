"""Generated texts: their ROUGE, their fluency under a judge, and what a guard does to them."""

from __future__ import annotations

import builtins
import math
from copy import deepcopy

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from eua import EUAError
from eua.data.rows import encode_rows
from eua.evaluation.texts import MUSE_QUESTIONS, answer_texts, cut, fluency, generate, repetition, rouge
from eua.model.asking import answer

PAIRS = [  # answer, generated text, ROUGE-1 recall, ROUGE-L recall, ROUGE-L F1
    ("The cat sat on the mat.", "the cats sat near a mat", 0.666667, 0.666667, 0.666667),
    ("Jaime Vasquez was born in Santiago, Chile", "He was born in Chile", 0.571429, 0.571429, 0.666667),
    ("Paris", "It is Paris, the capital of France", 1, 1, 0.25),
    ("Paris", "", 0, 0, 0),
    ("born in Oslo", "Oslo in born", 1, 0.333333, 0.333333),
]


def test_rouge_has_the_values_of_the_published_library():
    answers, generated, *values = zip(*PAIRS, strict=True)
    found = rouge(generated, answers)
    for name, expected in zip(("rouge_1_recall", "rouge_l_recall", "rouge_l_f1"), values, strict=True):
        assert found[name].tolist() == pytest.approx(expected, abs=1e-6), name
    assert found["rouge_1_f1"][-1] == 1
    with pytest.raises(EUAError, match="1 texts were given for 2 answers: give one text for each"):
        rouge(["a"], ["a", "b"])


def test_missing_rouge_score_is_explained(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "rouge_score":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EUAError, match=r"rouge_score, .*, is not installed: pip install \"eua\[bench\]\""):
        rouge(["a"], ["a"])


def test_a_model_that_knows_the_answers_writes_them(known, model, tokenizer, rows):
    asked = rows["forget"] + rows["test"][:4]
    answers = [row["answer"] for row in asked]
    generated = generate(known, tokenizer, asked, max_new_tokens=40, batch_size=5)
    assert generated == [text for row in asked for text in answer(known, tokenizer, [row], 40)]
    assert rouge(generated, answers)["rouge_l_recall"].mean() > 0.9
    untrained = rouge(generate(model, tokenizer, asked, max_new_tokens=40), answers)
    assert untrained["rouge_l_recall"].mean() < 0.2
    assert answer_texts(encode_rows(asked, tokenizer, None), tokenizer) == answers


def test_equal_prompts_run_once_longest_first(known, tokenizer, rows, forwards):
    asked = rows["forget"][:3] * 3
    texts = generate(known, tokenizer, asked, max_new_tokens=4)
    assert max(forwards) == 3
    assert texts[:3] == texts[3:6] == texts[6:]


def test_a_guard_puts_its_refusal_in_place_of_answers(known, tokenizer, guard, questions):
    plain = generate(known, tokenizer, questions, max_new_tokens=48)
    with guard.attach(known, tokenizer):
        guarded = generate(known, tokenizer, questions, max_new_tokens=48)
    refused = guard.refuses(guard.score(known, tokenizer, questions))
    assert refused.sum() == 3
    for text, before, is_refused in zip(guarded, plain, refused, strict=True):
        assert text == (guard.refusal_text if is_refused else before)


def test_texts_are_cut_before_the_first_stop():
    assert cut(" Oslo.\n\nQuestion: Who? Question:", MUSE_QUESTIONS["stop"]) == "Oslo."
    assert cut("one two three", ["three", "two"]) == "one"
    assert cut("Oslo", ["x"]) == cut("Oslo", []) == "Oslo"
    assert cut("Question: Who?", ["Question:"]) == ""


def test_stops_cut_what_is_generated(known, tokenizer, rows):
    (plain,) = generate(known, tokenizer, rows["forget"][:1], max_new_tokens=30)
    word = plain.split()[2]
    (stopped,) = generate(known, tokenizer, rows["forget"][:1], max_new_tokens=30, stop=[word])
    assert stopped == plain.partition(word)[0].strip()


def test_fluency_is_the_judges_nll(known, tokenizer, rows):
    text = rows["forget"][0]["answer"]
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(known(ids).logits[0, :-1], ids[0, 1:])
    shuffled = " ".join(sorted(text.split(), reverse=True))
    found = fluency([text, "", shuffled], known, tokenizer)
    torch.testing.assert_close(found[0], expected)
    assert math.isnan(found[1])
    assert found[2] > found[0] + 1
    assert fluency([""], known, tokenizer).isnan().all()


def test_the_first_token_counts_behind_a_beginning_of_sequence(known, tokenizer):
    with_opening = deepcopy(tokenizer)
    with_opening._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    ids = torch.tensor([[0, *tokenizer("Oslo.", add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(known(ids).logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(fluency(["Oslo."], known, with_opening)[0], expected)


def test_repetition_counts_sequences_of_words():
    assert repetition("no no no no no no") == pytest.approx(2 / 3)
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("each word is here only once") == 0
    assert repetition("no no no") == repetition("") == 0
