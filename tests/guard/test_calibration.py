"""What counts in a calibration, what it costs, and under which conditions the guard that it gives may be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eua import EnergyGuard, EUAConfig, EUAError, EUATrainer
from eua.data.rows import encode_prompts
from eua.evaluation import evaluate
from eua.guard.guard import GUARD_FILE
from eua.guard.scores import prompt_scores
from eua.model import fingerprints
from eua.model.asking import answer
from tests.conftest import batch_of, tiny_llama

# ---- what counts ------------------------------------------------------------------------------------------------------


def test_copies_of_a_prompt_do_not_calibrate(model, tokenizer, questions, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("eua.guard.guard.prompt_scores", None)
        for prompts in (["Where was Ann born?"] * 25, questions * 4):
            with pytest.raises(EUAError, match=f"{len(set(prompts))} calibration prompts are too few"):
                EnergyGuard.calibrate(model, tokenizer, prompts)
        with pytest.raises(EUAError, match="1 groups of calibration prompts are too few"):
            EnergyGuard.calibrate(model, tokenizer, ["Where was Ann born?"] * 25, groups=range(25))


def test_copies_count_once_and_a_warning_says_so(model, tokenizer, questions, caplog):
    plain = EnergyGuard.calibrate(model, tokenizer, questions, tolerance=0.2)
    assert not caplog.records
    copied = EnergyGuard.calibrate(model, tokenizer, [questions[0]] * 30 + questions, tolerance=0.2)
    assert copied == plain
    assert copied.calibration_prompts == 6
    assert "Only 6 of the 36 calibration prompts differ in their tokens" in caplog.text


def test_groups_that_share_a_prompt_are_one(model, tokenizer, questions, caplog):
    prompts, people = [*questions, questions[0]], ["Ann", "Bob", "Cleo", "Dora", "Eve", "Fay", "Bob"]
    guard = EnergyGuard.calibrate(model, tokenizer, prompts, groups=people, tolerance=0.2)
    assert guard.calibration_groups == 5
    assert "Some of the 6 groups of calibration prompts share a prompt" in caplog.text
    assert "5 groups remain" in caplog.text


# ---- what it costs ----------------------------------------------------------------------------------------------------


def test_the_head_is_checked_once(model, tokenizer, questions, forwards):
    guard = EnergyGuard.calibrate(model, tokenizer, questions, tolerance=0.2)
    assert forwards == [2, 1, 6]  # two for the head
    guard.score(model, tokenizer, questions[0])
    assert forwards == [2, 1, 6, 1]
    prompt_scores(model, encode_prompts(questions, tokenizer))
    assert forwards == [2, 1, 6, 1, 6]
    model.config.final_logit_softcapping = 5.0  # which Llama does not apply
    with pytest.raises(EUAError, match="does more between hidden states and logits"):
        guard.score(model, tokenizer, questions)


def test_one_of_several_processes_checks_the_head_every_time(model, tokenizer, questions, forwards, monkeypatch):
    """A process that remembered another head than the others would leave them waiting for it."""
    monkeypatch.setattr("eua.model.forward.has_other_processes", lambda: True)
    for _ in range(2):
        prompt_scores(model, encode_prompts(questions, tokenizer))
    assert forwards == [2, 1, 6] * 2


# ---- where it may be used ---------------------------------------------------------------------------------------------


def test_a_guard_does_not_act_under_autocast(known, tokenizer, questions, guard):
    with guard.attach(known), torch.autocast("cpu", torch.bfloat16):
        for use in (
            lambda: answer(known, tokenizer, questions),
            lambda: guard.score(known, tokenizer, questions),
            lambda: EnergyGuard.calibrate(known, tokenizer, questions, tolerance=0.2),
        ):
            with pytest.raises(EUAError, match=r"under torch\.autocast, .* leave the autocast region"):
                use()


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_models_are_refused_in_words(model, tokenizer, rows, questions, guard, offload, tmp_path):
    trainable = tiny_llama(len(tokenizer))
    for each in (model, trainable):
        offload(each, **({"offload_dir": str(tmp_path)} if offload is disk_offload else {}))
    config = EUAConfig(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True)
    for use in (
        lambda: EnergyGuard.calibrate(model, tokenizer, questions, tolerance=0.2),
        lambda: guard.attach(model),
        lambda: replace(guard, model_fingerprint=None).attach(model),
        lambda: guard.score(model, tokenizer, questions),
        lambda: evaluate(model, tokenizer, {"forget": rows["forget"]}),
        lambda: EUATrainer(
            trainable, config, forget_dataset=rows["forget"], retain_dataset=rows["retain"], processing_class=tokenizer
        ).train(),
    ):
        with pytest.raises(EUAError, match=r"weights of LlamaForCausalLM are offloaded or not loaded .* load the model"):
            use()


def test_part_of_a_model_on_a_disk_is_enough_to_refuse_it(model, tokenizer, questions, tmp_path):
    disk_offload(model.model.layers[1], str(tmp_path))
    with pytest.raises(EUAError, match=r"the first is model\.layers\.1\."):
        EnergyGuard.calibrate(model, tokenizer, questions, tolerance=0.2)


def test_energies_that_are_not_numbers_answer_nothing(known, tokenizer, questions, guard):
    """A NaN in the head reaches the energy alone, not the hidden states."""
    with torch.no_grad():
        known.lm_head.weight[7] = torch.nan
    unchecked = replace(guard, model_fingerprint=None)
    batch = batch_of(tokenizer, questions)
    watching = (
        unchecked,
        replace(unchecked, first_tokens=2),
        replace(unchecked, threshold=1e9, probe_window=1, probe_threshold=1e9),
    )
    for each in watching:
        with each.attach(known), pytest.raises(EUAError, match="NaN or infinity in the energies"):
            known.generate(**batch, max_new_tokens=4)
    with unchecked.attach(known), pytest.raises(EUAError, match="NaN or infinity in the energies"):
        known.generate(**batch_of(tokenizer, questions[:1]), max_new_tokens=4, prompt_lookup_num_tokens=2)
    ids = encode_prompts(questions, tokenizer)
    for first_tokens in (0, 2):
        with pytest.raises(EUAError, match="NaN or infinity in the energies"):
            prompt_scores(known, ids, first_tokens=first_tokens, check=False)
    with pytest.raises(EUAError):
        EnergyGuard.calibrate(known, tokenizer, questions, tolerance=0.2)


def test_a_score_that_is_not_a_number_is_refused(guard):
    scores = torch.tensor([guard.threshold, guard.threshold + 1, torch.nan, torch.inf, -torch.inf])
    assert guard.refuses(scores).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("name", ["output_logits", "output_hidden_states"])
def test_outputs_that_would_show_what_a_refused_row_was_to_say_raise(known, tokenizer, questions, guard, name):
    batch = batch_of(tokenizer, questions)
    text = f"{name} would reveal how a refused row began without the guard: leave it out"
    with guard.attach(known), pytest.raises(EUAError, match=text):
        known.generate(**batch, max_new_tokens=2, return_dict_in_generate=True, **{name: True})


def test_no_field_of_the_output_shows_the_answer_of_a_refused_row(known, tokenizer, questions, guard):
    """What is returned of a refused row does not depend on what the model would have said."""
    batch = batch_of(tokenizer, questions)
    width = batch["input_ids"].shape[1]
    said = known.generate(**batch, max_new_tokens=1, do_sample=False)[:, width]
    options = {"output_scores": True, "output_attentions": True, "return_dict_in_generate": True, "do_sample": False}
    known.set_attn_implementation("eager")
    with guard.attach(known) as handle:
        output = known.generate(**batch, max_new_tokens=4, **options)
    refused = handle.refused
    assert refused.sum() == 3
    assert set(output.keys()) == {"sequences", "scores", "attentions", "past_key_values"}
    for step, scores in enumerate(output.scores):
        forced = torch.full_like(scores[refused], -torch.inf)
        forced[:, guard.refusal_ids[step]] = 0.0
        assert torch.equal(scores[refused], forced)
    assert torch.equal(output.sequences[refused, width:], torch.tensor(guard.refusal_ids[:4]).expand(3, -1))
    assert not (said[refused] == guard.refusal_ids[0]).all()


# ---- its file ---------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def saved(tokenizer, world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    questions = [fact.question for fact in world.test[:6]]
    calibrated = EnergyGuard.calibrate(tiny_llama(len(tokenizer)), tokenizer, questions, tolerance=0.2, probe_window=1)
    assert calibrated.turns is not None
    calibrated.save_pretrained(folder)
    return folder / GUARD_FILE


@given(data=st.data())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_is_a_guard_or_an_error_says_why_not(saved, data, tmp_path):
    content = json.loads(saved.read_text())
    place = data.draw(st.sampled_from(["turns", "field", "whole"]))
    if place == "whole":
        content = data.draw(JSON)
    else:
        of = content["turns"] if place == "turns" else content
        of[data.draw(st.sampled_from([*of, "unknown"]))] = data.draw(JSON)
    (tmp_path / GUARD_FILE).write_text(json.dumps(content))
    try:
        guard = EnergyGuard.from_pretrained(tmp_path)
    except EUAError:
        return
    assert abs(guard.threshold) < 1e30
    assert guard.probe_threshold is None or abs(guard.probe_threshold) < 1e30
    assert 0 < guard.temperature < 1e30
    assert 0 < guard.tolerance < 1
    assert guard.calibration_prompts >= 1
    assert all(type(token) is int and token >= 0 for token in (*guard.refusal_ids, *guard.stop_ids))
    assert all(
        isinstance(value, str) and value for value in (guard.model_fingerprint, guard.tokenizer_fingerprint, guard.dtype)
    )
    assert guard.promise
    guard.refuses(torch.zeros(2))
    if guard.turns is not None:
        guard.turns.scored_prompts([1, 2, 3])


@pytest.mark.parametrize("text", ["[" * 100_000, "nonsense", "\xff", "{}", "[]"])
def test_files_that_are_no_guards_are_refused(tmp_path, text):
    (tmp_path / GUARD_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(EUAError, match="is not a guard"):
        EnergyGuard.from_pretrained(tmp_path)


def test_a_refusal_of_another_vocabulary_is_found_when_the_guard_is_attached(known, guard):
    with pytest.raises(EUAError, match="The refusal has token 100000, but the model has .* tokens"):
        replace(guard, refusal_ids=(100_000, 1)).attach(known)


def test_a_model_that_accelerate_casts_is_not_calibrated(model, tokenizer, questions):
    """As a training of another library leaves it: energies would be in bfloat16, and the file would say float32."""
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    try:
        with pytest.raises(EUAError, match="accelerate has wrapped its forward.*save the model and load it"):
            EnergyGuard.calibrate(prepared, tokenizer, questions, tolerance=0.2)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_guard_reads_the_weights_once_when_it_is_attached(model, tokenizer, questions, monkeypatch):
    guard = EnergyGuard.calibrate(model, tokenizer, questions, tolerance=0.2)
    read = []
    original = fingerprints.model_fingerprint
    monkeypatch.setattr("eua.guard.guard.model_fingerprint", lambda model: read.append(1) or original(model))
    with guard.attach(model, tokenizer):
        assert read == [1]
