"""What several tests need: a tiny model, its tokenizer, and rows. Everything is made here, from seeds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eua.demo.target import train_target, train_tokenizer
from eua.demo.world import World, make_world

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
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
    """A random Llama, two layers of 32, in eval mode."""
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
    """A small model that knows the world's 80 facts, trained once for all tests that need knowledge to forget."""
    folder = tmp_path_factory.mktemp("trained")
    train_target(
        [fact.row() for fact in world.all()], folder, vocabulary=400, hidden_size=128, layers=2, epochs=40, batch_size=8
    )
    return folder
