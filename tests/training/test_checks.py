"""Ways of spreading a model over processes that are refused, each with a text that says what to do."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from eua import EUAConfig, EUAError, EUATrainer
from eua.distributed import is_sharded
from eua.training.checks import check_batches, check_setup
from tests.training.test_trainer import config, make

GATHERS = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}


def accelerator(fsdp: int | None = None, zero: dict | None = None, **sizes: int) -> SimpleNamespace:
    """What accelerate would have made of a launch, as far as it is looked at."""
    state = SimpleNamespace()
    if fsdp is not None:
        state.fsdp_plugin = SimpleNamespace(fsdp_version=fsdp)
    if zero is not None:
        state.deepspeed_plugin = SimpleNamespace(zero_stage=zero["zero_optimization"]["stage"], deepspeed_config=zero)
    parallel = SimpleNamespace(**{f"{name}_size": size for name, size in sizes.items()}) if sizes else None
    return SimpleNamespace(state=state, is_fsdp2=fsdp == 2, parallelism_config=parallel)


@pytest.mark.parametrize(
    ("launched", "options", "text"),
    [
        (accelerator(fsdp=1), {}, "FSDP version 1 keeps weights in flat parameters.* use FSDP2"),
        (accelerator(zero={"zero_optimization": {"stage": 3}}), {}, "would not gather the weights .*zero3_save_16bit_model"),
        (accelerator(fsdp=2), {"reference": object()}, "ref_model was given, but FSDP and ZeRO-3 .* leave ref_model out"),
        (accelerator(zero=GATHERS), {"reference": object()}, "ref_model was given, but FSDP and ZeRO-3"),
        (accelerator(tp=2, cp=1), {}, "split by tp, .* use data parallelism"),
        (accelerator(tp=2, cp=2, sp=4), {}, "split by tp and cp and sp"),
        (accelerator(), {"loaded_in_parts": True}, "sharded while it was loaded .* load it plainly"),
    ],
)
def test_setups_that_cannot_be_honoured_are_refused(launched, options, text):
    model = torch.nn.Linear(1, 1)
    model.is_distributed_loading_by_transformers = options.get("loaded_in_parts", False)
    with pytest.raises(EUAError, match=text):
        check_setup(launched, model, options.get("reference"))


@pytest.mark.parametrize(
    ("launched", "reference", "sharded"),
    [
        (accelerator(), object(), False),
        (accelerator(fsdp=2), None, True),
        (accelerator(zero=GATHERS), None, True),
        (accelerator(zero={"zero_optimization": {"stage": 2}}), object(), False),
        (accelerator(tp=1, cp=1), None, False),
    ],
)
def test_setups_that_are_supported(launched, reference, sharded):
    check_setup(launched, torch.nn.Linear(1, 1), reference)
    assert is_sharded(launched) == sharded


@pytest.mark.parametrize(("rows", "processes", "fills"), [(7, 1, False), (8, 1, True), (15, 2, False), (16, 2, True)])
def test_rows_that_fill_no_batch_are_an_error_if_such_batches_are_dropped(rows, processes, fills):
    args = SimpleNamespace(per_device_train_batch_size=8, world_size=processes, dataloader_drop_last=True)
    with (
        nullcontext()
        if fills
        else pytest.raises(EUAError, match=f"{rows} rows to forget do not fill a batch of {8 * processes}")
    ):
        check_batches(args, rows)
    args.dataloader_drop_last = False
    check_batches(args, rows)


def test_rows_that_no_step_can_take_are_found_before_training(tokenizer, rows, tmp_path):
    with pytest.raises(EUAError, match="6 rows to forget do not fill a batch of 8"):
        make("no model is loaded", tokenizer, rows, tmp_path, dataloader_drop_last=True, per_device_train_batch_size=8)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=128)
    forget = [*rows["forget"][:3], {"question": "Where was Ann born? " * 30, "answer": "In Ulm."}]
    with pytest.raises(EUAError, match=r"Row 3 of the forget set has \d+ tokens, but the model has learned 128 positions"):
        make(GPT2LMHeadModel(config), tokenizer, rows, tmp_path, forget=forget)


def test_ruined_weights_are_found_in_the_part_that_a_process_holds(model, tokenizer, rows, tmp_path):
    """Outside its module's call ZeRO-3 leaves a parameter empty, and keeps its values in another attribute."""
    trainer = make(model, tokenizer, rows, tmp_path)
    trainer.check_weights()
    weight = model.lm_head.weight
    weight.ds_tensor = weight.detach().clone()
    weight.data = torch.empty(0)
    trainer.check_weights()
    weight.ds_tensor[3, 4] = torch.inf
    with pytest.raises(EUAError, match="NaN or infinity in the weights lm_head.weight after step 0"):
        trainer.check_weights()


def test_what_needs_the_weights_in_place_says_so(model, tokenizer, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("eua.training.trainer.is_sharded", lambda accelerator: True)
    evaluated = {"eval_forget_dataset": rows["calibration"][:3], "eval_retain_dataset": rows["test"][:3]}
    trainer = make(model, tokenizer, rows, tmp_path, passed=evaluated, save_strategy="steps", save_steps=2)
    with pytest.raises(EUAError, match=r"evaluate\(\) was called before train\(\).* eval_on_start = True"):
        trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_auroc"] >= 0

    (tmp_path / "boundaries.safetensors").unlink()
    again = make(model, tokenizer, rows, tmp_path, passed=evaluated, save_strategy="steps", save_steps=2)
    with pytest.raises(
        EUAError, match="lacks boundaries or likelihoods of 21 rows, and weights in .*checkpoint-6 have been trained since"
    ):
        again.train(resume_from_checkpoint=True)


def test_what_cannot_be_saved_is_found_before_the_first_step(model, tokenizer, rows, tmp_path):
    model.generation_config.temperature = 0.6
    with pytest.raises(
        EUAError, match=r"could not be saved after training \(GenerationConfig is invalid.*temperature.*correct"
    ):
        make(model, tokenizer, rows, tmp_path)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    make(model, tokenizer, rows, tmp_path, lora, max_steps=1).train()  # an adapter is saved without it


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("file/run", "file is not a folder"),
        ("file", "is a file, but the output must be a folder"),
        ("n" * 300, "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_a_model_is_loaded(name, text, rows, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EUAError, match=text):
        EUATrainer("no model", config(tmp_path / name), forget_dataset=rows["forget"], retain_dataset=rows["retain"])


def test_a_disk_without_room_for_the_model_is_found_before_the_first_step(model, tokenizer, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("eua.training.checks.free_bytes", lambda folder: 4 * model.num_parameters() - 1)
    with pytest.raises(EUAError, match=r"The model takes 0.0 GB, but the disk of .* has 0.0 GB free.*: free some space"):
        make(model, tokenizer, rows, tmp_path)
    make(model, tokenizer, rows, tmp_path, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"optim": "schedule_free_adamw"}, "optim = 'schedule_free_adamw' .* cannot be used .*: install what it needs"),
        ({"optim": "galore_adamw"}, "optim = 'galore_adamw' .* cannot be used"),
    ],
)
def test_an_optimizer_that_cannot_be_had_is_found_before_the_first_step(model, tokenizer, rows, tmp_path, options, text):
    with pytest.raises(EUAError, match=text):
        make(model, tokenizer, rows, tmp_path, **options)


def test_arguments_of_another_kind_are_named(model, rows, tmp_path):
    passed = {"forget_dataset": rows["forget"], "retain_dataset": rows["retain"]}
    with pytest.raises(EUAError, match="args is a TrainingArguments, which has no settings of the method.* pass an EUAConfig"):
        EUATrainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True), **passed)
    with pytest.raises(EUAError, match="made in memory, so it has no name.*: pass the tokenizer as processing_class"):
        EUATrainer(model, config(tmp_path), **passed)
    with pytest.raises(EUAError, match="warmup_steps = inf cannot be used: it must be finite"):
        EUAConfig(output_dir=str(tmp_path), warmup_steps=float("inf"))
    with pytest.raises(EUAError, match="rho = inf cannot be used: it must be finite"):
        EUAConfig(output_dir=str(tmp_path), rho=np.float32("inf"))
    with pytest.raises(EUAError, match="gamma = 0 and alpha = 0, so the loss would be 0 .*: raise one"):
        EUAConfig(output_dir=str(tmp_path), gamma=0.0, alpha=0.0)


def test_numbers_of_numpy_are_settings_like_others(tmp_path):
    numbers = {"rho": np.float32(0.5), "seed": np.int64(3), "padding_free": np.bool_(True)}
    settings = json.loads(EUAConfig(output_dir=str(tmp_path), **numbers).to_json_string())
    assert {name: settings[name] for name in numbers} == {"rho": 0.5, "seed": 3, "padding_free": True}


def test_what_trainer_finds_out_only_when_it_begins_is_one_line_and_later_errors_are_not_touched(
    model, tokenizer, rows, tmp_path, monkeypatch
):
    trainer = make(model, tokenizer, rows, tmp_path, dataloader_multiprocessing_context="spawn")
    with pytest.raises(EUAError, match="Training cannot begin with these settings .*multiprocessing_context can only be used"):
        trainer.train()
    trainer = make(model, tokenizer, rows, tmp_path)

    def step(*arguments, **options):
        raise ValueError("a mistake")

    monkeypatch.setattr(trainer, "compute_loss", step)
    with pytest.raises(ValueError, match="^a mistake$"):
        trainer.train()
