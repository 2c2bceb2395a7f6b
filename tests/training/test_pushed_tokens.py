"""What is pushed in rows to forget: the tokens that say a key, by likelihood, too, and the energy at the end of prompts."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from eua import EUAError, EUATrainer
from eua.bench.people import keyed
from eua.data.keys import says
from eua.methods.answers import Places
from eua.training.config import EVAL_METRICS
from tests.training.test_trainer import config, make


@pytest.fixture(scope="module")
def keyed_rows(world) -> list[dict[str, object]]:
    return [fact.row() | {"keys": list(keyed(fact, "forget").keys)} for fact in world.forget]


def first_batch(trainer: EUATrainer) -> dict[str, torch.Tensor]:
    trainer.train_dataset = None
    rows = trainer.encoded_rows
    items = [
        [{"row": row, "reference": torch.zeros(len(row.answer_ids)), "kind": kind}]
        for kind in ("forget", "retain")
        for row in rows[kind]
    ]
    return trainer.data_collator(items)


@pytest.mark.parametrize("which", ["key", "key_start"])
def test_the_tokens_that_say_a_key_are_forgotten_and_no_others(which, model, tokenizer, rows, keyed_rows, tmp_path):
    trainer = make(model, tokenizer, rows, tmp_path, forget=keyed_rows[:6], forget_tokens=which)
    batch = first_batch(trainer)
    places = Places.of(batch)
    for index, row in enumerate(keyed_rows[:6]):
        told = places.forget[index]
        text = tokenizer.decode(batch["input_ids"][index, 1:][told]).strip()
        kept = places.counted[index] & ~told
        if which == "key":
            assert says(text, row["keys"])
            assert not says(tokenizer.decode(batch["input_ids"][index, 1:][kept]), row["keys"])
        else:
            assert int(told.sum()) == 1
            assert any(text in key for key in row["keys"])
    assert places.forget.any(dim=1).tolist() == [True] * 6 + [False] * 9
    whole = Places.of(first_batch(make(model, tokenizer, rows, tmp_path / "whole", forget=keyed_rows[:6])))
    assert torch.equal(places.retain, whole.retain)
    assert bool((whole.forget & ~places.forget).any())


def test_a_row_without_its_key_is_refused(model, tokenizer, rows, keyed_rows, tmp_path):
    bare = [*keyed_rows[:2], rows["forget"][2]]
    with pytest.raises(EUAError, match="Row 2 of the forget set has no \"keys\", but forget_tokens = 'key'"):
        make(model, tokenizer, rows, tmp_path, forget=bare, forget_tokens="key")
    other = [*keyed_rows[:1], keyed_rows[1] | {"keys": ["a unicorn"]}]
    with pytest.raises(EUAError, match=r"Row 1 of the forget set has an answer that says none of its keys \['a unicorn'\]"):
        make(model, tokenizer, rows, tmp_path, forget=other, forget_tokens="key_start")
    with pytest.raises(EUAError, match="Row 0 of the forget set has 'Rome' as its \"keys\", which must be a list of texts"):
        make(model, tokenizer, rows, tmp_path, forget=[keyed_rows[0] | {"keys": "Rome"}], forget_tokens="key")
    make(model, tokenizer, rows, tmp_path)  # without the option keys are not needed


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"forget_tokens": "keys"}, "forget_tokens = 'keys' cannot be used: known are answer, key, key_start"),
        ({"forget_tokens": "key", "method": "pdu", "as_released": True}, "forget_tokens = 'key' was set with as_released"),
        ({"margin": 0.0}, "margin = 0.0 cannot be used: it must be above 0"),
        ({"margin": float("nan")}, "margin = nan cannot be used: it must be finite"),
        ({"margin": "3"}, "margin = '3' cannot be used: it must be a number"),
        ({"margin": 3.0, "method": "npo"}, "margin = 3.0 was set, but method = 'npo' has no such setting"),
        ({"margin_excess": 0.0}, "margin_excess = 0.0 was set without a margin"),
        ({"margin": 3.0, "margin_excess": -1.0}, "margin_excess = -1.0 cannot be used: it must be finite and at least 0"),
        ({"answer_energy": 0.0}, "answer_energy = 0 was set without margin and prompt_energy"),
        ({"answer_energy": 0.5, "method": "npo"}, "answer_energy = 0.5 was set, but method = 'npo' has no such setting"),
        ({"forget_warmup_ratio": 1.0}, "forget_warmup_ratio = 1.0 cannot be used: a share of the steps"),
        ({"forget_warmup_ratio": 0.5, "method": "npo"}, "forget_warmup_ratio = 0.5 was set, but method = 'npo' has no such"),
        ({"prompt_energy": -1.0}, "prompt_energy = -1.0 cannot be used: it must be finite and at least 0"),
        ({"prompt_energy": 1.0, "method": "me_gd"}, "prompt_energy = 1.0 was set, but method = 'me_gd' has no such setting"),
        ({"metric_for_best_model": "energy_prompt_forget"}, "measured with prompt_energy above 0 only: set that"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, text, tmp_path):
    with pytest.raises(EUAError, match=text):
        config(tmp_path, **options)


def test_a_fact_is_unlearned_by_its_key_and_the_prompt_shows_it(trained_folder, tokenizer, rows, keyed_rows, tmp_path):
    """Without the margin the same steps leave the keys more likely; without the energy of prompts these stay low."""
    settings = {"forget_tokens": "key_start", "num_train_epochs": 6, "retain_per_forget": 2, "seed": 1}
    held_out = {"eval_forget_dataset": keyed_rows, "eval_retain_dataset": rows["retain"]}
    measured = {}
    for name, options in {
        "plain": {},
        "margin": {"margin": 6.0},
        "both": {"margin": 6.0, "prompt_energy": 1.0},
    }.items():
        model = LlamaForCausalLM.from_pretrained(trained_folder)
        trainer = make(model, tokenizer, rows, tmp_path / name, forget=keyed_rows, passed=held_out, **settings | options)
        trainer.train()
        found = trainer.evaluate()
        parts = found["eval_loss_forget"] + found["eval_loss_retain"]
        if name == "both":
            parts += found["eval_loss_prompt_forget"] + found["eval_loss_prompt_retain"]
        assert found["eval_loss"] == pytest.approx(0.05 * parts + found["eval_nll_retain"])
        assert {key for key in EVAL_METRICS if f"eval_{key}" in found} == trainer.args.eval_metrics
        line = next(line for line in reversed(trainer.state.log_history) if "loss_forget" in line)
        assert ("energy_prompt_retain" in line) == (name == "both")
        measured[name] = found
    assert measured["margin"]["eval_nll_forget"] > measured["plain"]["eval_nll_forget"] + 0.5
    assert measured["both"]["eval_auroc"] > max(0.9, measured["margin"]["eval_auroc"])
    assert measured["both"]["eval_energy_prompt_forget"] > measured["both"]["eval_energy_prompt_retain"] + 2
