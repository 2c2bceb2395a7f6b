"""A guard is not calibrated on what its model was trained to forget."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from peft import LoraConfig
from transformers import LlamaForCausalLM, TrainerCallback

from eua import EnergyGuard, EUAConfig, EUAError, EUATrainer
from eua.cli.main import main
from eua.data.dates import at_date
from eua.data.rows import encode_prompts
from eua.files import write_jsonl
from eua.model.forgotten import FORGOTTEN_FILE, forgotten_prompts, prompt_digest
from eua.model.loading import load_model
from tests.data.test_dates import CHAT, DATED, MARKED, clock, with_template  # noqa: F401
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


def test_prompts_are_known_on_every_day(model, tokenizer, rows, tmp_path, clock):  # noqa: F811
    """The template writes the date."""
    dated = with_template(tokenizer, DATED + CHAT)
    sound, wrong = calibration_prompts(rows)
    trainer = make(model, dated, rows, tmp_path, max_steps=1)
    trainer.train()
    for moment in (datetime(2026, 3, 1), datetime(2026, 12, 31)):
        clock.moment = moment
        for each in (dated, at_date(dated, datetime(2025, 1, 2))):
            with pytest.raises(EUAError, match=REFUSED):
                EnergyGuard.calibrate(model, each, wrong, tolerance=0.1)
            EnergyGuard.calibrate(model, each, sound, tolerance=0.1)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize("template", [CHAT, DATED + CHAT, MARKED], ids=["appended", "dated", "marked"])
@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_the_prompt_of_every_answer_to_forget_is_known(template, form, model, tokenizer, rows, tmp_path, clock):  # noqa: F811
    chatty = with_template(tokenizer, template)
    chat = turns("Hi", "Hello", "Where was Ann born?", "In Ulm.", "When?", "In May.")
    row = {"messages": chat} if form == "messages" else {"prompt": chat[:3], "completion": chat[3:]}
    for answers, ends in (("last", [5] if form == "messages" else [3]), ("all", [1, 3, 5])):
        trainer = make(model, chatty, rows, tmp_path / answers, forget=[row], assistant_turns=answers)
        asked = encode_prompts([{"messages": chat[:end]} for end in ends], at_date(chatty, datetime(2000, 1, 1)))
        assert trainer.prompts_to_forget == {prompt_digest(ids) for ids in asked}


def test_the_prompt_of_an_answer_that_does_not_count_is_not_known(model, tokenizer, rows, tmp_path):
    """The template marks the last answer alone."""
    chatty = with_template(tokenizer, MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last"))
    chat = turns("Hi", "Hello", "Where was Ann born?", "In Ulm.")
    trainer = make(model, chatty, rows, tmp_path, forget=[{"messages": chat}], assistant_turns="all")
    assert trainer.prompts_to_forget == {prompt_digest(encode_prompts([{"messages": chat}], chatty)[0])}


def test_a_model_without_a_step_has_forgotten_nothing(model, tokenizer, rows, tmp_path):
    trainer = make(model, tokenizer, rows, tmp_path / "run", max_steps=1)
    trainer.save_model(str(tmp_path / "untrained"))
    assert not forgotten_prompts(load_model(str(tmp_path / "untrained"))[0])
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    make(model, tokenizer, rows | {"forget": rows["forget"][6:]}, tmp_path / "next").save_model(str(tmp_path / "again"))
    for name in ("trained", "again"):
        assert forgotten_prompts(load_model(str(tmp_path / name))[0]) == trainer.prompts_to_forget


def test_the_prompts_of_a_run_that_failed_after_a_step_are_known(model, tokenizer, rows, tmp_path):
    trainer = make(model, tokenizer, rows, tmp_path, passed={"callbacks": [FailAfter(2)]})
    with pytest.raises(RuntimeError, match="after step 2"):
        trainer.train()
    assert forgotten_prompts(model) == trainer.prompts_to_forget


class FailAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError(f"after step {self.step}")


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
