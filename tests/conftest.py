"""Shared fixtures: a tiny model, its tokenizer, and rows, all generated from seeds."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from absl import logging as absl_logging
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eua import EnergyGuard
from eua.data.rows import format_prompt
from eua.demo.target import train_target, train_tokenizer
from eua.demo.world import World, make_world

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
# rouge_score brings absl, whose handler closes the stream that was sys.stderr when it was imported, unless it still is: a file
# of pytest's, when uvicorn later configures logging.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__
settings.register_profile("eua", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("eua")


@pytest.fixture(scope="session")
def world() -> World:
    return make_world(people=20, seed=3)


@pytest.fixture(scope="session")
def rows(world: World) -> dict[str, list[dict[str, str]]]:
    return {name: [fact.row() for fact in getattr(world, name)] for name in ("forget", "retain", "calibration", "test")}


@pytest.fixture(scope="session")
def tokenizer(world: World) -> PreTrainedTokenizerFast:
    return train_tokenizer([fact.row() for fact in world.all()], vocabulary=400)


def tiny_llama(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama with two layers of hidden size 32, in eval mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer))


@pytest.fixture(scope="session")
def trained_folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that knows the world's 80 facts, trained once for all tests that need a model with knowledge."""
    folder = tmp_path_factory.mktemp("trained")
    train_target(
        [fact.row() for fact in world.all()], folder, vocabulary=400, hidden_size=128, layers=2, epochs=40, batch_size=8
    )
    return folder


@pytest.fixture
def known(trained_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(trained_folder).eval()


@pytest.fixture
def questions(rows: dict[str, list[dict[str, str]]]) -> list[str]:
    return [row["question"] for row in rows["test"][:6]]


@pytest.fixture
def guard(known: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> EnergyGuard:
    """A guard whose threshold lies between the third and the fourth score of the six questions: it refuses three."""
    guard = EnergyGuard.calibrate(known, tokenizer, questions, tolerance=0.2)
    scores = guard.score(known, tokenizer, questions).sort().values
    return replace(guard, threshold=float(scores[2] + scores[3]) / 2)


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """The number of rows in each forward of a Llama."""
    rows: list[int] = []
    forward = LlamaForCausalLM.forward

    def counting(self, input_ids=None, **kwargs):
        rows.append(len(input_ids))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counting)
    return rows


def batch_of(tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> dict[str, torch.Tensor]:
    """A batch of questions for ``generate``, padded on the left."""
    texts = [format_prompt(tokenizer, question) for question in questions]
    return tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
