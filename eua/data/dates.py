"""Keeps a chat template at one moment: some templates, e.g. those of Llama 3, write the current date into every prompt."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

Tokenizer = TypeVar("Tokenizer", bound=PreTrainedTokenizerBase)

_CLOCK = "strftime_now"  # the function that transformers gives to templates
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZ"  # letters that follow a % in a format


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template may write the current date or time."""
    return any(_CLOCK in template for template in _templates(tokenizer))


def at_date(tokenizer: Tokenizer, moment: datetime) -> Tokenizer:
    """A tokenizer that encodes chats as the given one does at ``moment``; the given one itself if it writes no date.

    The template gets a macro with the name of transformers' function, which takes its place inside the template. The copy is
    for encoding, not for saving.

    >>> llama_3.apply_chat_template(chat, tokenize=False)                        # doctest: +SKIP
    '... Today Date: 27 Nov 2026 ...'
    >>> at_date(llama_3, datetime(2026, 3, 1)).apply_chat_template(chat, tokenize=False)    # doctest: +SKIP
    '... Today Date: 01 Mar 2026 ...'
    """
    if not writes_date(tokenizer):
        return tokenizer
    kept = copy.copy(tokenizer)
    macro = _clock_at(moment)
    template = tokenizer.chat_template
    kept.chat_template = (
        {name: macro + text for name, text in template.items()} if isinstance(template, dict) else f"{macro}{template}"
    )
    return kept


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
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"
