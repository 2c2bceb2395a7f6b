"""Which part of a prompt asks: the last turn of the user, up to where the assistant's turn begins.

A prompt is known here as token ids, the only form in which ``generate`` sees it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from eua.data import encode_prompts, format_prompt

logger = logging.get_logger(__name__)

# Three messages that no template writes by itself.
_FIRST, _REPLY, _SECOND = "Ann asks aloud", "Bob replies", "Cleo asks again"


@dataclass(frozen=True)
class Turns:
    """The token ids that a chat template, or the plain form of a question, puts around messages.

    Spaces and newlines at an edge are kept apart, since they may share a token with what a message begins or ends with.

    Attributes:
        opening: what stands before the first turn of the user (beginning of sequence, a system prompt of the template's own).
        user_start: what begins a turn of the user's; empty where the form allows but one.
        answer_start: what begins the assistant's turn.
        answer_lead, answer_tail: the space before and after that.
        in_context: whether the turns before the last one, and a system prompt, count in what decides.
    """

    opening: tuple[int, ...]
    user_start: tuple[int, ...]
    answer_start: tuple[int, ...]
    answer_lead: tuple[int, ...]
    answer_tail: tuple[int, ...]
    in_context: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Turns | None:
        """Read from what the tokenizer makes of a chat; None, and a warning, where it cannot be read."""
        turns, ids = None, encode_prompts([_FIRST], tokenizer)[0]
        if tokenizer.is_fast:
            with suppress(TemplateError):  # a template may refuse chats of several turns
                turns = cls._read(tokenizer, ids)
        if turns is None or not turns.answer_start or turns.decisive(ids) != [ids]:
            logger.warning(
                "Where turns begin cannot be read from this tokenizer's template, so the guard scores every prompt at its last "
                "token: an answer begun by the caller and earlier turns of a chat then count as parts of the question."
            )
            return None
        return turns

    @classmethod
    def _read(cls, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Turns | None:
        one = format_prompt(tokenizer, _FIRST)
        two, answer = _two_turns(tokenizer, one)
        if not 0 <= two.find(_REPLY) < two.find(_SECOND) or _FIRST not in one:
            return None
        opened = _tokens_within(tokenizer, one, 0, len(one[: one.find(_FIRST)].rstrip()))
        replied, asked = two.find(_REPLY) + len(_REPLY), len(two[: two.find(_SECOND)].rstrip())
        between = _tokens_within(tokenizer, two, replied, asked)
        user_start = tuple(os.path.commonprefix([opened[::-1], between[::-1]])[::-1])
        first = _find(ids, user_start)
        core, end = len(two) - len(two[answer:].lstrip()), len(two.rstrip())
        return cls(
            opening=tuple(ids[: first[0]]) if first else (),
            user_start=user_start if first else (),
            answer_start=_tokens_within(tokenizer, two, core, end),
            answer_lead=_tokens_within(tokenizer, two, answer, core),
            answer_tail=_tokens_within(tokenizer, two, end, len(two)),
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> Turns | None:
        """From the fields as JSON keeps them."""
        if content is None:
            return None
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        return cls(**fields)

    def for_prompts(self, prompts: Iterable[Sequence[int]]) -> Turns:
        """These turns, with context where one of the prompts has some: what else is calibrated would not be what is scored."""
        with_context = replace(self, in_context=True)
        return with_context if any(len(with_context.decisive(ids)) > 1 for ids in prompts) else self

    def decisive(self, prompt: Sequence[int]) -> list[list[int]]:
        """The prompts whose scores decide on ``prompt``: its last turn alone and, where context counts, also in its context.

        What the assistant's turn already holds is cut off, so that no start of an answer that a caller wrote unlocks it; alone,
        the turn has no earlier turns or system prompt that might. A question as :func:`eua.data.encode_prompts` encodes it
        comes back as it is, and so does a prompt of another form.
        """
        ids, start = list(prompt), list(self.answer_start)
        answers, users = _find(ids, self.answer_start), _find(ids, self.user_start)
        if not answers and not users:
            return [ids]
        if answers and (not users or users[-1] < answers[-1]):
            asked = [*ids[: answers[-1]], *start, *self.answer_tail]
        else:  # the caller has left it to the model to begin its turn
            asked = [*ids, *self.answer_lead, *start, *self.answer_tail]
        alone = [*self.opening, *asked[users[-1] :]] if users else asked
        return [asked, alone] if self.in_context and alone != asked else [alone]


def _two_turns(tokenizer: PreTrainedTokenizerBase, one: str) -> tuple[str, int]:
    """A chat of two turns up to where the assistant's second begins, and the character where its beginning begins."""
    if tokenizer.chat_template is None:
        two = f"{one} {_REPLY}\n{one.replace(_FIRST, _SECOND)}"
        return two, two.rfind(_SECOND) + len(_SECOND)
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": _FIRST},
        {"role": "assistant", "content": _REPLY},
        {"role": "user", "content": _SECOND},
    ]
    two, silent = format_prompt(tokenizer, chat), tokenizer.apply_chat_template(chat, tokenize=False)
    if two != silent and two.startswith(silent):
        return two, len(silent)
    return two, two.rfind(_SECOND) + len(_SECOND)  # the end of the user's turn is where the answer begins ([/INST])


def _tokens_within(tokenizer: PreTrainedTokenizerBase, text: str, start: int, stop: int) -> tuple[int, ...]:
    """The tokens of ``text`` that hold characters from ``start`` to ``stop`` and no others."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return tuple(token for token, (first, end) in spans if start <= first < end <= stop)


def _find(ids: Sequence[int], part: Sequence[int]) -> list[int]:
    """Where ``part`` begins in ``ids``."""
    if not part:
        return []
    wanted = list(part)
    return [i for i in range(len(ids) - len(wanted) + 1) if list(ids[i : i + len(wanted)]) == wanted]
