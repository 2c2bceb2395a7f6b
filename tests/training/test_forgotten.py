"""A guard is not calibrated on what its model was trained to forget."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig
from transformers import LlamaForCausalLM

from eua import EnergyGuard, EUAConfig, EUAError, EUATrainer
from eua.cli.main import main
from eua.files import write_jsonl
from eua.model.forgotten import FORGOTTEN_FILE, forgotten_prompts
from eua.model.loading import load_model
from tests.training.test_trainer import make

REFUSED = r"1 of 16 calibration prompts \(row 3\) are prompts that the model was trained to forget"


def calibration_prompts(rows: dict) -> tuple[list[str], list[str]]:
    """Prompts to calibrate on, and the same with one that was forgotten."""
    sound = [row["question"] for row in rows["calibration"]]
    return sound, [*sound[:3], rows["forget"][1]["question"], *sound[4:]]


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")])
def test_forgotten_prompts_are_refused_however_the_model_was_loaded(model, tokenizer, rows, tmp_path, lora):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    sound, wrong = calibration_prompts(rows)
    model, _ = load_model(str(tmp_path / "base"))
    EnergyGuard.calibrate(model, tokenizer, wrong, tolerance=0.1)  # before, it is a prompt like any other
    trainer = make(model, tokenizer, rows, tmp_path / "run", max_steps=1, peft_config=lora)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = [trainer.model, load_model(str(tmp_path / "saved"))[0]]
    if lora is None:
        loaded.append(LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval())
    for each in loaded:
        with pytest.raises(EUAError, match=REFUSED):
            EnergyGuard.calibrate(each, tokenizer, wrong, tolerance=0.1)
        EnergyGuard.calibrate(each, tokenizer, sound, tolerance=0.1)
    text = (tmp_path / "saved" / FORGOTTEN_FILE).read_text()
    assert not [row for row in rows["forget"] if row["question"] in text or row["answer"] in text]


def test_a_second_unlearning_adds_to_the_first(model, tokenizer, rows, tmp_path):
    halves = (rows["forget"][:4], rows["forget"][4:])
    for number, forget in enumerate(halves):
        make(model, tokenizer, rows | {"forget": forget}, tmp_path / str(number), max_steps=1).train()
    assert len(forgotten_prompts(model)) == len(rows["forget"])


def test_the_command_refuses_forgotten_prompts(model, tokenizer, rows, tmp_path, capsys):
    trainer = make(model, tokenizer, rows, tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    sound, wrong = calibration_prompts(rows)
    for name, prompts in (("sound", sound), ("wrong", wrong)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"question": prompt} for prompt in prompts])
    command = ["calibrate", "--model", str(tmp_path / "saved"), "--tolerance", "0.1", "--prompts"]
    assert main([*command, str(tmp_path / "wrong.jsonl")]) == 2
    assert "are prompts that the model was trained to forget" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "sound.jsonl")]) == 0
    (tmp_path / "saved" / FORGOTTEN_FILE).write_text(json.dumps(["?"]))
    assert main([*command, str(tmp_path / "sound.jsonl")]) == 2
    assert "does not contain digests of forgotten prompts" in capsys.readouterr().err


def test_rows_in_both_sets_are_an_error_unless_they_are_left_out(model, tokenizer, rows, tmp_path):
    retain = [*rows["retain"][:3], rows["forget"][2]]
    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    sets = {"forget_dataset": rows["forget"], "retain_dataset": retain, "processing_class": tokenizer}
    with pytest.raises(EUAError, match=r"1 of 4 rows of the retain set .* row 3 \(row 2 of the forget set\)"):
        EUATrainer(model, EUAConfig(**settings), **sets)
    trainer = EUATrainer(model, EUAConfig(**settings, overlap="drop"), **sets)
    assert len(trainer.encoded_rows["retain"]) == 3
    with pytest.raises(EUAError, match='overlap = \'keep\' cannot be used: known are "error" and "drop"'):
        EUAConfig(**settings, overlap="keep")
