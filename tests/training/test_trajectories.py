"""Twenty steps end at the same weights whatever way they are computed."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from eua import EUATrainer
from eua.data.batches import pad_rows
from eua.model.forward import token_energies
from fused_energy import linear_energy
from tests.conftest import tiny_llama
from tests.training.test_trainer import make

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def sharp(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3  # a fresh model's logits are nearly flat, whatever its layers do
    return model


def trained(
    tokenizer, rows, folder: Path, model: PreTrainedModel | None = None, lora: bool = False, **options: Any
) -> EUATrainer:
    """After 20 steps on 12 forget rows, four a step."""
    defaults = {"max_steps": 20, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    trainer = make(
        sharp(tiny_llama(len(tokenizer))) if model is None else model,
        tokenizer,
        rows,
        folder,
        copy.deepcopy(LORA) if lora else None,
        forget=rows["forget"][:12],
        retain=rows["retain"][:30],
        **defaults | options,
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tokenizer, rows, tmp_path_factory) -> EUATrainer:
    return trained(tokenizer, rows, tmp_path_factory.mktemp("plain"))


def assert_same_course(found: EUATrainer, expected: EUATrainer, tolerance: float = 2e-5) -> None:
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (found, expected)]
    assert len(losses[0]) == len(losses[1]) == 20
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1][-1] < 0.9 * losses[1][0]
    theirs = dict(expected.model.named_parameters())
    for name, parameter in found.model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("implementation", ["reference", "streaming"])
def test_implementations(tokenizer, rows, tmp_path, monkeypatch, plain, implementation):
    used = []

    def named(*args, **kwargs):
        used.append(implementation)
        return linear_energy(*args, **kwargs, implementation=implementation)

    monkeypatch.setattr("eua.model.head.linear_energy", functools.wraps(linear_energy)(named))
    assert_same_course(trained(tokenizer, rows, tmp_path), plain)
    assert len(used) == 20


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"padding_free": True},
        {"padding_free": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"activation_checkpointing": True},
        {"dataloader_num_workers": 2},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_settings_that_change_how_and_not_what(tokenizer, rows, tmp_path, plain, options):
    assert_same_course(trained(tokenizer, rows, tmp_path, **options), plain)


def test_a_resumed_run_and_a_whole_one(tokenizer, rows, tmp_path, plain):
    """With packed, accumulated batches and a rising and falling γ, from the middle of an epoch."""
    options = {"padding_free": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"gamma_schedule": "cosine", "gamma_warmup_ratio": 0.3, "save_strategy": "steps", "save_steps": 8}
    whole = trained(tokenizer, rows, tmp_path, **options)
    again = make(
        sharp(tiny_llama(len(tokenizer))),
        tokenizer,
        rows,
        tmp_path,
        forget=rows["forget"][:12],
        retain=rows["retain"][:30],
        max_steps=20,
        lr_scheduler_type="constant",
        **options,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    for found, expected in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_rows_of_like_length_are_other_batches_of_the_same_rows(tokenizer, rows, tmp_path):
    options = {"per_device_train_batch_size": 1, "retain_per_forget": 3, "gradient_accumulation_steps": 4}
    runs = {}
    for strategy in ("random", "group_by_length"):
        runs[strategy] = trained(tokenizer, rows, tmp_path / strategy, train_sampling_strategy=strategy, **options)
    padding, tokens = [], []
    for trainer in runs.values():
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        padding.append(sum(int((mask == 0).sum()) for mask in masks))
        tokens.append(sum(int(mask.sum()) for mask in masks))
    assert tokens[0] == tokens[1]
    assert padding[1] < 0.7 * padding[0]


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_adapters_on_a_base_in_half_precision(tokenizer, rows, tmp_path, dtype):
    """Weights of the base are in half precision, those that are trained in float32; the course is that of float32."""
    expected = trained(tokenizer, rows, tmp_path / "float32", lora=True, learning_rate=1e-2)
    found = trained(
        tokenizer, rows, tmp_path / "half", sharp(tiny_llama(len(tokenizer))).to(dtype), lora=True, learning_rate=1e-2
    )
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in found.model.parameters()}
    assert dtypes == {True: torch.float32, False: dtype}
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")
def test_adapters_on_a_quantized_base(tokenizer, rows, tmp_path, bits):
    """QLoRA: the quantized base stays as it is, the adapter learns, and energies are those of the quantized model's logits."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sharp(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    load = {"quantization_config": quantization, "dtype": torch.float32, "device_map": "cpu"}
    base = prepare_model_for_kbit_training(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", **load), use_gradient_checkpointing=False
    )
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = trained(tokenizer, rows, tmp_path / "run", base, lora=True, learning_rate=1e-2)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    after = {name.replace(".base_layer", ""): tensor for name, tensor in trainer.model.base_model.model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if tensor.dtype in (torch.uint8, torch.int8))

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **load).eval()
    assert isinstance(loaded, PeftModel)
    batch = pad_rows(trainer.encoded_rows["forget"][:4])
    counted = batch["labels"][:, 1:] != -100
    energies = []
    with torch.no_grad():
        for model in (trainer.model.eval(), loaded):
            z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][counted]
            energies.append(token_energies(model, batch, 1.0).energy[counted])
            torch.testing.assert_close(energies[-1], -z.logsumexp(dim=-1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(*energies, rtol=0, atol=0.05)  # on a CPU quantized layers compute otherwise after training
