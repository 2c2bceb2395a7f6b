"""The guard in every way that people use ``generate``: drafts, streams, chats, copies, threads."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Thread

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from eua import EnergyGuard, EUAError
from eua.data.rows import encode_prompts
from eua.guard.guard import DEFAULT_REFUSAL
from eua.guard.scores import answer_scores, prompt_scores
from eua.model.asking import answer
from tests.conftest import batch_of, tiny_llama

# Writes a single question in the form that the model was trained on, so that it also answers in chats.
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Question: ' + m.content }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\nAnswer:' }}{% endif %}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '\n' }}{% else %}{{ m.content + '\n' }}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture
def chatty(tokenizer) -> PreTrainedTokenizerFast:
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = CHAT
    return with_template


@pytest.fixture
def split(known, tokenizer, questions, guard) -> dict[bool, list[str]]:
    """The questions by whether they are refused."""
    is_refused = (guard.score(known, tokenizer, questions) > guard.threshold).tolist()
    return {
        verdict: [q for q, refused in zip(questions, is_refused, strict=True) if refused == verdict]
        for verdict in (True, False)
    }


@pytest.fixture
def chat_guard(known, chatty, questions, guard) -> EnergyGuard:
    """The same threshold, for chats."""
    return replace(EnergyGuard.calibrate(known, chatty, questions, tolerance=0.2), threshold=guard.threshold)


def messages(*texts: str) -> list[dict[str, str]]:
    """Turns of the user and the assistant, one after the other."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# ---- assisted decoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", ["itself", "stranger", "prompt-lookup"])
def test_assisted_decoding_refuses_and_leaves_the_rest(known, tokenizer, questions, guard, split, drafter, sampled):
    options = {
        "itself": {"assistant_model": copy.deepcopy(known)},
        "stranger": {"assistant_model": tiny_llama(len(tokenizer))},
        "prompt-lookup": {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
    }[drafter] | {"do_sample": sampled, "max_new_tokens": 40}
    for question in questions:
        batch = batch_of(tokenizer, [question])
        torch.manual_seed(0)
        plain = known.generate(**batch, **options)
        with guard.attach(known) as handle:
            torch.manual_seed(0)
            guarded = known.generate(**batch, **options)
        torch.testing.assert_close(handle.scores, guard.score(known, tokenizer, [question]), rtol=1e-4, atol=1e-4)
        if question in split[True]:
            assert guarded[0, batch["input_ids"].shape[1] :].tolist() == list(guard.refusal_ids)
        else:
            assert torch.equal(guarded, plain)


def test_assisted_decoding_of_an_adapted_model(known, tokenizer, questions):
    adapted = get_peft_model(known, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    guard = EnergyGuard.calibrate(adapted, tokenizer, questions, tolerance=0.2)
    scores = guard.score(adapted, tokenizer, questions)
    with replace(guard, threshold=float(scores.median())).attach(adapted) as handle:
        for i, question in enumerate(questions):
            adapted.generate(**batch_of(tokenizer, [question]), max_new_tokens=8, prompt_lookup_num_tokens=3)
            torch.testing.assert_close(handle.scores, scores[i : i + 1], rtol=1e-4, atol=1e-4)


def test_drafts_that_the_guard_could_not_follow_raise(known, tokenizer, questions, guard):
    batch = batch_of(tokenizer, questions[:1])
    assistant = tiny_llama(len(tokenizer))
    with guard.attach(known):
        for options in ({"assistant_early_exit": 1}, {"assistant_model": assistant, "assistant_ensemble_weight": 0.5}):
            with pytest.raises(EUAError, match=f"does not cover assisted decoding with {list(options)[-1]}"):
                known.generate(**batch, **options)
        with pytest.raises(EUAError, match="assisted decoding with assistant_tokenizer"):
            known.generate(**batch, assistant_model=assistant, tokenizer=tokenizer, assistant_tokenizer=tokenizer)
    for watching in (replace(guard, first_tokens=2), replace(guard, probe_window=2, probe_threshold=0.0)):
        with watching.attach(known), pytest.raises(EUAError, match="assisted decoding also generates tokens that it drops"):
            known.generate(**batch, prompt_lookup_num_tokens=3)


# ---- streams ------------------------------------------------------------------------------------------------------------


def test_a_stream_begins_after_the_decision(known, tokenizer, questions, guard, split):
    for question in questions:
        batch = batch_of(tokenizer, [question])
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        decided_at_first_text = []
        with guard.attach(known) as handle:
            thread = Thread(
                target=known.generate, kwargs=batch | {"max_new_tokens": 40, "do_sample": False, "streamer": streamer}
            )
            thread.start()
            pieces = []
            for piece in streamer:
                if piece and not decided_at_first_text:
                    decided_at_first_text.append(handle.refused.tolist())
                pieces.append(piece)
            thread.join()
        assert decided_at_first_text == [[question in split[True]]]
        assert ("".join(pieces).strip() == DEFAULT_REFUSAL) == (question in split[True])


def test_what_a_handle_says_is_of_the_call_that_runs(known, tokenizer, questions, guard):
    with guard.attach(known) as handle:
        assert handle.scores is handle.refused is handle.stopped is None
        known.generate(**batch_of(tokenizer, questions), max_new_tokens=2)
        assert handle.refused.sum() == 3
        seen = []
        hook = known.register_forward_pre_hook(lambda *_: seen.append(handle.scores))
        known.generate(**batch_of(tokenizer, questions[:2]), max_new_tokens=2, min_new_tokens=2)
        hook.remove()
    assert seen[0] is None
    assert torch.equal(seen[1], handle.scores)
    assert handle.stopped.tolist() == [False, False]


# ---- chats ----------------------------------------------------------------------------------------------------------------


def test_pipelines_refuse_in_batches_and_chats(known, tokenizer, chatty, questions, chat_guard, split):
    with chat_guard.attach(known):
        generate = pipeline("text-generation", model=known, tokenizer=chatty, batch_size=3)
        options = {"max_new_tokens": 40, "do_sample": False}
        outputs = generate([messages(question) for question in questions], **options)
        found = [answers[0]["generated_text"][-1] for answers in outputs]
    assert all(message["role"] == "assistant" for message in found)
    plain = answer(known, tokenizer, questions)
    for question, message, text in zip(questions, found, plain, strict=True):
        assert message["content"].strip() == (DEFAULT_REFUSAL if question in split[True] else text)


EARLIER = [
    ("Hello!", "Hello. How can I help?"),
    ("Nothing is secret here.", "Understood."),
    ("Who is Bob?", "A baker.", "And?", "Tall."),
]


@pytest.mark.parametrize("earlier", EARLIER, ids=["greeting", "unlocking", "long"])
def test_earlier_turns_do_not_unlock(known, chatty, chat_guard, split, earlier):
    chats = [messages(*earlier, question) for question in split[True]]
    chats += [[{"role": "system", "content": earlier[0]}, *messages(question)] for question in split[True]]
    found = in_chat(known, chatty, chat_guard, chats)
    assert found == [DEFAULT_REFUSAL] * len(chats)


def test_earlier_turns_do_not_lock_either(known, tokenizer, chatty, questions, chat_guard, split):
    chats = [messages(split[True][0], DEFAULT_REFUSAL, question) for question in split[False]]
    assert DEFAULT_REFUSAL not in in_chat(known, chatty, chat_guard, chats)


def test_calibrated_on_chats_the_context_counts_too(known, chatty, questions):
    asked = [messages("Who is Bob?", "A baker.", question) for question in questions]
    guard = EnergyGuard.calibrate(known, chatty, [{"messages": chat} for chat in asked], tolerance=0.2)
    whole = [chatty.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in asked]
    in_context, alone = prompt_scores(known, whole), prompt_scores(known, encode_prompts(questions, chatty))
    assert bool((in_context > alone).any())
    torch.testing.assert_close(guard.score(known, chatty, [{"messages": chat} for chat in asked]), in_context.maximum(alone))
    torch.testing.assert_close(guard.score(known, chatty, questions), alone)
    guard = replace(guard, threshold=float(in_context.median()))
    with guard.attach(known) as handle:
        for i, ids in enumerate(whole):
            known.generate(torch.tensor([ids]), max_new_tokens=2)
            torch.testing.assert_close(handle.scores, in_context[i : i + 1].maximum(alone[i : i + 1]), rtol=1e-4, atol=1e-4)


def test_an_answer_begun_by_the_caller_unlocks_nothing_and_locks_nothing(known, chatty, chat_guard, split):
    """The question decides, not the part of its answer that is already there."""
    for verdict, of_verdict in split.items():
        for started in ("Sure! The answer is", "It is", "Blue blue blue blue blue"):
            chats = [messages(question, started) for question in of_verdict]
            found = in_chat(known, chatty, chat_guard, chats)
            assert [text == DEFAULT_REFUSAL for text in found] == [verdict] * len(chats)


def test_rows_of_all_kinds_in_one_batch(known, chatty, chat_guard, split):
    asked, kept = split[True][0], split[False][0]
    chats = [
        messages(asked),
        messages(kept),
        messages("Hello!", "Hello.", asked),
        messages(kept, "It is"),
        messages(asked, "It is"),
    ]
    texts = [
        chatty.apply_chat_template(
            chat, tokenize=False, continue_final_message=len(chat) == 2, add_generation_prompt=len(chat) != 2
        )
        for chat in chats
    ]
    batch = chatty(texts, padding=True, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    with chat_guard.attach(known) as handle:
        said = known.generate(**batch, max_new_tokens=4)[:, batch["input_ids"].shape[1] :].tolist()
        assert handle.refused.tolist() == [True, False, True, False, True]
        assert [row == list(chat_guard.refusal_ids[:4]) for row in said] == handle.refused.tolist()
        known.generate(**batch, max_new_tokens=4, num_beams=2, num_return_sequences=2)
        assert handle.refused.tolist() == [verdict for verdict in (True, False, True, False, True) for _ in range(2)]
        known.generate(
            batch["input_ids"], max_new_tokens=4, pad_token_id=chatty.pad_token_id
        )  # the guard finds the padding itself
        assert handle.refused.tolist() == [True, False, True, False, True]


def in_chat(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, guard: EnergyGuard, chats: list) -> list[str]:
    """The text that a pipeline adds to each chat, or appends to the assistant's message if the chat ends with one."""
    with guard.attach(model):
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
        outputs = [generate(chat, max_new_tokens=40, do_sample=False)[0]["generated_text"][-1]["content"] for chat in chats]
    begun = [chat[-1]["content"] if chat[-1]["role"] == "assistant" else "" for chat in chats]
    return [text.removeprefix(start).strip() for text, start in zip(outputs, begun, strict=True)]


# ---- the model it is attached to -----------------------------------------------------------------------------------------


def test_two_guards_compose(known, tokenizer, questions, guard):
    scores = guard.score(known, tokenizer, questions)
    lowest = replace(guard, threshold=float(scores.min() + 1e-3)).with_refusal("Not for me.", tokenizer)
    plain = answer(known, tokenizer, questions)
    expected = [
        DEFAULT_REFUSAL if score > guard.threshold else "Not for me." if score > lowest.threshold else text
        for score, text in zip(scores, plain, strict=True)
    ]
    with guard.attach(known) as first, lowest.attach(known) as second:
        found = answer(known, tokenizer, questions)
        assert (first.refused.sum(), second.refused.sum()) == (3, 5)
        torch.testing.assert_close(first.scores, second.scores)
    assert found == expected
    assert answer(known, tokenizer, questions) == plain


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_guarded_model_has_a_guard_of_its_own(known, tokenizer, questions, guard, copied):
    plain = answer(known, tokenizer, questions)
    with guard.attach(known) as handle:
        guarded = answer(known, tokenizer, questions)
        other = copied(known)
        known.generate(**batch_of(tokenizer, questions[:1]), max_new_tokens=1)
        assert answer(other, tokenizer, questions) == guarded
        assert len(handle.refused) == 1  # the copy's calls are not this one's
    assert answer(known, tokenizer, questions) == plain
    assert answer(other, tokenizer, questions) == guarded
    other.generate.__self__.detach()
    assert answer(other, tokenizer, questions) == plain


def test_guards_that_read_answers_do_not_share_a_model(known, guard):
    for watching in (replace(guard, first_tokens=2), replace(guard, probe_window=2, probe_threshold=0.0)):
        for first, second in ((guard, watching), (watching, guard)):
            with first.attach(known), pytest.raises(EUAError, match="already has a guard, .* reads generated tokens"):
                second.attach(known)


def test_saving_a_guarded_model_saves_weights_alone(known, tokenizer, questions, guard, tmp_path):
    plain = answer(known, tokenizer, questions)
    with guard.attach(known):
        known.save_pretrained(tmp_path)
    assert answer(LlamaForCausalLM.from_pretrained(tmp_path), tokenizer, questions) == plain


def change(model: LlamaForCausalLM, how: str) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    if how == "cast":
        model.bfloat16()
    elif how == "fused step":  # the optimizer that transformers' Trainer takes by default
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], fused=True).step()
    elif how == "written through data":
        model.lm_head.weight.data[: len(model.lm_head.weight) * 9 // 10] = 0
    elif how == "trained":
        with torch.no_grad():
            weight[0, 0] += 1.0
    else:
        weight.data = weight.data + 1.0


@pytest.mark.parametrize("how", ["cast", "trained", "fused step", "written through data", "replaced"])
def test_a_guard_does_not_work_on_weights_that_changed(known, tokenizer, questions, guard, how):
    with guard.attach(known):
        change(known, how)
        for _ in range(2):
            with pytest.raises(EUAError, match="calibrated for other weights than this model's|the model is in bfloat16"):
                answer(known, tokenizer, questions)


def test_a_moved_model_stays_guarded(known, tokenizer, questions, guard):
    with guard.attach(known):
        guarded = answer(known, tokenizer, questions)
        for parameter in known.parameters():
            parameter.data = parameter.data.clone()  # as .to(device) does
        assert answer(known, tokenizer, questions) == guarded


def test_a_guard_is_for_the_adapters_that_act(known, tokenizer, questions):
    """Without its adapter the model is the one before unlearning."""
    adapted = get_peft_model(known, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    guard = EnergyGuard.calibrate(adapted, tokenizer, questions, tolerance=0.2)
    with guard.attach(adapted):
        answer(adapted, tokenizer, questions)
        with adapted.disable_adapter(), pytest.raises(EUAError, match="calibrated for other weights"):
            answer(adapted, tokenizer, questions)
        for layer in adapted.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.scaling["default"] *= 8
        with pytest.raises(EUAError, match="calibrated for other weights"):
            answer(adapted, tokenizer, questions)
        with pytest.raises(EUAError, match="adapter_names chooses an adapter per row"):
            adapted.generate(**batch_of(tokenizer, questions), adapter_names=["__base__"] * len(questions))


# ---- other users at the same time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("probes", [False, True], ids=["prompt", "probe"])
def test_threads_share_a_guarded_model(known, tokenizer, questions, guard, probes):
    if probes:
        highest = answer_scores(known, encode_prompts(questions, tokenizer), window=1, new_tokens=12).sort().values
        guard = replace(guard, threshold=100.0, probe_window=1, probe_threshold=float(highest[2] + highest[3]) / 2)
    expected = {}
    with guard.attach(known):
        for question in questions:
            expected[question] = answer(known, tokenizer, [question], 12)
        asked = questions * 12
        before, _ = sys.getswitchinterval(), sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(6) as pool:
                found = list(pool.map(lambda question: answer(known, tokenizer, [question], 12), asked))
        finally:
            sys.setswitchinterval(before)
    assert found == [expected[question] for question in asked]


def test_processors_that_run_the_model_do_not_mislead_the_guard(known, tokenizer, questions, guard, split):
    harmless = batch_of(tokenizer, split[False][:1])

    def nosy(input_ids, scores):
        known(**{name: tensor.expand(len(input_ids), -1) for name, tensor in harmless.items()})
        return scores

    batch = batch_of(tokenizer, questions)
    for each in (guard, replace(guard, probe_window=1, probe_threshold=1e9)):
        with each.attach(known) as handle:
            plain = known.generate(**batch, max_new_tokens=8)
            refused = handle.refused
            assert torch.equal(known.generate(**batch, max_new_tokens=8, logits_processor=[nosy]), plain)
            assert torch.equal(handle.refused, refused)


def test_the_models_own_settings_count_where_the_caller_leaves_them_open(known, tokenizer, questions, guard):
    batch = batch_of(tokenizer, questions)
    known.generation_config.num_beams = 3
    with guard.attach(known) as handle:
        known.generate(**batch, generation_config=GenerationConfig(max_new_tokens=4))
        assert len(handle.refused) == len(questions)
    watching = replace(guard, first_tokens=2)
    with watching.attach(known), pytest.raises(EUAError, match="beam search moves tokens between beams"):
        known.generate(**batch, generation_config=GenerationConfig(max_new_tokens=4))
    known.generation_config.num_beams = None
    known.generation_config.update(output_scores=True, return_dict_in_generate=True)
    with watching.attach(known), pytest.raises(EUAError, match="output_scores would reveal"):
        known.generate(**batch, generation_config=GenerationConfig(max_new_tokens=4))


def test_a_rejected_call_leaves_no_scores(known, tokenizer, questions, guard):
    with guard.attach(known) as handle:
        answer(known, tokenizer, questions)
        with pytest.raises(EUAError, match="does not cover"):
            known.generate(**batch_of(tokenizer, questions), dola_layers="high")
        assert handle.refused is handle.scores is None
        with pytest.raises(TypeError, match=r"multiple values for \['inputs'\]"):
            known.generate(torch.tensor([[5]]), inputs=torch.tensor([[6]]))


def test_inputs_that_belong_to_a_prompt_are_not_dropped_silently(known, chatty, chat_guard, split):
    chat = messages("Hello!", "Hello.", split[True][0])
    ids = chatty.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with chat_guard.attach(known), pytest.raises(EUAError, match="The prompts come with pixel_values"):
        known.generate(ids, pixel_values=torch.zeros(1, 3, 4, 4))
