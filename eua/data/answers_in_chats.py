"""A chat with several answers → its text, cut where the answers begin and end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from eua.errors import EUAError

Chat = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # first character of an answer, and the one after its last

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Text made inside of these is written later, and transformers takes it to stand where they begin.
_MISPLACED_MARKER = re.compile(
    r"\{%[-+]?\s*(macro|call|filter|set(?=\s+[\w.]+\s*-?%\}))\b(?:(?!\bend\1\b).)*\{%-?\s*generation\s*-?%\}", re.DOTALL
)


def turn_texts(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> list[str]:
    """The text of a chat up to the end of its last answer, as prompt, answer, prompt, answer, …

    A template that marks what the assistant generates decides itself, but for the header that ``generate`` is given with the
    prompt (``<|im_start|>assistant``): it belongs to no answer. With other templates, an answer is what the template appends
    to the prompt it writes for it.

    Raises:
        EUAError: a chat that begins with an answer or does not end with one, or one whose answers cannot be found.
    """
    if chat[-1].get("role") != "assistant":
        raise EUAError(
            f"{where} ends with a message whose role is {chat[-1].get('role')!r}, so its last answer is not known: "
            'end it with a message of the role "assistant".'
        )
    if chat[0].get("role") == "assistant":
        raise EUAError(
            f"{where} begins with the assistant's message, and there is no prompt that it answers: "
            "put a system or user message before it, or leave it out."
        )
    find = _marked_answers if _MARKER.search(tokenizer.get_chat_template()) else _appended_answers
    text, spans = find(chat, tokenizer, where)
    return cut_text(text, spans, tokenizer.eos_token or "")


def cut_text(text: str, spans: Iterable[Span], eos: str) -> list[str]:
    """``text`` as prompt, answer, prompt, answer, …: an answer ends with its last ``eos``, which ends generation.

    What a template writes after that is the beginning of the next prompt, or dropped where there is none.
    """
    parts, done = [], 0
    for start, stop in spans:
        end = text.rfind(eos, start, stop)
        stop = stop if end < 0 else end + len(eos)
        parts += [text[done:start], text[start:stop]]
        done = stop
    return parts


def _appended_answers(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, list[Span]]:
    """The chat's text and its answers, found by writing the chat up to each of them."""
    text, spans = "", []
    for i in _answers(chat):
        before, after = _render(chat[:i], tokenizer, ask=True), _render(chat[: i + 1], tokenizer)
        if not before.startswith(text) or not after.startswith(before):
            raise EUAError(
                f"{where}: up to message {i} the chat template does not only append but changes what it wrote of earlier ones, "
                "so where the assistant's turns begin and end is not known: use a template that marks them with "
                '{% generation %} ... {% endgeneration %}, or set assistant_turns = "last".'
            )
        spans.append((len(before), len(after)))
        text = after
    return text, spans


def _marked_answers(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, list[Span]]:
    """The chat's text and its answers, as the template marks them.

    Characters are asked for, not ``apply_chat_template``'s mask of tokens: that one counts everything up to the end of the
    text where an answer ends in a space that no token owns, and no further answer where one begins so.
    """
    template = tokenizer.get_chat_template()
    if _MISPLACED_MARKER.search(template):
        raise EUAError(
            f"{where}: the chat template has a {{% generation %}} marker inside a macro, call, filter or set block, where its "
            "place in the text is not known: move the marker out of it, around where the result is written."
        )
    messages = [{key: value for key, value in message.items() if value is not None} for message in chat]
    texts, marked = render_jinja_template(
        conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
    )
    text = texts[0]
    answers = _answers(chat)
    prompts = [_render(chat[:i], tokenizer, ask=True) for i in answers]
    header = prompts[0].removeprefix(_render(chat[: answers[0]], tokenizer))
    spans = []
    for start, stop in marked[0]:
        if text.startswith(header, start) and not text.endswith(header, 0, start):
            start += len(header)
        if start < stop:
            spans.append((start, stop))
    if not spans:
        raise EUAError(
            f"{where}: the chat template has {{% generation %}} markers, but marks nothing of this chat, so no token would "
            'count: mend the template, or set assistant_turns = "last".'
        )
    start = spans[0][0]
    if text[:start] not in prompts:
        raise EUAError(
            f"{where}: the chat template's {{% generation %}} marker begins the first answer after {text[:start][-40:]!r}, but "
            f"`generate` is given a prompt that ends with {prompts[0][-40:]!r}: let the template write for "
            'add_generation_prompt what stands before the marker, or set assistant_turns = "last".'
        )
    return text, spans


def _answers(chat: Chat) -> list[int]:
    return [i for i, message in enumerate(chat) if message.get("role") == "assistant"]


def _render(chat: Chat, tokenizer: PreTrainedTokenizerBase, *, ask: bool = False) -> str:
    return tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=ask)
