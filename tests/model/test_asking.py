"""Questions in plain text, in batches."""

from __future__ import annotations

import copy

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from eua import EnergyGuard, EUAError
from eua.data.rows import encode_prompts
from eua.model.asking import answer, padding_id
from eua.serving.engine import Engine

QUESTIONS = ["Who?", "Where was Ann born, and when?", "Where?"]


@pytest.mark.parametrize("eos", [1, [900, 1], None])
def test_padding_that_the_model_does_not_know_is_not_used(model, tokenizer, rows, eos):
    """It was added to the tokenizer, and the model was not resized."""
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    assert padded.pad_token_id >= model.config.vocab_size
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = padded.pad_token_id
    assert padding_id(model, tokenizer) == tokenizer.pad_token_id
    assert answer(model, padded, QUESTIONS, 4) == answer(model, tokenizer, QUESTIONS, 4)
    guard = EnergyGuard.calibrate(model, padded, rows["calibration"], tolerance=0.2, first_tokens=2)
    with guard.attach(model) as handle:
        answer(model, padded, QUESTIONS, 4)
        assert handle.scores.shape == (3,)
    engine = Engine(model, padded, None)
    engine.close()
    assert engine._pad == padding_id(model, padded) < model.config.vocab_size


def test_an_answer_may_use_every_learned_position(tokenizer):
    (ids,) = encode_prompts("Who?", tokenizer)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=len(ids), bos_token_id=0, eos_token_id=None
    )
    model = GPT2LMHeadModel(config)
    assert len(answer(model, tokenizer, "Who?", 1)) == 1
    with pytest.raises(EUAError, match=f"has {len(ids)} tokens and 2 generated ones"):
        answer(model, tokenizer, "Who?", 2)
