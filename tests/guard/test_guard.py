"""The guard inside plain ``generate``."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline
from transformers.generation import BaseStreamer

from eua import EnergyGuard, EUAError
from eua.data.rows import encode_prompts, format_prompt
from eua.guard.guard import DEFAULT_REFUSAL, GUARD_FILE
from eua.guard.scores import prompt_scores
from eua.model.asking import answer
from eua.model.fingerprints import model_fingerprint
from tests.conftest import batch_of, tiny_llama


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["greedy", "sampling", "beams", "several-beams", "several", "penalties", "no-cache"],
)
def test_flagged_rows_refuse_and_the_others_are_untouched(known, tokenizer, questions, guard, options):
    batch = batch_of(tokenizer, questions)
    width = batch["input_ids"].shape[1]
    torch.manual_seed(0)
    plain = known.generate(**batch, max_new_tokens=40, **options)
    torch.manual_seed(0)
    with guard.attach(known) as attached:
        guarded = known.generate(**batch, max_new_tokens=40, **options)

    copies = options.get("num_return_sequences", 1)
    refused = attached.refused
    expected = guard.score(known, tokenizer, questions) > guard.threshold
    assert torch.equal(refused, expected.repeat_interleave(copies))
    assert expected.sum() == 3
    for row, is_refused in enumerate(refused):
        old, new = (tokenizer.decode(out[row, width:], skip_special_tokens=True) for out in (plain, guarded))
        if is_refused:
            assert new.strip() == DEFAULT_REFUSAL
        else:
            shared = min(plain.shape[1], guarded.shape[1])
            assert torch.equal(plain[row, :shared], guarded[row, :shared])
            assert new == old
            assert DEFAULT_REFUSAL not in new


def test_detached_guard_leaves_no_trace(known, tokenizer, questions, guard):
    plain = answer(known, tokenizer, questions)
    handle = guard.attach(known)
    assert answer(known, tokenizer, questions) != plain
    handle.detach()
    handle.detach()
    assert answer(known, tokenizer, questions) == plain
    assert not {"generate", "init_continuous_batching"} & known.__dict__.keys()
    assert not known.lm_head._forward_pre_hooks
    first, second = guard.attach(known), guard.attach(known)
    with pytest.raises(EUAError, match="detach the later guard"):
        first.detach()
    second.detach()
    first.detach()
    assert "generate" not in known.__dict__
    with pytest.raises(RuntimeError, match="boom"), guard.attach(known):
        raise RuntimeError("boom")
    assert answer(known, tokenizer, questions) == plain


def test_guard_acts_in_pipelines_and_with_the_users_own_processors(known, tokenizer, questions, guard):
    seen = []

    def watch(input_ids, scores):
        seen.append(scores.shape)
        return scores

    with guard.attach(known) as attached:
        generate = pipeline("text-generation", model=known, tokenizer=tokenizer)
        texts = [
            generate(format_prompt(tokenizer, question), max_new_tokens=40, do_sample=False, return_full_text=False)
            for question in questions
        ]
        known.generate(**batch_of(tokenizer, questions), max_new_tokens=3, logits_processor=[watch])
        refused = attached.refused.tolist()
        known.generate(batch_of(tokenizer, questions[:1])["input_ids"], None, [watch], max_new_tokens=2, min_new_tokens=2)
    assert len(seen) == 5
    found = [text[0]["generated_text"].strip() == DEFAULT_REFUSAL for text in texts]
    assert found == refused


def test_guard_uses_its_own_temperature(known, tokenizer, questions, guard):
    tempered = replace(guard, temperature=3.0)
    scores = tempered.score(known, tokenizer, questions)
    assert not torch.allclose(scores, guard.score(known, tokenizer, questions), atol=0.1)
    with tempered.attach(known) as attached:
        known.generate(**batch_of(tokenizer, questions), max_new_tokens=1)
    torch.testing.assert_close(attached.scores, scores, rtol=1e-4, atol=1e-4)


def test_scores_are_energies_at_the_last_prompt_token(model, tokenizer, rows):
    prompts = encode_prompts(rows["test"][:5], tokenizer)
    with torch.no_grad():
        expected = [-torch.logsumexp(model(torch.tensor([ids])).logits[0, -1] / 2, -1) * 2 for ids in prompts]
    torch.testing.assert_close(prompt_scores(model, prompts, temperature=2.0, batch_size=2), torch.stack(expected))


def test_guard_survives_its_folder(guard, tmp_path, known, tokenizer):
    guard.save_pretrained(tmp_path)
    assert EnergyGuard.from_pretrained(tmp_path) == guard
    assert json.loads((tmp_path / GUARD_FILE).read_text())["promise"] == guard.promise
    assert [path.name for path in tmp_path.iterdir()] == [GUARD_FILE]
    renamed = guard.with_refusal("No.", tokenizer)
    assert tokenizer.decode(renamed.refusal_ids) == " No.<eos>"
    (tmp_path / GUARD_FILE).write_text('{"threshold": 1}')
    with pytest.raises(EUAError, match="is not a guard"):
        EnergyGuard.from_pretrained(tmp_path)
    with pytest.raises(EUAError, match="contains no energy_guard.json"):
        EnergyGuard.from_pretrained(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("threshold", float("nan"), "threshold is nan, but must be a finite number"),
        ("threshold", float("inf"), "threshold is inf, but must be a finite number"),
        ("threshold", None, "threshold is None, but must be a finite number"),
        ("model_fingerprint", None, "has no model_fingerprint, so it would go with any model: calibrate"),
        ("dtype", None, "has no dtype"),
        ("temperature", 0, "temperature = 0, but energies are divided by it"),
        ("first_tokens", 1.5, "first_tokens = 1.5 cannot be a number of tokens"),
        ("probe_window", 3, "but a probe needs both"),
        ("refusal_ids", [], r"refusal_ids is \(\), but must be one or more token ids"),
        ("refusal_ids", "abc", "but must be one or more token ids"),
        ("turns", "no", "is not a guard"),
    ],
)
def test_a_guard_file_that_would_not_guard_is_refused(guard, tmp_path, field, value, text):
    guard.save_pretrained(tmp_path)
    content = json.loads((tmp_path / GUARD_FILE).read_text())
    (tmp_path / GUARD_FILE).write_text(json.dumps(content | {field: value}))
    with pytest.raises(EUAError, match=text):
        EnergyGuard.from_pretrained(tmp_path)


def test_padding_within_an_answer_does_not_cut_it(known, tokenizer, questions, patient):
    """A token that ends no row may be both padding and part of an answer. The refusal is short, so the answer is longer."""
    scores = patient.score(known, tokenizer, questions)
    batch = batch_of(tokenizer, [questions[int(scores.argmax())], questions[int(scores.argmin())]])
    width = batch["input_ids"].shape[1]
    said = known.generate(**batch, max_new_tokens=40, do_sample=False)[1, width:].tolist()
    said = said[: said.index(tokenizer.eos_token_id) + 1]
    with patient.with_refusal("No.", tokenizer).attach(known) as handle:
        for pad in set(said[:-1]):
            guarded = known.generate(**batch, max_new_tokens=40, do_sample=False, pad_token_id=pad)
            assert handle.refused.tolist() == [True, False]
            assert guarded[1, width:].tolist() == said


@pytest.mark.parametrize("as_given", [lambda ids: ids, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
def test_ends_of_sequence_may_be_several(known, tokenizer, questions, guard, as_given):
    batch = batch_of(tokenizer, questions)
    ends = as_given([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(".")])
    plain = known.generate(**batch, max_new_tokens=20, eos_token_id=ends, do_sample=False)
    with guard.attach(known) as handle:
        guarded = known.generate(**batch, max_new_tokens=20, eos_token_id=ends, do_sample=False)
    assert handle.refused.sum() == 3
    kept = ~handle.refused
    shared = min(plain.shape[1], guarded.shape[1])
    assert torch.equal(plain[kept, :shared], guarded[kept, :shared])


def test_without_a_limit_generate_takes_its_own(known, tokenizer, questions, patient):
    with patient.attach(known) as handle:
        output = known.generate(**batch_of(tokenizer, questions))
    assert output.shape[1] <= batch_of(tokenizer, questions)["input_ids"].shape[1] + 20
    assert handle.refused is not None


def test_calibration_refuses_what_it_cannot_promise(known, tokenizer, questions):
    with pytest.raises(EUAError, match="6 calibration prompts are too few .* add 13 more"):
        EnergyGuard.calibrate(known, tokenizer, questions)
    for options, text in {
        ("first_tokens", -1): "first_tokens = -1 cannot be a number of tokens",
        ("temperature", 0.0): "temperature = 0.0, but energies are divided by it",
    }.items():
        with pytest.raises(EUAError, match=text):
            EnergyGuard.calibrate(known, tokenizer, questions, tolerance=0.2, **dict([options]))
    with pytest.raises(EUAError, match="There are no calibration prompts"):
        EnergyGuard.calibrate(known, tokenizer, [])
    with pytest.raises(EUAError, match="has no tokens"):
        EnergyGuard.calibrate(known, tokenizer, questions, tolerance=0.2, refusal_text=" ")
    with pytest.raises(EUAError, match="has no output head"):
        EnergyGuard.calibrate(known.model, tokenizer, questions, tolerance=0.2)
    with torch.no_grad():
        known.model.norm.weight[0] = torch.nan
    with pytest.raises(EUAError, match="NaN or infinity"):
        EnergyGuard.calibrate(known, tokenizer, questions, tolerance=0.2)


def test_what_cannot_be_guarded_raises(known, tokenizer, questions, guard):
    batch = batch_of(tokenizer, questions)
    with guard.attach(known):
        for name, options in {
            "contrastive_search": {"penalty_alpha": 0.6, "top_k": 4},
            "dola_generation": {"dola_layers": "high"},
            "group_beam_search": {"num_beams": 4, "num_beam_groups": 2},
        }.items():
            with pytest.raises(EUAError, match=f"does not cover generation by {name}"):
                known.generate(**batch, **options)
        with pytest.raises(EUAError, match="Continuous batching .* bypasses generate"):
            known.generate_batch([[5, 6, 7]])
        with pytest.raises(EUAError, match="does not cover generation by custom_generate"):
            known.generate(**batch, custom_generate=lambda **kwargs: None)
        with pytest.raises(EUAError, match="guidance_scale runs prompts that the guard does not score"):
            known.generate(**batch, guidance_scale=1.5)
        known.train()
        with pytest.raises(EUAError, match=r"call model.eval\(\) first"):
            known.generate(**batch)
        known.eval()
        tokenizer_side, tokenizer.padding_side = tokenizer.padding_side, "right"
        try:
            with pytest.raises(EUAError, match="padded on the right"):
                known.generate(**batch_of(tokenizer, questions))
            with pytest.raises(EUAError, match="padded on the right"):
                known.generate(batch_of(tokenizer, questions)["input_ids"])
        finally:
            tokenizer.padding_side = tokenizer_side
        with pytest.raises(EUAError, match="With inputs_embeds the guard cannot find"):
            known.generate(inputs_embeds=known.get_input_embeddings()(batch["input_ids"]))
        with torch.no_grad():
            known.model.norm.weight[0] = torch.nan
    with replace(guard, model_fingerprint=None).attach(known), pytest.raises(EUAError, match="NaN or infinity in the energies"):
        known.generate(**batch)
    with pytest.raises(EUAError, match="has no output head"):
        guard.attach(known.model)


# ---- what the promise covers ----------------------------------------------------------------------------------------


def test_a_guard_is_for_the_weights_it_was_calibrated_for(known, tokenizer, questions, guard, tmp_path):
    known.save_pretrained(tmp_path)
    guard.save_pretrained(tmp_path)
    again = EnergyGuard.from_pretrained(tmp_path)
    assert again == guard
    again.check(LlamaForCausalLM.from_pretrained(tmp_path), tokenizer)
    again.check(known.train(), tokenizer)

    text = "calibrated for other weights than this model's .* calibrate it again"
    known.eval()
    with torch.no_grad():
        known.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    cast = "calibrated in float32, but the model is in bfloat16, .* load the model with dtype='float32', or calibrate"
    for other, why in ((known, text), (LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), cast)):
        with pytest.raises(EUAError, match=why):
            guard.attach(other)
        with pytest.raises(EUAError, match=why):
            guard.score(other, tokenizer, questions)
    assert "generate" not in vars(known)


def test_a_guard_is_for_the_template_it_was_calibrated_for(known, tokenizer, questions, guard):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(EUAError, match="calibrated with another tokenizer or chat template"):
        guard.score(known, other, questions)
    assert guard.score(known, copy.deepcopy(tokenizer), questions).shape == (6,)


def test_an_adapter_is_the_same_however_it_was_loaded(tokenizer, tmp_path):
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert model_fingerprint(adapted) == model_fingerprint(loaded) == model_fingerprint(direct)
    assert model_fingerprint(adapted.merge_and_unload()) != model_fingerprint(loaded)


@pytest.mark.parametrize(
    ("settings", "text"),
    [({}, "6 calibration prompts are too few"), ({"tolerance": 0.2, "groups": ["Ann"] * 6}, "1 groups of calibration prompts")],
)
def test_too_few_prompts_are_found_before_any_is_scored(settings, text, known, tokenizer, questions, monkeypatch):
    monkeypatch.setattr("eua.guard.guard.prompt_scores", None)
    with pytest.raises(EUAError, match=text):
        EnergyGuard.calibrate(known, tokenizer, questions, **settings)


def test_prompts_that_were_trained_on_calibrate_nothing(known, tokenizer, rows):
    with pytest.raises(EUAError, match=r"2 of 18 calibration prompts \(the first is prompt 0\) were trained on"):
        EnergyGuard.calibrate(known, tokenizer, [*rows["retain"][:2], *rows["test"]], seen=rows["retain"])
    guard = EnergyGuard.calibrate(known, tokenizer, rows["test"], seen=rows["retain"], tolerance=0.2, confidence=0.9)
    assert guard.confidence == 0.9
    assert guard.promise.startswith("With a confidence of 0.9 over the calibration prompts: The probability that")


# ---- scores that include the first generated tokens -----------------------------------------------------------------


def by_hand(model: LlamaForCausalLM, tokenizer, question: str, first_tokens: int) -> float:
    """The mean energy over the prompt's last token and the next ones up to an end, from the logits of one row at a time."""
    ids = encode_prompts([question], tokenizer)[0]
    energies: list[float] = []
    for _ in range(first_tokens + 1):
        with torch.no_grad():
            z = model(torch.tensor([ids])).logits[0, -1]
        energies.append(float(-z.logsumexp(dim=0)))
        ids = [*ids, int(z.argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return sum(energies) / len(energies)


@pytest.mark.parametrize("first_tokens", [1, 3, 30])
def test_scores_of_the_first_tokens_are_those_of_the_logits(known, tokenizer, questions, first_tokens):
    """All answers end before 30 tokens."""
    ids = encode_prompts(questions, tokenizer)
    expected = torch.tensor([by_hand(known, tokenizer, question, first_tokens) for question in questions])
    for batch_size in (1, 4):
        found = prompt_scores(known.train(), ids, first_tokens=first_tokens, batch_size=batch_size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert known.training
    known.eval()


@pytest.fixture(params=[1, 3, 30])
def patient(request, known, tokenizer, questions) -> EnergyGuard:
    """Refuses three of the six questions, after this number of generated tokens."""
    guard = EnergyGuard.calibrate(known, tokenizer, questions, tolerance=0.2, first_tokens=request.param)
    scores = guard.score(known, tokenizer, questions).sort().values
    return replace(guard, threshold=float(scores[2] + scores[3]) / 2)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}, {"repetition_penalty": 1.2}])
@pytest.mark.parametrize("new_tokens", [40, 4])
def test_the_refusal_replaces_what_flagged_rows_began_to_say(known, tokenizer, questions, patient, options, new_tokens):
    batch = batch_of(tokenizer, questions)
    width = batch["input_ids"].shape[1]
    torch.manual_seed(0)
    plain = known.generate(**batch, max_new_tokens=new_tokens, **options)
    torch.manual_seed(0)
    with patient.attach(known) as handle:
        guarded = known.generate(**batch, max_new_tokens=new_tokens, **options)
    if not options.get("do_sample") and "repetition_penalty" not in options and new_tokens > patient.first_tokens:
        torch.testing.assert_close(handle.scores, patient.score(known, tokenizer, questions), rtol=1e-4, atol=1e-4)
        assert int(handle.refused.sum()) == 3
    assert guarded.shape[1] <= width + new_tokens
    refusal = list(patient.refusal_ids[:new_tokens])
    for row, is_refused in enumerate(handle.refused.tolist()):
        said = guarded[row, width:].tolist()
        if is_refused:
            assert said[: len(refusal)] == refusal
            assert set(said[len(refusal) :]) <= {tokenizer.pad_token_id}
        else:
            theirs = plain[row, width:].tolist()
            assert said[: len(theirs)] == theirs[: len(said)]
            assert set(said[len(theirs) :]) | set(theirs[len(said) :]) <= {tokenizer.pad_token_id}


def test_a_stream_shows_nothing_that_is_removed(known, tokenizer, questions, patient):
    class Collecting(BaseStreamer):
        def __init__(self):
            self.shown, self.ended = [], 0

        def put(self, value):
            self.shown += value.flatten().tolist()

        def end(self):
            self.ended += 1

    verdicts = []
    for question in questions:
        batch = batch_of(tokenizer, [question])
        streamer, forwards = Collecting(), []
        hook = known.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        with patient.attach(known) as handle:
            output = known.generate(**batch, max_new_tokens=40, do_sample=False, streamer=streamer)
        hook.remove()
        assert streamer.shown == output[0].tolist()
        assert streamer.ended == 1
        verdicts += handle.refused.tolist()
        if verdicts[-1]:
            assert len(forwards) <= patient.first_tokens + 1  # it ends as soon as the guard has decided
            assert streamer.shown[batch["input_ids"].shape[1] :] == list(patient.refusal_ids)
    assert sum(verdicts) == 3


def test_calls_that_would_reveal_removed_tokens_raise(known, tokenizer, questions, patient):
    batch = batch_of(tokenizer, questions)
    with patient.attach(known):
        with pytest.raises(EUAError, match="beam search moves tokens between beams"):
            known.generate(**batch, num_beams=2, max_new_tokens=4)
        with pytest.raises(EUAError, match="output_logits and output_scores would reveal how a refused row began"):
            known.generate(**batch, max_new_tokens=4, return_dict_in_generate=True, output_scores=True, output_logits=True)
        outputs = known.generate(**batch, max_new_tokens=40, return_dict_in_generate=True, do_sample=False)
        assert outputs.past_key_values is None  # it would contain the removed tokens
        assert torch.equal(outputs.sequences, known.generate(**batch, max_new_tokens=40, do_sample=False))


def test_scores_are_those_of_the_model_while_a_guard_is_attached(known, tokenizer, questions, patient):
    expected = patient.score(known, tokenizer, questions)
    with patient.attach(known):
        assert torch.equal(patient.score(known, tokenizer, questions), expected)
