"""Tests of loading a model and its tokenizer by name."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from eua import EUAError
from eua.model.loading import load_model, load_tokenizer
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


@pytest.fixture
def folder(tokenizer, tmp_path):
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        (
            "model.safetensors",
            lambda b: POINTER,
            r"model.safetensors is a pointer of Git LFS, not the file: run `git lfs pull`",
        ),
        ("model.safetensors", lambda b: b[: len(b) // 2], "model.safetensors is damaged"),
        ("model.safetensors", lambda b: b[:4], "model.safetensors is damaged"),
        ("model.safetensors", lambda b: b"\xff" * 99, "model.safetensors is damaged"),
        ("model.safetensors", lambda b: b"", "model.safetensors is damaged"),
        ("config.json", lambda b: b[:50], "config.json is damaged"),
        ("config.json", lambda b: b"[" * 100_000, "config.json is damaged"),
        ("config.json", lambda b: b"3", ""),
        ("config.json", lambda b: b.replace(b'"llama"', b'"lama"'), "lama"),
        ("config.json", lambda b: b.replace(b'"hidden_size": 32', b'"hidden_size": "big"'), ""),
        ("tokenizer.json", lambda b: b.replace(b'"BPE"', b'"Newer"'), "did not match any variant"),
        ("tokenizer.json", lambda b: POINTER, "tokenizer.json is a pointer of Git LFS"),
        ("generation_config.json", lambda b: b"[", "generation_config.json is damaged"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(name, change, text, folder):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(EUAError, match=rf"cannot be loaded as a causal language model \(.*{text}.*check the path") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_weights_of_other_shapes_are_named(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 48'))
    with pytest.raises(EUAError, match=r"6 weights of other shapes .*\(the first is .*mlp.* in place of .*correct its config"):
        load_model(str(folder))


def drop(path, name: str) -> None:
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_missing_weight_is_not_drawn_at_random(folder):
    drop(folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(EUAError, match=r"lacks 1 of the model's weights \(the first is model.layers.1.mlp.up_proj.weight\)"):
        load_model(str(folder))


def test_a_missing_weight_of_an_adapter_is_not_drawn_at_random(folder, tmp_path_factory):
    base, _ = load_model(str(folder))
    adapter = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(adapter)
    load_tokenizer(str(folder)).save_pretrained(adapter)
    load_model(str(adapter))
    drop(adapter / "adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    with pytest.raises(EUAError, match="lacks 1 of the model's weights"):
        load_model(str(adapter))


def test_tied_weights_are_not_missing(tokenizer, folder):
    model = tiny_llama(len(tokenizer))
    config = model.config
    config.tie_word_embeddings = True
    tied = type(model)(config)
    tied.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded, _ = load_model(str(folder))
    assert torch.equal(loaded.lm_head.weight, tied.model.embed_tokens.weight)


def test_a_file_that_is_no_part_of_a_model_is_not_blamed(folder):
    (folder / "notes.json").write_text('{"a": 1}\n{"b": 2}\n')
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(EUAError) as error:
        load_model(str(folder))
    assert "nonesuch" in str(error.value)
    assert "notes.json" not in str(error.value)
