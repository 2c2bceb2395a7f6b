"""Fixtures of the tests of the server."""

from __future__ import annotations

import time

import pytest
from transformers import LlamaForCausalLM

from tests.conftest import tiny_llama


@pytest.fixture
def endless(tokenizer) -> LlamaForCausalLM:
    """A random model that never ends an answer and takes at least two milliseconds per token."""
    model = tiny_llama(len(tokenizer))
    model.config.max_position_embeddings = 8192
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    model.register_forward_pre_hook(lambda *_: time.sleep(0.002))
    return model
