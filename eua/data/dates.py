"""Keeps a chat template at one moment: some templates, e.g. those of Llama 3, write the current date into every prompt."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

Tokenizer = TypeVar("Tokenizer", bound=PreTrainedTokenizerBase)

_CLOCK = "strftime_now"  # the function that transformers gives to templates
_SOME_DAY = datetime(2000, 1, 1)
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZ"  # letters that follow a % in a format

_BEGIN, _END = f"{{% macro {_CLOCK}(format) %}}", "{% endmacro %}\n"
_MACRO = re.compile(rf"\A{re.escape(_BEGIN)}.*?{re.escape(_END)}")


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template may write the current date or time."""
    return any(_CLOCK in template for template in _templates(tokenizer))


def at_date(tokenizer: Tokenizer, moment: datetime) -> Tokenizer:
    """A tokenizer that encodes chats as the given one does at ``moment``; the given one itself if it writes no date.

    The template gets a macro with the name of transformers' function, which takes its place inside the template, and that of an
    earlier call's macro. The copy is for encoding, not for saving.

    >>> llama_3.apply_chat_template(chat, tokenize=False)                        # doctest: +SKIP
    '... Today Date: 27 Nov 2026 ...'
    >>> at_date(llama_3, datetime(2026, 3, 1)).apply_chat_template(chat, tokenize=False)    # doctest: +SKIP
    '... Today Date: 01 Mar 2026 ...'
    """
    if not writes_date(tokenizer):
        return tokenizer
    kept = copy.copy(tokenizer)
    template, set_clock = tokenizer.chat_template, _clock_at(moment)
    kept.chat_template = (
        {name: set_clock + _MACRO.sub("", text) for name, text in template.items()}
        if isinstance(template, dict)
        else set_clock + _MACRO.sub("", str(template))
    )
    return kept


def at_same_date(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that encodes a chat in the same way on every day, to compare chats; the given one if it writes no date."""
    return at_date(tokenizer, _SOME_DAY)


def _templates(tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
    template = tokenizer.chat_template
    return template.values() if isinstance(template, dict) else [template or ""]


def _clock_at(moment: datetime) -> str:
    """A macro that formats ``moment`` as ``strftime`` does. The newline at its end is not written."""
    written = {}
    for directive in (f"%{flag}{letter}" for flag in ("", "-") for letter in _DIRECTIVES):  # %-d: without a leading zero
        with suppress(ValueError):  # not on this platform
            written[directive] = moment.strftime(directive)
    # A doubled % stands for itself, even before a letter, so it is set aside first.
    steps = {"%%": "\0"} | written | {"\0": "%"}
    replaced = "".join(f"|replace({json.dumps(directive)},{json.dumps(value)})" for directive, value in steps.items())
    return f"{_BEGIN}{{{{ format{replaced} }}}}{_END}"
