"""The directions of adapters that read only what sets rows to forget apart: against their definition, and in a trainer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from eua import EUAError
from eua.data.rows import EncodedRow
from eua.training import directions
from eua.training.checks import check_setup
from eua.training.directions import adapter_on_mlps, distinct_directions, set_distinct_directions
from tests.conftest import tiny_llama
from tests.training.test_trainer import LORA, make, weights

OTHER_SIZES = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "gemma3_text": {"head_dim": 8, "intermediate_size": 64}}


def trained_in_three(tokenizer, rows, folder, **options):
    return make(tiny_llama(len(tokenizer)), tokenizer, rows, folder, distinct_directions=3, **options)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 8), st.integers(0, 1000), st.sampled_from([1e-3, 0.01, 1.0]))
def test_they_maximize_the_ratio(forget, retain, width, seed, ridge):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (forget, retain))
    count = min(forget, width)
    found = distinct_directions(x, y, count, ridge)
    f = x.T @ x / forget
    r = y.T @ y / retain + ridge * y.square().mean() * torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(found @ f @ found.T, torch.eye(count, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    ratios = 1 / (found @ r @ found.T).diagonal()
    expected = torch.linalg.eigvals(torch.linalg.solve(r, f)).real.sort(descending=True).values[:count]
    torch.testing.assert_close(ratios, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_inputs_of_rows_to_retain_hardly_pass(monkeypatch, tokenizer, rows, tmp_path):
    """In a model: what a layer reads of retained rows is small in these directions, even if its layers are read in groups."""
    size = {}
    for group_bytes in (2**30, 1):
        monkeypatch.setattr(directions, "_GROUP_BYTES", group_bytes)
        trainer = trained_in_three(tokenizer, rows, tmp_path / "run")
        set_distinct_directions(trainer.model, trainer.encoded_rows["forget"], trainer.encoded_rows["retain"], batch_size=4)
        layers = directions._adapted(trainer.model)
        for kind in ("forget", "retain"):
            read = directions._inputs(trainer.model, layers, trainer.encoded_rows[kind], 3)
            assert {len(inputs) for inputs in read.values()} == {sum(len(r.input_ids) for r in trainer.encoded_rows[kind])}
            size[kind, group_bytes] = [(read[name] @ weight.T).square().mean(0) for name, (_, weight) in layers.items()]
    for of_forget, of_retain in zip(size["forget", 1], size["retain", 1], strict=True):
        torch.testing.assert_close(of_forget, torch.ones(3), rtol=1e-3, atol=1e-3)
        assert (of_retain < 0.7).all()
    torch.testing.assert_close(size["retain", 1], size["retain", 2**30], rtol=1e-4, atol=1e-5)


def test_only_b_is_trained_and_a_resumed_run_ends_with_the_same_weights(tokenizer, rows, tmp_path):
    how = {"save_strategy": "steps", "save_steps": 2}
    torch.manual_seed(0)
    whole = trained_in_three(tokenizer, rows, tmp_path / "whole", **how)
    begun = weights(whole.model)
    whole.train()
    changed = {name for name, weight in weights(whole.model).items() if not torch.equal(weight, begun[name])}
    assert changed == {name for name in begun if "lora_" in name}  # A was found before the first step
    kept = load_file(tmp_path / "whole" / "directions.safetensors")
    assert sorted(map(tuple, (tensor.shape for tensor in kept.values()))) == [(3, 64)] * 2
    for name, tensor in kept.items():
        assert torch.equal(whole.model.get_submodule(name).lora_A["default"].weight, tensor)

    for checkpoint in (tmp_path / "whole").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-2":
            checkpoint.rename(tmp_path / checkpoint.name)
    # As if another machine rounded otherwise: the file counts.
    monkey = pytest.MonkeyPatch()
    monkey.setattr(directions, "set_distinct_directions", lambda *_, **__: pytest.fail("found anew"))
    with monkey.context():
        torch.manual_seed(7)
        resumed = trained_in_three(tokenizer, rows, tmp_path / "whole", **how)
        resumed.train(resume_from_checkpoint=True)
    monkey.undo()
    assert resumed.state.global_step == whole.state.global_step
    for name, weight in weights(whole.model).items():
        assert torch.equal(weight, weights(resumed.model)[name]), name


def test_a_file_of_another_run_is_refused(tokenizer, rows, tmp_path):
    trainer = trained_in_three(tokenizer, rows, tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "directions.safetensors")
    with pytest.raises(EUAError, match="holds the input directions of the run to resume, cannot be used"):
        trainer._directions.set(trainer.encoded_rows, resuming=True, save=True, batch_size=2)


def test_evaluation_before_training_finds_them_once(monkeypatch, tokenizer, rows, tmp_path):
    held_out = {"eval_forget_dataset": rows["forget"][6:8], "eval_retain_dataset": rows["retain"][9:12]}
    found = []
    original = directions.set_distinct_directions
    monkeypatch.setattr(directions, "set_distinct_directions", lambda *a, **k: found.append(original(*a, **k)))
    trainer = trained_in_three(tokenizer, rows, tmp_path, passed=held_out)
    trainer.evaluate()
    trainer.train()
    assert len(found) == 1


def test_a_model_with_another_adapter_is_refused(tokenizer, rows, tmp_path):
    model = tiny_llama(len(tokenizer))
    with pytest.raises(EUAError, match="distinct_directions = 3 was set with an adapter"):
        make(model, tokenizer, rows, tmp_path, LORA, distinct_directions=3)
    with pytest.raises(EUAError, match="an adapter of an earlier run first"):
        make(get_peft_model(model, LORA), tokenizer, rows, tmp_path, distinct_directions=3)


def test_more_directions_than_there_are_are_refused(tokenizer, rows, tmp_path):
    trainer = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, distinct_directions=65)
    with pytest.raises(
        EUAError, match=r"distinct_directions = 65 was set, but there are only \d+ directions .*down_proj are larger"
    ):
        trainer.train()


def test_no_direction_is_made_of_rounding():
    """Of tokens that are alike there are as many directions as of one of each, and none that retained inputs fill more."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 20, generator=generator) for n in (5, 9))
    found = distinct_directions(x.repeat(4, 1), y, 12)
    assert found.shape == (5, 20)
    with pytest.raises(EUAError, match="only 5 directions"):
        directions._of_layer("layer", x.repeat(4, 1), 0.1 * y, 12)
    with pytest.raises(EUAError, match="only 0 directions"):
        directions._of_layer("layer", x, 100 * x, 2)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "mlp.down_proj"),
        ("gemma3_text", "mlp.down_proj"),
        ("gpt2", "mlp.c_proj"),
        ("gpt_neox", "mlp.dense_4h_to_h"),
        ("opt", "fc2"),
        ("mpt", "ffn.down_proj"),
    ],
)
def test_the_adapter_is_on_the_mlps(architecture, name):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes, **OTHER_SIZES.get(architecture, {})))
    adapter = adapter_on_mlps(model, 2)
    assert adapter.target_modules == {name}
    adapted = get_peft_model(model, adapter)
    assert len(directions._adapted(adapted)) == 2
    rows = [EncodedRow(tuple(range(3, 3 + length)), 2) for length in (9, 6, 12)]
    set_distinct_directions(adapted, rows[:2], rows[2:], batch_size=2)  # whatever the shape that its MLPs read


def test_experts_in_one_tensor_are_refused():
    config = AutoConfig.for_model("mixtral", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=100)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(EUAError, match="have no linear layer outside of attention"):
        adapter_on_mlps(model, 2)


def test_sharded_models_are_refused(monkeypatch):
    monkeypatch.setattr("eua.training.checks.is_sharded", lambda accelerator: True)
    with pytest.raises(EUAError, match="distinct_directions was set with FSDP or ZeRO-3"):
        check_setup(SimpleNamespace(), torch.nn.Linear(1, 1), None, distinct_directions=True)
