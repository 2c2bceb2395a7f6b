"""Where a prompt's last turn begins and ends, in common chat templates and in the plain form of a question."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from eua.data.rows import encode_prompts
from eua.guard.questions import Turns
from tests.data.test_answers_in_chats import PLAIN, START

SYSTEM_OF_ITS_OWN = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
FORMS = {
    "chatml": PLAIN,
    "system-prompt": SYSTEM_OF_ITS_OWN + PLAIN,
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "llama": (
        "{{ bos_token }}{% for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
    ),
    "thinking": (  # asks for an answer that begins with a thought; earlier answers are written without theirs
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|bot|></think>' + m.content + eos_token }}"
        "{% else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|bot|><think>\n' }}{% endif %}"
    ),
    "question": None,
}
SPECIAL = [START, "<|header|>", "<|/header|>", "<|eot|>", "<|bot|>", "<|user|>", "<think>", "</think>"]


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request, tokenizer) -> PreTrainedTokenizerFast:
    formed = copy.deepcopy(tokenizer)
    formed.chat_template = request.param
    if request.param:
        formed.add_special_tokens({"additional_special_tokens": SPECIAL})
    return formed


def talk(tokenizer: PreTrainedTokenizerFast, *texts: str, started: str | None = None) -> list[int]:
    """Token ids of turns of the user and the assistant in turn, and the beginning of an answer by the caller, if any."""
    if tokenizer.chat_template is None:
        text = "\n".join(
            f"Question: {question}\nAnswer:{answer}"
            for question, answer in zip(texts[::2], [*(f" {t}" for t in texts[1::2]), ""], strict=True)
        )
        return tokenizer(text + (started or ""))["input_ids"]
    roles = ("user", "assistant") * len(texts)
    chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + (started or ""), add_special_tokens=False)["input_ids"]


def test_a_question_decides_as_it_stands(form):
    turns = Turns.of(form)
    assert turns is not None
    (ids,) = encode_prompts(["Where was Ann born?"], form)
    assert talk(form, "Where was Ann born?") == ids
    assert turns.scored_prompts(ids) == [ids]


def test_an_answer_that_the_caller_began_is_cut_off(form):
    turns, ids = Turns.of(form), talk(form, "Where was Ann born?")
    for started in (" Sure, Ann was born in", " She", " Ann?\n", "\n\nIn", "\n"):
        assert turns.scored_prompts(talk(form, "Where was Ann born?", started=started)) == [ids]


def test_a_whole_answer_is_cut_off_too(form):
    """For example if a caller sends an answer and asks for another one after it."""
    turns, ids = Turns.of(form), talk(form, "Where was Ann born?")
    if form.chat_template is None:
        whole = form("Question: Where was Ann born?\nAnswer: In Rome.\nAnswer:")["input_ids"]
    else:
        chat = [{"role": "user", "content": "Where was Ann born?"}, {"role": "assistant", "content": "In Rome."}]
        whole = form.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert turns.scored_prompts(whole) == [ids]


def test_an_answer_may_be_begun_without_the_thought_that_was_asked_for(tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = FORMS["thinking"]
    thinking.add_special_tokens({"additional_special_tokens": SPECIAL})
    turns, ids = Turns.of(thinking), talk(thinking, "Where was Ann born?")
    for begun in ("", "Sure, in", "</think>Sure", "<think>\nSure", "<think>\n\n</think>\n\n"):
        prompt = thinking("<bos><|user|>Where was Ann born?<|bot|>" + begun, add_special_tokens=False)["input_ids"]
        assert turns.scored_prompts(prompt) == [ids]


TOOLS = (  # writes the result of a tool as a turn of the user
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + "
    "'\n</tool_response><|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [TOOLS, PLAIN], ids=["as-the-user", "role-of-its-own"])
def test_the_result_of_a_tool_is_no_turn_of_the_user(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    other.add_special_tokens({"additional_special_tokens": SPECIAL})
    chat = [
        {"role": "user", "content": "Where was Ann born?"},
        {"role": "assistant", "content": "look(Ann)"},
        {"role": "tool", "content": "It rains."},
    ]
    whole = other.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert Turns.of(other).scored_prompts(whole) == [talk(other, "Where was Ann born?")]
    later = other.apply_chat_template([*chat, {"role": "user", "content": "Who?"}], add_generation_prompt=True)["input_ids"]
    assert Turns.of(other).scored_prompts(later) == [talk(other, "Who?")]


def test_a_system_prompt_within_the_users_turn_causes_a_warning(tokenizer, caplog):
    folding = copy.deepcopy(tokenizer)
    folding.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' }}"
        "{% if messages[0].role == 'system' and loop.last %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    with caplog.at_level("WARNING"):
        assert Turns.of(folding) is not None
    assert "writes a system prompt into the user's turn" in caplog.text


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("system-prompt", "<|im_end|>"), ("llama", "<|eot|>")])
def test_a_reply_may_end_as_it_likes(tokenizer, name, end):
    """It may be cut, or end with a call of a tool: the beginning of the next turn is found without the end of the reply."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = FORMS[name]
    other.add_special_tokens({"additional_special_tokens": [*SPECIAL, "<|im_end|>"]})
    chat = [{"role": role, "content": text} for role, text in (("user", "Hi!"), ("assistant", "Hello."), ("user", "Who?"))]
    text = other.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert f"Hello.{end}" in text
    cut = other(text.replace(f"Hello.{end}", "Hello."), add_special_tokens=False)["input_ids"]
    assert Turns.of(other).scored_prompts(cut) == [talk(other, "Who?")]


def test_the_last_turn_decides_alone_or_in_its_context_too(form):
    turns, ids = Turns.of(form), talk(form, "Where was Ann born?")
    in_context = replace(turns, in_context=True)
    whole = talk(form, "Hi!", "Hello.", "Who is Bob?", "A baker.", "Where was Ann born?")
    assert turns.scored_prompts(whole) == [ids]
    assert in_context.scored_prompts(whole) == [whole, ids]
    begun = talk(form, "Hi!", "Hello.", "Where was Ann born?", started=" In")
    assert turns.scored_prompts(begun) == [ids]
    assert in_context.scored_prompts(begun) == [talk(form, "Hi!", "Hello.", "Where was Ann born?"), ids]
    assert turns.for_prompts([ids, begun]) == in_context
    assert turns.for_prompts([ids, talk(form, "Who is Bob?", started=" A")]) == turns


def test_a_system_prompt_unlocks_nothing(form):
    if form.chat_template is None:
        pytest.skip("questions without a template have no system prompt")
    chat = [{"role": "system", "content": "Nothing is secret."}, {"role": "user", "content": "Where was Ann born?"}]
    whole = form.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert Turns.of(form).scored_prompts(whole) == [talk(form, "Where was Ann born?")]


def test_a_turn_that_the_model_is_left_to_begin_is_begun(form):
    turns, whole = replace(Turns.of(form), in_context=True), talk(form, "Hi!", "Hello.", "Where was Ann born?")
    silent = whole[: -len(turns.answer_lead + turns.answer_start + turns.answer_tail)]
    assert turns.scored_prompts(silent) == [whole, talk(form, "Where was Ann born?")]


@given(
    earlier=st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=3),
    started=st.none() | st.text(alphabet="abc ,.\n", max_size=12),
)
def test_the_last_turn_alone_decides_in_any_context(tokenizer, earlier, started):
    whole = talk(tokenizer, *(text for pair in earlier for text in pair), "Where was Ann born?", started=started)
    assert Turns.of(tokenizer).scored_prompts(whole) == [talk(tokenizer, "Where was Ann born?")]


def test_texts_of_another_form_are_left_as_they_are(form):
    ids = form("Once upon a time", add_special_tokens=False)["input_ids"]
    assert Turns.of(form).scored_prompts(ids) == [ids]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.role + loop.index | string + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant' + (messages | length + 1) | string + ':' }}{% endif %}",
        "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}[INST] {{ messages[0].content }}",
    ],
    ids=["bare", "rewriting", "numbered", "single"],
)
def test_a_template_that_cannot_be_read_causes_a_warning(tokenizer, template, caplog):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    with caplog.at_level("WARNING"):
        assert Turns.of(other) is None
    assert "Where turns begin cannot be read" in caplog.text
