"""EUATrainer: the step, what it moves, boundaries, and that nothing is lost."""

from __future__ import annotations

import copy
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from eua import EUAConfig, EUAError, EUATrainer
from eua.data.batches import ForgetRetainDataset, pad_rows
from eua.data.rows import encode_rows
from eua.model.forward import check_head, hidden_states
from eua.model.head import output_head
from eua.model.loading import load_model
from eua.training.boundaries import compute_boundaries
from eua.training.checkpoints import last_checkpoint
from tests.conftest import tiny_llama
from tests.methods.test_d2 import transcription

ROOT = Path(__file__).parents[2]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=True)


def config(folder: Path, **options) -> EUAConfig:
    defaults = {
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    return EUAConfig(output_dir=str(folder), **defaults | options)


def make(model, tokenizer, rows, folder, peft_config=None, forget=None, retain=None, passed=None, **options) -> EUATrainer:
    """A trainer on a few rows; ``options`` are settings, ``passed`` goes to the trainer itself."""
    return EUATrainer(
        model,
        config(folder, **options),
        forget_dataset=rows["forget"][:6] if forget is None else forget,
        retain_dataset=rows["retain"][:9] if retain is None else retain,
        processing_class=tokenizer,
        peft_config=peft_config,
        **(passed or {}),
    )


def add_dropout(model: LlamaForCausalLM, share: float) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = share


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("temperature", "fill", "rho"), [(1.0, "zero", 0.1), (2.0, "none", 0.3)])
def test_step_is_the_method(model, tokenizer, rows, tmp_path, temperature, fill, rho):
    """The trainer's loss equals method.md on the model's own logits and those of a separate reference model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4  # a fresh model's logits are nearly flat, whatever its layers do
    trainer = make(model, tokenizer, rows, tmp_path, alpha=0.5, gamma=0.2, temperature=temperature, fill=fill, rho=rho)
    add_dropout(model, 0.5)  # boundaries are taken in eval mode whatever mode the model is in
    model.train()
    boundaries = trainer._find_boundaries(resuming=False)
    assert model.training
    reference = copy.deepcopy(model.eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)

    items, logits, ref_logits, targets, forget = [], [], [], [], []
    for kind in ("forget", "retain"):
        for row, boundary in zip(trainer.encoded_rows[kind], boundaries[kind], strict=True):
            items.append({"row": row, "reference": boundary, "kind": kind})
            ids = torch.tensor([row.input_ids])
            answer = slice(row.prompt_length - 1, len(row.input_ids) - 1)
            logits.append(model(ids).logits[0, answer].double())
            ref_logits.append(reference(ids).logits[0, answer].double().detach())
            targets += row.answer_ids
            forget += [kind == "forget"] * len(row.answer_ids)
    expected = transcription(
        torch.cat(logits), torch.cat(ref_logits), torch.tensor(targets), torch.tensor(forget), rho, temperature, 0.2, 0.5, fill
    )
    found = trainer.compute_loss(model, trainer.data_collator([items]))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_training_moves_every_trainable_parameter_and_no_other(model, tokenizer, rows, tmp_path, peft_config):
    trainer = make(model, tokenizer, rows, tmp_path, copy.deepcopy(peft_config))
    before = weights(trainer.model)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == (peft_config is None or "lora_" in name)
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    logged = trainer.state.log_history[0]
    for key in (
        "loss_forget",
        "loss_retain",
        "nll_retain",
        "energy_forget",
        "energy_retain",
        "beyond_boundary_forget",
        "beyond_boundary_retain",
    ):
        assert key in logged
    assert 0 <= logged["beyond_boundary_forget"] <= 1
    assert trainer.model.config.use_cache


def test_training_moves_energies_apart(trained_folder, tokenizer, rows, tmp_path):
    model = LlamaForCausalLM.from_pretrained(trained_folder)
    trainer = make(
        model, tokenizer, rows, tmp_path, forget=rows["forget"], retain=rows["retain"], num_train_epochs=10, learning_rate=5e-4
    )
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert last["energy_forget"] - last["energy_retain"] > 4 + first["energy_forget"] - first["energy_retain"]
    assert last["beyond_boundary_forget"] > 0.5 > first["beyond_boundary_forget"]


def test_mixed_precision_follows_full_precision(tokenizer, rows, tmp_path):
    logs = []
    for bf16 in (False, True):
        model = tiny_llama(len(tokenizer))
        # A norm that keeps the half precision of its input hands the float32 head half-precision states.
        model.model.norm.register_forward_hook(lambda module, arguments, output: output.to(arguments[0].dtype))
        trainer = make(model, tokenizer, rows, tmp_path / str(bf16), bf16=bf16, max_steps=3)
        trainer.train()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        logs.append(trainer.state.log_history[0])
    for key in ("loss", "energy_forget", "nll_retain"):
        assert logs[0][key] != logs[1][key]
        assert logs[0][key] == pytest.approx(logs[1][key], rel=0.02)


def test_accumulated_batches_equal_one_big_batch(tokenizer, rows, tmp_path):
    """Unequal answer lengths: only counts over the whole window make the two the same."""
    forget = [{"question": "Who?", "answer": "word " * n} for n in (1, 9, 2, 7)]
    trained = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = tiny_llama(len(tokenizer))
        trainer = make(
            model,
            tokenizer,
            rows,
            tmp_path / str(batch_size),
            forget=forget,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
        )
        trainer.train()
        trained.append((weights(model), trainer.state.log_history[0]))
    for name, parameter in trained[0][0].items():
        torch.testing.assert_close(parameter, trained[1][0][name], rtol=1e-4, atol=1e-6)
    for _, logged in trained:  # the parts are tallied apart from the loss; only right counts bring the two together
        parts = 0.05 * (logged["loss_forget"] + logged["loss_retain"]) + logged["nll_retain"]
        assert logged["loss"] == pytest.approx(parts, rel=1e-4)
    for key in ("loss", "loss_forget", "beyond_boundary_retain", "energy_forget"):
        assert trained[0][1][key] == pytest.approx(trained[1][1][key], rel=1e-4)


def test_epochs_draw_other_pairs_and_the_ratio_asked_for(model, tokenizer, rows, tmp_path, monkeypatch):
    drawn = []
    getitem = ForgetRetainDataset.__getitem__
    monkeypatch.setattr(ForgetRetainDataset, "__getitem__", lambda self, index: drawn.append(index) or getitem(self, index))
    make(model, tokenizer, rows, tmp_path, retain_per_forget=3).train()
    first, second = drawn[:6], drawn[6:]
    assert len(second) == 6
    assert {len(retain) for _, retain, _ in drawn} == {3}
    assert first != second
    visits = [index for _, retain, _ in drawn for index in retain]
    assert [visits.count(i) for i in range(9)] == [4] * 9


# ---- boundaries -----------------------------------------------------------------------------------------------------


def test_lora_boundaries_are_those_of_the_base_weights(model, tokenizer, rows, tmp_path):
    full = make(model, tokenizer, rows, tmp_path / "full")._find_boundaries(resuming=False)
    lora = make(model, tokenizer, rows, tmp_path / "lora", copy.deepcopy(LORA))._find_boundaries(resuming=False)
    for kind in ("forget", "retain"):
        for a, b in zip(full[kind], lora[kind], strict=True):
            torch.testing.assert_close(a, b)


def test_boundaries_are_kept_and_stale_ones_noticed(model, tokenizer, rows, tmp_path, monkeypatch):
    computed = []

    def counting(*args, **kwargs):
        computed.append(args[2])
        return compute_boundaries(*args, **kwargs)

    monkeypatch.setattr("eua.training.boundaries.compute_boundaries", counting)
    first = make(model, tokenizer, rows, tmp_path)._find_boundaries(resuming=False)
    again = make(model, tokenizer, rows, tmp_path)._find_boundaries(resuming=True)
    assert computed == ["forget", "retain"]
    assert all(torch.equal(a, b) for kind in first for a, b in zip(first[kind], again[kind], strict=True))

    with pytest.raises(EUAError, match="belongs to another model, other rows or other settings"):
        make(model, tokenizer, rows, tmp_path, rho=0.2)._find_boundaries(resuming=True)
    trainer = make(model, tokenizer, rows, tmp_path, rho=0.2)
    trainer._find_boundaries(resuming=False)
    assert len(computed) == 4
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    trainer._find_boundaries(resuming=False)  # a trainer keeps those of its starting weights, even when it is run again
    assert len(computed) == 4
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    make(model, tokenizer, rows, tmp_path, rho=0.2)._find_boundaries(resuming=False)
    assert len(computed) == 6

    (tmp_path / "boundaries.safetensors").write_bytes(b"half a file")
    with pytest.raises(EUAError, match="cannot be read .* delete the file"):
        make(model, tokenizer, rows, tmp_path)._find_boundaries(resuming=False)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 1, "per_device_train_batch_size": 2},
        {"max_steps": 3, "per_device_train_batch_size": 4},  # into the second epoch
        {"max_steps": 2, "per_device_train_batch_size": 4, "dataloader_drop_last": True},  # an epoch leaves two rows out
        {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"max_steps": 2, "per_device_train_batch_size": 2, "train_sampling_strategy": "group_by_length"},
        {"max_steps": 5, "per_device_train_batch_size": 2, "retain_per_forget": 2},
        {"num_train_epochs": 1.5, "per_device_train_batch_size": 2},
    ],
    ids=str,
)
def test_boundaries_are_computed_only_for_rows_that_are_trained_on(model, tokenizer, rows, tmp_path, monkeypatch, options):
    computed = []

    def counting(model, rows, kind, **kwargs):
        computed.extend((kind, tuple(row.input_ids)) for row in rows)
        return compute_boundaries(model, rows, kind, **kwargs)

    monkeypatch.setattr("eua.training.boundaries.compute_boundaries", counting)
    retain = rows["retain"][:30]
    trainer = make(model, tokenizer, rows, tmp_path, retain=retain, **{"max_steps": -1} | options)
    trainer.train()  # would stop at a NaN if a boundary were missing
    assert len(computed) == len(set(computed))
    batch, accumulation = options["per_device_train_batch_size"], options.get("gradient_accumulation_steps", 1)
    if "max_steps" in options:  # no more than whole steps need
        pairs = options["max_steps"] * batch * accumulation
        assert len(computed) <= pairs * (1 + options.get("retain_per_forget", 1)) + 2 * batch
    assert len(computed) < 6 + len(retain)


def test_boundaries_of_used_rows_do_not_depend_on_the_others(model, tokenizer, rows, tmp_path):
    short, long = (make(model, tokenizer, rows, tmp_path / str(n), max_steps=n) for n in (1, 40))
    found, expected = (trainer._find_boundaries(resuming=False) for trainer in (short, long))
    known = 0
    for kind in ("forget", "retain"):
        for one, other in zip(found[kind], expected[kind], strict=True):
            if not one.isnan().any():
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
                known += 1
    assert 0 < known < len(found["forget"]) + len(found["retain"])
    assert not any(row.isnan().any() for of_kind in expected.values() for row in of_kind)


def test_a_longer_run_finds_or_computes_what_a_shorter_one_left_out(model, tokenizer, rows, tmp_path):
    trainer = make(model, tokenizer, rows, tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    original = copy.deepcopy(model)
    trainer.train()
    trainer.train(resume_from_checkpoint=True)  # needs no other rows
    trainer.args.max_steps = 40
    with pytest.raises(EUAError, match=r"would now use \d+ rows that it did not use before, .* make a new trainer"):
        trainer.train(resume_from_checkpoint=True)
    resumed = make(copy.deepcopy(original), tokenizer, rows, tmp_path / "run", max_steps=40)
    whole = make(original, tokenizer, rows, tmp_path / "whole", max_steps=40)
    found, expected = (trainer._find_boundaries(resuming=resuming) for trainer, resuming in ((resumed, True), (whole, False)))
    for kind, of_kind in expected.items():
        for one, other in zip(found[kind], of_kind, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_boundaries_go_on_where_they_were_interrupted(model, tokenizer, rows, tmp_path, monkeypatch):
    """Neither what is in the file nor what came after its last save is computed again; the result is that of one go."""
    expected = make(model, tokenizer, rows, tmp_path / "whole")._find_boundaries(resuming=False)
    monkeypatch.setattr("eua.training.boundaries._BATCHES_AT_ONCE", 1)
    computed = []

    def dying(model, rows, *args, **kwargs):
        computed.append(len(rows))
        if len(computed) == 6:
            raise KeyboardInterrupt
        return compute_boundaries(model, rows, *args, **kwargs)

    monkeypatch.setattr("eua.training.boundaries.compute_boundaries", dying)
    with pytest.raises(KeyboardInterrupt):
        make(model, tokenizer, rows, tmp_path, boundary_batch_size=2)._find_boundaries(resuming=False)
    assert computed == [2] * 6  # 6 forget rows, and 4 of the 9 retain rows
    kept = load_file(tmp_path / "boundaries.safetensors")
    assert not kept["forget"].isnan().any()
    assert 0 < kept["retain"].isnan().sum() < len(kept["retain"])

    found = make(model, tokenizer, rows, tmp_path, boundary_batch_size=2)._find_boundaries(resuming=False)
    assert computed[6:] == [2, 2, 1]
    for kind, of_rows in expected.items():
        for ours, theirs in zip(found[kind], of_rows, strict=True):
            torch.testing.assert_close(ours, theirs)
    make(model, tokenizer, rows, tmp_path)._find_boundaries(resuming=True)
    assert len(computed) == 9


def test_boundaries_are_saved_while_they_are_computed(model, tokenizer, rows, tmp_path, monkeypatch):
    """A process that is killed, with no time to say goodbye, loses half a minute."""
    monkeypatch.setattr("eua.training.boundaries._BATCHES_AT_ONCE", 1)
    monkeypatch.setattr("eua.training.boundaries._SECONDS_BETWEEN_SAVES", 0.0)
    saved = []
    monkeypatch.setattr(
        "eua.training.boundaries.save_boundaries", lambda path, found, *_: saved.append(str(found).count("None"))
    )
    make(model, tokenizer, rows, tmp_path, boundary_batch_size=4)._find_boundaries(resuming=False)
    assert saved == [11, 9, 5, 1, 0, 0]  # rows to come, after each batch and at the end


def test_constant_boundaries(model, tokenizer, rows, tmp_path):
    boundaries = make(model, tokenizer, rows, tmp_path, m_in=-20.0, m_out=-5.0)._find_boundaries(resuming=False)
    assert {float(x) for row in boundaries["retain"] for x in row} == {-20.0}
    assert {float(x) for row in boundaries["forget"] for x in row} == {-5.0}


# ---- nothing is lost ------------------------------------------------------------------------------------------------


def test_a_later_run_cannot_be_mixed_up_with_an_earlier_one(model, tokenizer, rows, tmp_path):
    make(model, tokenizer, rows, tmp_path, save_strategy="epoch").train()
    other = make(tiny_llama(len(tokenizer), seed=1), tokenizer, rows, tmp_path)
    with pytest.raises(EUAError, match="checkpoint-6 belongs to an earlier run"):
        other.train()


def test_a_stop_in_an_epoch_saves_its_step_once(model, tokenizer, rows, tmp_path, monkeypatch):
    """Trainer asks for a checkpoint at the step and again as the epoch ends; the second would replace the first."""
    saves, handler = [], signal.getsignal(signal.SIGINT)
    save = EUATrainer._save_optimizer_and_scheduler
    monkeypatch.setattr(
        EUATrainer, "_save_optimizer_and_scheduler", lambda self, f: saves.append(self.state.global_step) or save(self, f)
    )

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = make(model, tokenizer, rows, tmp_path, save_strategy="epoch", save_total_limit=1)
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt, match="after step 5"):
        trainer.train()
    assert saves == [3, 5]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_signal_that_comes_again_at_once_is_the_same_request(model, tokenizer, rows, tmp_path):
    """A terminal sends it to all processes, and the launcher passes it on to its own; a later one ends the run at once."""

    class Interrupt(TrainerCallback):
        def __init__(self, pause: float) -> None:
            self.pause = pause

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(self.pause)
                os.kill(os.getpid(), signal.SIGTERM)

    for pause, checkpoints in ((0.1, {"checkpoint-3"}), (1.1, set())):
        folder = tmp_path / str(pause)
        trainer = make(model, tokenizer, rows, folder, save_strategy="steps", save_steps=50)
        trainer.add_callback(Interrupt(pause))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert {path.name for path in folder.glob("checkpoint-*")} == checkpoints


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_resumed_training_reaches_the_same_weights(tokenizer, rows, tmp_path, peft_config):
    """Interrupted in the middle of an epoch, with dropout drawing from the random state."""

    def fresh(folder: Path) -> EUATrainer:
        model = tiny_llama(len(tokenizer))
        add_dropout(model, 0.1)
        torch.manual_seed(5)
        return make(model, tokenizer, rows, folder, copy.deepcopy(peft_config), save_strategy="steps", save_steps=4)

    whole = fresh(tmp_path / "whole")
    whole.train()
    assert whole.state.max_steps == 6
    resumed = fresh(tmp_path / "whole")
    (tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").unlink()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, parameter in weights(whole.model).items():
        assert torch.equal(parameter, weights(resumed.model)[name]), name


def test_a_failed_save_leaves_the_last_good_checkpoint(model, tokenizer, rows, tmp_path, monkeypatch):
    trainer = make(model, tokenizer, rows, tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    save = type(trainer)._save_optimizer_and_scheduler

    def failing(self, folder):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", failing)
    with pytest.raises(EUAError, match=r"checkpoint-4 cannot be written .*No space left on device.*: free some space"):
        trainer.train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert {path.name for path in tmp_path.iterdir()} == {"boundaries.safetensors", "checkpoint-2"}  # no half a checkpoint
    assert not list(tmp_path.rglob("*.bin"))  # no pickle of the arguments

    monkeypatch.undo()
    trainer = make(
        tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1
    )
    trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not list(tmp_path.glob(".*"))


def test_a_saved_model_loads(model, tokenizer, rows, tmp_path):
    trainer = make(model, tokenizer, rows, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(p, weights(loaded)[name]) for name, p in weights(model).items())
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors", ".md"}


def test_private_methods_of_trainer_that_are_overridden_are_listed():
    ours = [name for kind in EUATrainer.__mro__ if kind.__module__.startswith("eua.") for name in vars(kind)]
    overridden = {f"Trainer.{name}" for name in ours if hasattr(Trainer, name) and re.match("_[^_]", name)}
    listed = re.findall(r"^\| `(Trainer\._\w+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert overridden == set(listed)


# ---- refusing what cannot work --------------------------------------------------------------------------------------


def test_nan_stops_training_before_the_step(model, tokenizer, rows, tmp_path):
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(EUAError, match="NaN or infinity in the model's hidden states"):
        make(model, tokenizer, rows, tmp_path)

    ruin = {"learning_rate": 1e30, "max_grad_norm": 0.0}
    trainer = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, **ruin)
    with pytest.raises(EUAError, match="The loss became (nan|inf) at step 1 .* no step was taken on it"):
        trainer.train()

    ruin["learning_rate"] = 1e39  # beyond float32: the step itself makes infinities, which are not saved
    trainer = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, save_strategy="steps", save_steps=1, **ruin)
    with pytest.raises(EUAError, match="NaN or infinity in the weights .* after step 1"):
        trainer.train()
    assert last_checkpoint(tmp_path) is None


def test_models_that_cannot_be_honoured_are_refused(model, tokenizer, rows, tmp_path):
    with pytest.raises(EUAError, match="LlamaModel has no output head"):
        make(model.model, tokenizer, rows, tmp_path)
    on_head = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(EUAError, match="An adapter sits on the output head of LlamaForCausalLM"):
        make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, on_head)
    scaled = tiny_llama(len(tokenizer))
    scaled.lm_head.register_forward_hook(lambda module, arguments, output: 1.01 * output)
    with pytest.raises(EUAError, match="does more between hidden states and logits"):
        make(scaled, tokenizer, rows, tmp_path)
    wrapped = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, copy.deepcopy(LORA)).model
    with pytest.raises(EUAError, match="carries an adapter already"):
        make(wrapped, tokenizer, rows, tmp_path, copy.deepcopy(LORA))
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), copy.deepcopy(LORA))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(EUAError, match="merge the adapter into its base first"):
        make(LlamaForCausalLM.from_pretrained(tmp_path / "adapter"), tokenizer, rows, tmp_path)
    frozen = tiny_llama(len(tokenizer)).requires_grad_(False)
    with pytest.raises(EUAError, match="No parameter of the model requires a gradient"):
        make(frozen, tokenizer, rows, tmp_path)
    with pytest.raises(
        EUAError, match="Row 0 of the forget set holds token id .* out of range for the model's vocabulary of 50"
    ):
        make(tiny_llama(50), tokenizer, rows, tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gamma": -1.0}, "gamma = -1.0"),
        ({"rho": 0.0}, "rho = 0.0"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"fill": "one"}, "fill = 'one'"),
        ({"gamma_schedule": "step"}, 'gamma_schedule = \'step\' cannot be used: known are "constant", "linear" and "cosine"'),
        ({"gamma_warmup_ratio": 1.0}, "gamma_warmup_ratio = 1.0 cannot be used: a share of the steps"),
        ({"retain_loss": "mse"}, "retain_loss = 'mse' cannot be used: known for eua are nll, kl"),
        ({"metric_for_best_model": "kl_retain"}, 'measured with retain_loss = "kl" only: set that, or choose eval_nll_retain'),
        ({"stop_when_beyond_boundary": 0.0}, "stop_when_beyond_boundary = 0.0 cannot be used: a share of tokens"),
        ({"retain_per_forget": 0}, "retain_per_forget = 0"),
        ({"m_in": 1.0}, "constant boundaries come as a pair"),
        ({"remove_unused_columns": True}, "it would drop the boundaries"),
        (
            {"train_sampling_strategy": "sequential"},
            "train_sampling_strategy = 'sequential' cannot be used: forget and retain rows",
        ),
        (
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor = 0.1 cannot be used: the loss of D² has no smoothed labels",
        ),
        ({"hub_strategy": "every_save"}, "hub_strategy = 'every_save' cannot be used: checkpoints, which hold pickles"),
        (
            {"metric_for_best_model": "eval_accuracy"},
            "'eval_accuracy', but evaluation reports no such metric: choose one of eval_loss",
        ),
    ],
)
def test_bad_settings_are_told_what_is_wrong(options, text, tmp_path):
    with pytest.raises(EUAError, match=text):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"forget": []}, EUAError, "The forget set is empty"),
        ({"retain": []}, EUAError, "The retain set is empty"),
        ({"forget": [{"question": "Who?", "answer": ""}]}, EUAError, "Row 0 of the forget set has no answer"),
        ({"max_length": 4}, EUAError, "cuts its answer off"),
        ({"rho": 1e-4}, EUAError, "fraction 0.0001 of a vocabulary of 400 is less than one logit"),
    ],
)
def test_bad_runs_are_told_what_is_wrong(model, tokenizer, rows, tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        make(model, tokenizer, rows, tmp_path, **options).train()


def test_hidden_states_are_the_heads_input(model, tokenizer, rows):
    batch = pad_rows(encode_rows(rows["forget"][:3], tokenizer, None))
    with torch.no_grad():
        hidden = hidden_states(model, batch)
        theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(output_head(model).logits(hidden), theirs)
    check_head(model)
    assert not model.lm_head._forward_pre_hooks


def test_a_model_and_its_reference_may_be_paths(tokenizer, rows, tmp_path):
    folder = tmp_path / "model"
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    datasets = {"forget_dataset": rows["forget"], "retain_dataset": rows["retain"]}
    trainer = EUATrainer(folder, EUAConfig(output_dir=str(tmp_path / "run")), ref_model=folder, **datasets)
    assert trainer.reference is not None


def test_a_model_computes_in_its_own_dtype_after_training_in_bf16(model, tokenizer, rows, tmp_path):
    """So that a guard that is calibrated at once is for the model that is saved."""
    trainer = make(model, tokenizer, rows, tmp_path, max_steps=1, bf16=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded, _ = load_model(str(tmp_path / "saved"))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(trainer.model(ids).logits, loaded(ids).logits)
