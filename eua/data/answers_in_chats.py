"""Splits the text of a chat with several answers where they begin and end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from eua.errors import EUAError

Chat = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # the first character of an answer, and the first one after it

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Text inside these blocks is written later, but transformers assumes that it is written where they begin.
_MISPLACED_MARKER = re.compile(
    r"\{%[-+]?\s*(macro|call|filter|set(?=\s+[\w.]+\s*-?%\}))\b(?:(?!\bend\1\b).)*\{%-?\s*generation\s*-?%\}", re.DOTALL
)


def turn_texts(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> list[str]:
    """The text of a chat up to the end of its last answer, as prompt, answer, prompt, answer, …

    If the template marks what the assistant generates, the marked text is an answer, without the header that ``generate`` gets
    with the prompt (``<|im_start|>assistant``). With other templates, an answer is the text that the template appends to the
    prompt for it.

    Raises:
        EUAError: if the chat begins with an answer or does not end with one, or if its answers cannot be found.
    """
    if chat[-1].get("role") != "assistant":
        raise EUAError(
            f"{where} ends with a message whose role is {chat[-1].get('role')!r}, so its last answer is unknown: "
            'end it with a message of the role "assistant".'
        )
    if chat[0].get("role") == "assistant":
        raise EUAError(
            f"{where} begins with the assistant's message, so that message has no prompt: "
            "put a system or user message before it, or leave it out."
        )
    with _explained(where):
        is_marked = _MARKER.search(tokenizer.get_chat_template())
    find = _marked_answers if is_marked else _appended_answers
    text, spans = find(chat, tokenizer, where)
    return cut_text(text, spans, tokenizer.eos_token or "")


def cut_text(text: str, spans: Iterable[Span], eos: str) -> list[str]:
    """``text`` as prompt, answer, prompt, answer, …: an answer ends with its last ``eos``, which ends generation.

    Text after that ``eos`` begins the next prompt, or is dropped at the end of the chat.
    """
    parts, done = [], 0
    for start, stop in spans:
        end = text.rfind(eos, start, stop)
        stop = stop if end < 0 else end + len(eos)
        parts += [text[done:start], text[start:stop]]
        done = stop
    return parts


def _appended_answers(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, list[Span]]:
    """The chat's text and its answers, found by rendering the chat up to each of them."""
    text, spans = "", []
    for i in _answers(chat):
        before, after = render_chat(chat[:i], tokenizer, where, ask=True), render_chat(chat[: i + 1], tokenizer, where)
        if not before.startswith(text) or not after.startswith(before):
            raise EUAError(
                f"{where}: up to message {i} the chat template does not just append, but changes earlier messages, so it is "
                "unknown where the assistant's turns begin and end: use a template that marks them with "
                '{% generation %} ... {% endgeneration %}, or set assistant_turns = "last".'
            )
        spans.append((len(before), len(after)))
        text = after
    return text, spans


def _marked_answers(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, list[Span]]:
    """The chat's text and its answers, as the template marks them.

    Characters are used, not the token mask of ``apply_chat_template``. If an answer ends with a space that belongs to no token,
    that mask counts everything up to the end of the text; if an answer begins with one, it counts no later answers.
    """
    template = tokenizer.get_chat_template()
    if _MISPLACED_MARKER.search(template):
        raise EUAError(
            f"{where}: the chat template has a {{% generation %}} marker inside a macro, call, filter or set block, where its "
            "place in the text is unknown: move the marker out of the block, around the place where its result is written."
        )
    messages = [{key: value for key, value in message.items() if value is not None} for message in chat]
    with _explained(where):
        texts, marked = render_jinja_template(
            conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
    text = texts[0]
    answers = _answers(chat)
    prompts = [render_chat(chat[:i], tokenizer, where, ask=True) for i in answers]
    header = prompts[0].removeprefix(render_chat(chat[: answers[0]], tokenizer, where))
    spans = []
    for start, stop in marked[0]:
        if text.startswith(header, start) and not text.endswith(header, 0, start):
            start += len(header)
        if start < stop:
            spans.append((start, stop))
    if not spans:
        raise EUAError(
            f"{where}: the chat template has {{% generation %}} markers, but marks nothing in this chat, so no token would "
            'count: fix the template, or set assistant_turns = "last".'
        )
    start = spans[0][0]
    if text[:start] not in prompts:
        raise EUAError(
            f"{where}: the chat template's {{% generation %}} marker begins the first answer after {text[:start][-40:]!r}, but "
            f"`generate` gets a prompt that ends with {prompts[0][-40:]!r}: make add_generation_prompt write the same text as "
            'before the marker, or set assistant_turns = "last".'
        )
    return text, spans


def _answers(chat: Chat) -> list[int]:
    return [i for i, message in enumerate(chat) if message.get("role") == "assistant"]


def render_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str, *, ask: bool = False) -> str:
    """The chat as the tokenizer's template writes it and, with ``ask``, the beginning of an answer to it.

    Raises:
        EUAError: if the template does not take the chat.
    """
    with _explained(where):
        return tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=ask)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template may raise anything
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise EUAError(
            f"{where} cannot be written by the tokenizer's chat template ({reason}): change the roles or the order of its "
            "messages, or set another tokenizer.chat_template."
        ) from error
