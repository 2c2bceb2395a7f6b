"""The card of a saved model: it says what the run was, shows no row and no path, and is pushed with the model alone."""

from __future__ import annotations

import copy
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from transformers import LlamaForCausalLM

from eua import EUAConfig, EUAError, EUATrainer
from eua.data.rows import encode_rows, rows_digest
from eua.training.config import EVAL_METRICS
from tests.conftest import tiny_llama
from tests.training.test_trainer import LORA, make

BOTH = pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])


@pytest.fixture
def base(tokenizer, tmp_path) -> LlamaForCausalLM:
    """A model that was loaded from a folder, whose path nobody else should read."""
    folder = tmp_path / "secret-place"
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def held_out(rows) -> dict[str, Any]:
    return {"eval_forget_dataset": rows["forget"][6:], "eval_retain_dataset": rows["test"]}


def table(card: str, heading: str) -> dict[str, list[str]]:
    """The first table under a heading: first cell → the other cells; its head is under ``""``."""
    section = card.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {"": lines[0][1:]} | {line[0]: line[1:] for line in lines[2:]}


def assert_figures_are(found: dict[str, list[str]], column: int, logged: dict[str, float], prefix: str = "") -> None:
    names = [name for name in EVAL_METRICS if f"{prefix}{name}" in logged]
    assert {"loss", "beyond_boundary_forget", "energy_retain"} <= set(names)
    for name in names:
        assert float(found[name][column]) == pytest.approx(logged[f"{prefix}{name}"], rel=1e-3), name


@BOTH
def test_a_card_says_what_the_run_was(base, tokenizer, rows, tmp_path, monkeypatch, peft_config):
    settings = {"gamma": 0.3, "gamma_schedule": "cosine", "temperature": 1.5, "rho": 0.2, "retain_per_forget": 2, "seed": 7}
    trainer = make(
        base, tokenizer, rows, tmp_path, copy.deepcopy(peft_config), passed=held_out(rows), eval_strategy="epoch", **settings
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    card = ModelCard.load(tmp_path / "model" / "README.md")

    found = card.data.to_dict()
    assert (found["library_name"], found["pipeline_tag"]) == ("peft" if peft_config else "transformers", "text-generation")
    assert {"eua", "unlearning"} <= set(found["tags"])
    assert "base_model" not in found
    assert ("LORA adapter (r = 4, lora_alpha = 8, target_modules = q_proj, v_proj)" in card.text) == bool(peft_config)
    assert ("all weights, in float32." in card.text) != bool(peft_config)
    assert "Steps made: 6 of 6." in card.text
    said = table(card.text, "Settings")
    defaults = {"alpha": 1.0, "fill": "zero", "retain_loss": "nll", "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    assert {key: said[key][0] for key in settings | defaults} == {
        key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in (settings | defaults).items()
    }

    sets = {"forget": rows["forget"][:6], "retain": rows["retain"][:9], "eval forget": rows["forget"][6:]}
    said = table(card.text, "Data")
    for kind, part in sets.items():
        encoded = encode_rows(part, tokenizer, 1024)
        answer_tokens = sum(len(row.answer_ids) for row in encoded)
        assert said[kind] == [str(len(part)), str(answer_tokens), rows_digest(encoded)]

    log = trainer.state.log_history
    said = table(card.text, "Figures")
    assert said[""] == ["training, logged at step 6", "held-out rows, at step 6"]
    assert_figures_are(said, 0, next(line for line in reversed(log) if "beyond_boundary_forget" in line))
    assert_figures_are(said, 1, next(line for line in reversed(log) if "eval_auroc" in line), "eval_")
    assert said["auroc"][0] == ""

    whole = str(card)
    assert "secret-place" not in whole
    assert str(tmp_path) not in whole
    assert not [text for part in rows.values() for row in part for text in row.values() if text in whole]

    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1].replace("path/to/this/folder", str(tmp_path / "model"))
    made: dict[str, Any] = {"held_out_rows": rows["retain"] + rows["test"]}
    exec(code, made)
    assert made["guard"].temperature == 1.5
    assert (tmp_path / "guard" / "energy_guard.json").is_file()


def test_rows_have_a_fingerprint_of_their_own(model, tokenizer, rows, tmp_path):
    def digests(**options: Any) -> dict[str, str]:
        card = make(model, tokenizer, rows, tmp_path, **options).model_card()
        return {kind: cells[-1] for kind, cells in table(card, "Data").items()}

    first = digests()
    assert digests(gamma=0.7, m_in=-20.0, m_out=-5.0, seed=3) == first
    changed = [*rows["retain"][:8], rows["retain"][8] | {"answer": "Nobody knows."}]
    assert digests(retain=changed) == first | {"retain": digests(retain=changed)["retain"]} != first
    assert digests(forget=rows["forget"][:6][::-1])["forget"] != first["forget"]
    # The same ids, with the answer said to start one token earlier.
    encoded = encode_rows(rows["forget"][:1], tokenizer, None)
    moved = [type(row)(row.input_ids, row.prompt_length - 1) for row in encoded]
    assert rows_digest(moved) != rows_digest(encoded)


def test_only_a_name_of_the_hub_is_a_base_model(model, tokenizer, rows, tmp_path, monkeypatch):
    trainer = make(model, tokenizer, rows, tmp_path)
    (tmp_path / "org" / "target").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, expected in {
        "org/model-1B": "org/model-1B",
        "gpt2": "gpt2",
        "org/target": None,  # looks like a repository's, and is a folder here
        "../runs/target": None,
        "/home/ann/target": None,
        "C:\\models\\target": None,
        "": None,
    }.items():
        model.config._name_or_path = name
        card = ModelCard(trainer.model_card())
        assert card.data.base_model == expected
        assert expected or not name or name not in str(card)
    model.config._name_or_path = "org/model-1B"
    assert ModelCard(trainer.model_card()).data["base_model_relation"] == "finetune"
    wrapped = make(model, tokenizer, rows, tmp_path, copy.deepcopy(LORA))
    assert ModelCard(wrapped.model_card()).data["base_model_relation"] == "adapter"


def test_other_kinds_of_run(model, tokenizer, rows, tmp_path):
    options = {"m_in": -20.0, "m_out": -5.0, "retain_loss": "kl"}
    card = make(model, tokenizer, rows, tmp_path, passed={"ref_model": tiny_llama(len(tokenizer))}, **options).model_card()
    said = table(card, "Settings")
    assert (said["m_in"], said["m_out"]) == (["-20"], ["-5"])
    assert "rho" not in said
    assert "close to the reference (KL" in card
    assert "Boundaries are constants." in card
    assert "Steps made: 0 of 0." in card
    assert "None were logged." in card


def test_the_card_is_of_the_weights_that_are_saved(model, tokenizer, rows, tmp_path):
    """Where the best checkpoint is loaded at the end, figures of later steps are not the model's."""
    trainer = make(
        model,
        tokenizer,
        rows,
        tmp_path,
        passed=held_out(rows),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_nll_retain",
        greater_is_better=True,  # so that the first epoch is the best
    )
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.global_step) == (3, 6)
    log = trainer.state.log_history
    trainer.save_model(str(tmp_path / "model"))
    for folder, step in (("model", 3), ("checkpoint-3", 3), ("checkpoint-6", 6)):
        card = (tmp_path / folder / "README.md").read_text()
        assert f"Steps made: {step} of 6." in card, folder
        said = table(card, "Figures")
        assert_figures_are(said, 0, next(line for line in log if "loss_forget" in line and line["step"] == step))
        assert_figures_are(said, 1, next(line for line in log if "eval_auroc" in line and line["step"] == step), "eval_")


# ---- what leaves the machine ----------------------------------------------------------------------------------------


@pytest.fixture
def uploads(monkeypatch) -> list[dict[str, bytes]]:
    """What each upload would hold: path in the repository → content. Nothing is sent."""
    sent: list[dict[str, bytes]] = []

    def upload_folder(self, *, folder_path, allow_patterns=None, ignore_patterns=None, run_as_future=False, **options) -> Any:
        files = {path.relative_to(folder_path).as_posix(): path for path in Path(folder_path).rglob("*") if path.is_file()}
        chosen = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        sent.append({name: files[name].read_bytes() for name in chosen})
        done: Future[str] = Future()
        done.set_result("sent")
        return done if run_as_future else done.result()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: RepoUrl(f"https://huggingface.co/ann/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return sent


@BOTH
def test_what_is_pushed_is_the_model_and_its_card(base, tokenizer, rows, tmp_path, uploads, peft_config):
    run = tmp_path / "a-run"
    trainer = make(base, tokenizer, rows, run, copy.deepcopy(peft_config), save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    (run / "forget.jsonl").write_text("what must not be known")
    assert (run / "boundaries.safetensors").exists()
    assert trainer.push_to_hub(license="mit", language="en", tags="people") == "sent"

    (uploaded,) = uploads
    model_files = {"adapter_config.json", "adapter_model.safetensors"}
    if peft_config is None:
        model_files = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(uploaded) == model_files | {"README.md", "tokenizer.json", "tokenizer_config.json"}
    card = ModelCard(uploaded["README.md"].decode())
    assert (card.data.license, card.data.language, card.data.tags[-1]) == ("mit", "en", "people")
    assert "# a-run\n" in card.text
    assert 'name = "ann/a-run"' in card.text
    assert "beyond_boundary_forget" in card.text
    paths = [name for name, content in uploaded.items() if str(tmp_path).encode() in content]
    assert paths == (["adapter_config.json"] if peft_config else [])  # PEFT's, without which no adapter finds its base
    assert trainer.args.output_dir == str(run)


def test_a_hub_that_does_not_answer_is_one_line(model, tokenizer, rows, tmp_path, uploads, monkeypatch):
    """The model is not lost if it cannot be pushed; and if the hub is away at the start, that is found before training."""
    trainer = make(model, tokenizer, rows, tmp_path / "run", push_to_hub=True)

    def away(*arguments, **options):
        raise ConnectionError("away")

    monkeypatch.setattr(HfApi, "upload_folder", away)
    with pytest.raises(EUAError, match=r"cannot be pushed to the hub \(away\).* saved in .*hub/run, so `hf upload` can"):
        trainer.save_model(str(tmp_path / "out"))
    for folder in (tmp_path / "out", tmp_path / "run" / "hub" / "run"):
        assert (folder / "model.safetensors").is_file()
    monkeypatch.setattr(HfApi, "create_repo", away)
    with pytest.raises(EUAError, match=r"cannot be pushed to the hub \(away\).* set push_to_hub = False to train without"):
        make(model, tokenizer, rows, tmp_path / "other", push_to_hub=True)


def test_nothing_is_pushed_while_training(model, tokenizer, rows, tmp_path, uploads):
    args = make(model, tokenizer, rows, tmp_path, save_strategy="epoch").args
    args.set_push_to_hub("forgetful")  # whose default strategy is a push at every save
    trainer = EUATrainer(
        model, args, forget_dataset=rows["forget"][:6], retain_dataset=rows["retain"][:9], processing_class=tokenizer
    )
    trainer.train()
    assert (tmp_path / "checkpoint-6" / "README.md").exists()
    assert not uploads
    trainer.save_model(str(tmp_path / "model"))
    assert len(uploads) == 1
    assert not list(tmp_path.rglob("*.bin"))


def test_only_process_zero_writes(model, tokenizer, rows, tmp_path, monkeypatch):
    trainer = make(model, tokenizer, rows, tmp_path / "run")
    staged_by_process_zero = tmp_path / "model" / ".partial" / "config.json"
    staged_by_process_zero.parent.mkdir(parents=True)
    staged_by_process_zero.write_text("{}")
    monkeypatch.setattr(EUAConfig, "should_save", property(lambda self: False))
    monkeypatch.setattr(EUATrainer, "is_world_process_zero", lambda self: False)
    trainer.save_model(str(tmp_path / "model"))
    trainer.create_model_card()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [staged_by_process_zero]


def test_the_card_names_the_precision_that_was_computed_in(model, tokenizer, rows, tmp_path):
    """On a CPU, accelerate computes in float32 although fp16 is set."""
    card = make(model, tokenizer, rows, tmp_path, fp16=True).model_card()
    assert "Trained: all weights, in float32." in card
    card = make(model, tokenizer, rows, tmp_path, bf16=True).model_card()
    assert "Trained: all weights, in float32 (computing in bfloat16)." in card
