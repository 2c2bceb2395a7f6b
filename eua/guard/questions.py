"""Finds the part of a prompt that asks: the user's last turn, up to where the assistant's turn begins.

Prompts are token ids, the only form in which ``generate`` sees them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from eua.data.rows import encode_prompt, format_prompt
from eua.errors import EUAError

logger = logging.get_logger(__name__)

# Messages that no template contains.
_FIRST, _REPLY, _SECOND, _SYSTEM = "Ann asks aloud", "Bob replies", "Cleo asks again", "Dora sets rules"
_TEMPLATE_ERRORS = (TemplateError, TypeError, KeyError, ValueError)  # what templates raise for chats that they do not support

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Turns:
    """The token ids that a chat template, or the plain form of a question, puts around messages.

    Spaces and newlines at an edge are kept separately, since they may share a token with the beginning or end of a message.

    Attributes:
        opening: what precedes the first turn of the user (beginning of sequence, the template's default system prompt).
        user_start: the beginning of a turn of the user.
        answer_start: the beginning of the assistant's turn, before any answer.
        answer_lead, answer_tail: what a prompt for an answer has just before and after it: space, or the start of a thought.
        tool_start: what follows ``user_start`` if the template writes the result of a tool as a turn of the user.
        in_context: whether earlier turns and a system prompt count in the score.
    """

    opening: Ids
    user_start: Ids
    answer_start: Ids
    answer_lead: Ids
    answer_tail: Ids
    tool_start: Ids = ()
    in_context: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_sound = (
                isinstance(value, bool) if name == "in_context" else isinstance(value, tuple) and all(map(is_token, value))
            )
            if not is_sound:
                raise EUAError(
                    f"The turns of the guard have {name} = {value!r}, which is not what a template writes: calibrate again."
                )
        if not (self.user_start and self.answer_start):
            raise EUAError("The turns of the guard have no beginnings, so they would not be found: calibrate the guard again.")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Turns | None:
        """Read the turns from how the tokenizer writes a few chats, and check them on these chats.

        If that fails, the result is None, and a warning is logged. A template that writes a system prompt into a turn of the
        user causes a warning, too.
        """
        turns = None
        if tokenizer.is_fast:
            with suppress(*_TEMPLATE_ERRORS):
                turns = cls._read(tokenizer)
        if turns is None:
            logger.warning(
                "Where turns begin cannot be read from this tokenizer's template, so the guard scores every prompt at its last "
                "token: an answer begun by the caller and earlier turns of a chat then count as parts of the question."
            )
        elif tokenizer.chat_template is not None:
            with suppress(*_TEMPLATE_ERRORS):
                alone, ruled = (_Text(tokenizer, _chat(*texts)).ids for texts in ((_FIRST,), (_SYSTEM, _FIRST)))
                if turns.scored_prompts(ruled) != [list(alone)]:
                    logger.warning(
                        "This tokenizer's template writes a system prompt into the user's turn, where it counts as a part of "
                        "the question: calibrate the guard with the system prompt that is deployed."
                    )
        return turns

    @classmethod
    def _read(cls, tokenizer: PreTrainedTokenizerBase) -> Turns | None:
        """None if what was read does not find the turns of the chats that it was read from."""
        one, second = _Text(tokenizer, _chat(_FIRST)), _Text(tokenizer, _chat(_SECOND))
        two = _Text(tokenizer, _chat(_FIRST, _REPLY, _SECOND))
        replied = _Text(tokenizer, _chat(_FIRST, _REPLY), ask=False)
        # The beginning of a user's turn: the same at the start of a chat and after a reply, without the end of the reply.
        common = os.path.commonprefix([one.between("", _FIRST)[::-1], two.between(_REPLY, _SECOND)[::-1]])
        user_start = tuple(common[::-1])
        end = replied.between(_REPLY, "")
        user_start = user_start[len(end) :] if user_start[: len(end)] == end else user_start
        while user_start and not tokenizer.decode(user_start[0]).strip():
            user_start = user_start[1:]
        # The beginning of an answer: the same in a prompt that asks for one and in a chat that has one.
        (lead, core), stands = two.asking(), two.between(_FIRST, _REPLY)
        length = max((n for n in range(len(core) + 1) if n == 0 or _find(stands, core[:n])), default=0)
        while length and not tokenizer.decode(core[length - 1]).strip():
            length -= 1  # a newline at its end belongs to the tail
        first = _find(one.ids, user_start)
        if not (user_start and length and first):
            return None
        turns = cls(tuple(one.ids[: first[0]]), user_start, core[:length], lead, core[length:])
        turns = replace(turns, tool_start=turns._read_tool_start(tokenizer))
        begun = [*one.ids[: len(one.ids) - len(turns.answer_tail)], *tokenizer("Sure", add_special_tokens=False)["input_ids"]]
        expected = {tuple(one.ids): one.ids, tuple(two.ids): second.ids, tuple(begun): one.ids}
        works = all(turns.scored_prompts(ids) == [list(alone)] for ids, alone in expected.items())
        return turns if works else None

    def _read_tool_start(self, tokenizer: PreTrainedTokenizerBase) -> Ids:
        with suppress(*_TEMPLATE_ERRORS):
            chat = [*_chat(_FIRST, _REPLY), {"role": "tool", "name": "tool", "content": _SECOND}]
            behind_reply = _Text(tokenizer, chat).between(_REPLY, _SECOND)
            found = _find(behind_reply, self.user_start)
            return behind_reply[found[-1] + len(self.user_start) :] if found else ()
        return ()

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> Turns | None:
        """The turns from their JSON form."""
        if content is None:
            return None
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        return cls(**fields)

    def for_prompts(self, prompts: Iterable[Sequence[int]]) -> Turns:
        """These turns, with context if one of the prompts has some, so that what is calibrated is what is scored later."""
        with_context = replace(self, in_context=True)
        return with_context if any(len(with_context.scored_prompts(ids)) > 1 for ids in prompts) else self

    def scored_prompts(self, prompt: Sequence[int]) -> list[list[int]]:
        """The prompts whose scores decide on ``prompt``: its last turn alone and, if context counts, also in its context.

        Everything in the assistant's turn is cut off, including tool calls and their results, so that an answer written by the
        caller cannot unlock the prompt; without earlier turns and system prompt, these cannot either. A question as
        :func:`eua.data.rows.encode_prompts` encodes it is returned unchanged, and so is a prompt of another form.
        """
        ids, start = list(prompt), list(self.answer_start)
        users = [i for i in _find(ids, self.user_start) if not self._is_tool(ids, i)]
        answers = [i for i in _find(ids, self.answer_start) if not users or i > users[-1]]
        if not answers and not users:
            return [ids]
        if answers:
            asked = [*ids[: answers[0]], *start, *self.answer_tail]
        else:  # the model itself begins its turn
            asked = [*ids, *self.answer_lead, *start, *self.answer_tail]
        alone = [*self.opening, *asked[users[-1] :]] if users else asked
        return [asked, alone] if self.in_context and alone != asked else [alone]

    def _is_tool(self, ids: Sequence[int], place: int) -> bool:
        behind = ids[place + len(self.user_start) :]
        return bool(self.tool_start) and tuple(behind[: len(self.tool_start)]) == self.tool_start


def is_token(value: object) -> bool:
    """Whether a value can be the id of a token."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _chat(*texts: str) -> list[dict[str, Any]]:
    roles = {_FIRST: "user", _REPLY: "assistant", _SECOND: "user", _SYSTEM: "system"}
    return [{"role": roles[text], "content": text} for text in texts]


class _Text:
    """A chat as the tokenizer's template writes it, and its tokens with their positions in the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, Any]], *, ask: bool = True) -> None:
        last = chat[-1]["content"]
        if tokenizer.chat_template is None:
            turns = [format_prompt(tokenizer, message["content"]) for message in chat[::2]]
            replies = [f" {message['content']}" for message in chat[1::2]]
            silent = self.text = "\n".join(turn + reply for turn, reply in zip_longest(turns, replies, fillvalue=""))
        else:
            silent = tokenizer.apply_chat_template(list(chat), tokenize=False)
            self.text = format_prompt(tokenizer, list(chat)) if ask else silent
        # If no header follows, the answer begins at the end of the user's turn ([/INST]).
        has_header = self.text != silent and self.text.startswith(silent)
        self.silent = len(silent) if has_header else self.text.rfind(last) + len(last)
        self.ids = encode_prompt(self.text, tokenizer)
        encoded = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True)
        self.tokens = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def between(self, before: str, after: str) -> Ids:
        """The tokens between two texts (or the edge), without space before the second one."""
        start = self._place(before) + len(before)
        stop = self._place(after) if after else len(self.text)
        return self._within(start, len(self.text[:stop].rstrip()))

    def asking(self) -> tuple[Ids, Ids]:
        """What asks for an answer at the end of the text: the space at its beginning, and the rest."""
        core = len(self.text) - len(self.text[self.silent :].lstrip())
        return self._within(self.silent, core), self._within(core, len(self.text))

    def _place(self, text: str) -> int:
        place = self.text.find(text)
        if place < 0:
            raise ValueError(f"the template does not write {text!r}")
        return place

    def _within(self, start: int, stop: int) -> Ids:
        return tuple(token for token, (first, end) in self.tokens if start <= first < end <= stop)


def _find(ids: Sequence[int], part: Sequence[int]) -> list[int]:
    """The positions in ``ids`` at which ``part`` begins."""
    if not part:
        return []
    wanted = list(part)
    return [i for i in range(len(ids) - len(wanted) + 1) if list(ids[i : i + len(wanted)]) == wanted]
