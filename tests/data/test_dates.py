"""Chat templates that write the date can be kept at one moment."""

from __future__ import annotations

import copy
from datetime import datetime

import pytest

from eua.data.dates import at_date, writes_date
from eua.data.rows import encode_prompts, encode_rows

CHAT = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MARKED = CHAT.replace("{{ '<' + m.role + '>' + m.content + eos_token }}", (
    "{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content + eos_token }}{% endif %}"
))  # fmt: skip
DATED = "{{ strftime_now('%d %b %Y') }}"
# As in the template of Llama 3.2.
OF_LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n" }}"""
THEN = datetime(2026, 3, 1, 4, 5, 6)


class Clock(datetime):
    """The clock of transformers' templates, at a fixed moment."""

    moment = THEN

    @classmethod
    def now(cls, tz=None) -> datetime:
        return cls.moment


@pytest.fixture
def clock(monkeypatch) -> type[Clock]:
    monkeypatch.setattr(Clock, "moment", THEN)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    return Clock


def with_template(tokenizer, template):
    chatty = copy.copy(tokenizer)
    chatty.chat_template = template
    return chatty


@pytest.mark.parametrize(
    "template",
    [
        DATED + CHAT,
        OF_LLAMA + CHAT,
        "\n  " + DATED + CHAT,
        "  {% if true %}\n  {{ strftime_now(format='%-d. %B, %%d, 100%%') }}{% endif %}" + MARKED,
        "{% macro day() %}{{ strftime_now('%H:%M:%S %a %j') | trim }}{% endmacro %}{{ day() }}" + CHAT,
    ],
)
def test_the_template_writes_what_it_wrote_at_that_moment(template, tokenizer, clock):
    chatty = with_template(tokenizer, template)
    rows = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]}]
    expected = [encode_rows(rows, chatty, None, assistant_turns=turns) for turns in ("last", "all")]
    prompts = encode_prompts(rows, chatty)
    clock.moment = datetime(2027, 12, 31, 23, 59)
    assert encode_prompts(rows, chatty) != prompts
    kept = at_date(chatty, THEN)
    assert [encode_rows(rows, kept, None, assistant_turns=turns) for turns in ("last", "all")] == expected
    assert encode_prompts(rows, kept) == prompts
    assert chatty.chat_template == template


def test_the_date_can_be_changed(tokenizer, clock):
    chatty = with_template(tokenizer, DATED + CHAT)
    twice = at_date(at_date(chatty, datetime(2025, 1, 2)), THEN)
    assert twice.chat_template == at_date(chatty, THEN).chat_template
    assert encode_prompts(["Who?"], twice) == encode_prompts(["Who?"], chatty)


def test_named_templates_are_kept_too(tokenizer, clock):
    named = with_template(tokenizer, {"default": DATED + CHAT, "rag": CHAT})
    assert "01 Mar 2026" in at_date(named, THEN).apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)


@pytest.mark.parametrize("template", [None, CHAT, "{{ date_string | default('26 Jul 2024') }}" + CHAT])
def test_other_tokenizers_are_not_copied(template, tokenizer):
    other = with_template(tokenizer, template)
    assert not writes_date(other)
    assert at_date(other, THEN) is other
