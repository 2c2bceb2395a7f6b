"""Tests of loading a model and its tokenizer by name."""

from __future__ import annotations

import pytest
import torch

from eua import EUAError
from eua.model.loading import load_model
from tests.conftest import tiny_llama


def test_weights_are_read_from_safetensors_only(tokenizer, tmp_path):
    model = tiny_llama(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)

    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(EUAError, match=r"cannot be loaded as a causal language model \(.*Its weights must be safetensors"):
        load_model(str(tmp_path))
