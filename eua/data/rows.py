"""Encodes rows of the usual formats as token ids, with the answers marked.

A row is a mapping with

- ``question`` and ``answer``: put into the tokenizer's chat template, or into :data:`QUESTION_TEMPLATE` if it has none;
- ``prompt`` and ``completion``: two strings, used literally, or two lists of chat messages;
- ``messages``: a chat whose last message is the assistant's; that message is the answer, and the others are the prompt.

With ``assistant_turns="all"`` every message of the assistant in a chat is an answer, see :mod:`eua.data.answers_in_chats`.

The (first) prompt has the ids that ``generate`` gets later, and the answer those that it has to generate behind them, see
:mod:`eua.data.tokens`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from eua.data.answers_in_chats import cut_text, render_chat, turn_texts
from eua.data.sources import ROW_FORMATS, Prompts, Row, Source, read_prompts, read_rows
from eua.data.tokens import encode_parts, encode_texts, opening_ids
from eua.errors import EUAError

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
QUESTION_TEMPLATE = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of prompt and answer, and the length of the prompt.

    A chat may have several answers: the prompt is then that of the first one, and ``later_prompts`` are the positions after it
    that belong to no answer. ``cut_ids`` are the tokens that were cut off at the end, ``hidden`` positions that attention does
    not see. ``pushed`` are the positions that are pushed away if the row is to be forgotten; None: all those of answers.
    """

    input_ids: list[int]
    prompt_length: int
    later_prompts: frozenset[int] = frozenset()
    cut_ids: tuple[int, ...] = ()
    hidden: frozenset[int] = frozenset()
    pushed: frozenset[int] | None = None

    @property
    def key(self) -> tuple[tuple[int, ...], int, frozenset[int]]:
        """A hashable value that rows with the same tokens, and no others, have in common; what was cut off is not in it."""
        return tuple(self.input_ids), self.prompt_length, self.later_prompts

    @property
    def prompt_ids(self) -> list[int]:
        return self.input_ids[: self.prompt_length]

    @property
    def answer_positions(self) -> list[int]:
        """The positions in ``input_ids`` of the tokens that count, in ascending order."""
        return [p for p in range(self.prompt_length, len(self.input_ids)) if p not in self.later_prompts]

    @property
    def answer_ids(self) -> list[int]:
        return [self.input_ids[p] for p in self.answer_positions]


def format_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, str]], where: str = "The prompt"
) -> str:
    """The text of a question (a string) or a chat (a list of messages) as a model reads it, ready for the answer.

    Raises:
        EUAError: if the tokenizer's template does not take the chat; ``where`` is what the message calls it.
    """
    if isinstance(prompt, str):
        if tokenizer.chat_template is None:
            return QUESTION_TEMPLATE.format(question=prompt)
        prompt = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is None:
        raise EUAError(
            f"{where} is a chat, but the tokenizer has no chat template to turn messages into text: "
            'set tokenizer.chat_template, or give "question"/"answer" rows.'
        )
    if not prompt:
        raise EUAError(
            f"{where} is a chat without a message before its answer, so the answer has no prompt: put a user message there."
        )
    return render_chat(prompt, tokenizer, where, ask=True)


def row_texts(
    row: Row, tokenizer: PreTrainedTokenizerBase, where: str, assistant_turns: str = "last", labels: str = "answer"
) -> tuple[list[str], bool]:
    """The texts of a row to tokenize (prompt, answer, prompt, answer, …), and whether the row states them literally."""
    prompt, answer, literal = _split_answered_row(row, where)
    eos = tokenizer.eos_token or ""
    if literal:
        return [prompt, answer if eos and answer.endswith(eos) else answer + eos], True
    before = format_prompt(tokenizer, prompt, where)
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        return [before, f" {answer}{eos}"], False
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    reply = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    if assistant_turns == "all":
        return turn_texts(chat + reply, tokenizer, where), False
    whole = render_chat(chat + reply, tokenizer, where)
    if not whole.startswith(before):
        raise EUAError(
            f"{where}: the chat template writes the conversation with its answer differently from the prompt alone, so it is "
            'unknown where the answer starts: give "prompt"/"completion" texts, or a template that only appends.'
        )
    if labels == "template":
        return [before, whole[len(before) :] + ("" if eos and whole.endswith(eos) else eos)], False
    return cut_text(whole, [(len(before), len(whole))], eos), False


def encode_prompts(prompts: Prompts, tokenizer: PreTrainedTokenizerBase, name: str = "prompts") -> list[list[int]]:
    """Token ids of questions (strings) or of the prompts of rows, whose answers are ignored.

    >>> encode_prompts("Who wrote it?", tokenizer)       # doctest: +SKIP
    [[464, 21]]

    Args:
        prompts: one question, or a source of questions and rows, see :func:`eua.data.sources.read_prompts`.
        tokenizer: the model's.
        name: what error messages call the prompts.

    Raises:
        EUAError: if prompts cannot be read, have an unknown format, are chats that the tokenizer's template does not take, or
            have no tokens but padding.
    """
    texts, openings, opening = [], [], opening_ids(tokenizer)
    for index, row in enumerate(read_prompts(prompts, name, string_is_question=True)):
        where = f"Row {index} of the {name}"
        prompt, literal = _split_prompt(row, where)
        texts.append(prompt if literal else format_prompt(tokenizer, prompt, where))
        openings.append(opening if literal or tokenizer.chat_template is None else [])
    encoded = list(encode_texts(texts, tokenizer, openings))
    for index, ids in enumerate(encoded):
        if not ids:
            raise EUAError(
                f"Row {index} of the {name} is empty, so it has no last token to score: give it a text, or leave it out."
            )
        _check_not_padding(ids, tokenizer, f"Row {index} of the {name}")
    return encoded


def answered_prompts(
    rows: Source, tokenizer: PreTrainedTokenizerBase, name: str = "dataset", assistant_turns: str = "last"
) -> list[list[int]]:
    """The prompt of every answer that counts, as :func:`encode_prompts` gives it for a chat that ends before that answer.

    Args:
        rows, tokenizer, name, assistant_turns: as in :func:`encode_rows`. The prompts of answers beyond a ``max_length`` are
            among those returned.

    Raises:
        EUAError: as in :func:`encode_rows`.
    """
    asked: list[Row] = []
    for index, row in enumerate(read_rows(rows, name)):
        where = f"Row {index} of the {name}"
        prompt, answer, _ = _split_answered_row(row, where)
        if assistant_turns == "last" or isinstance(answer, str):
            asked.append(row)
            continue
        chat = [*prompt, *answer]
        begun = [chat[:i] for i, message in enumerate(chat) if message.get("role") == "assistant"]
        texts = [format_prompt(tokenizer, before, where) for before in begun]
        (first, *_), _ = row_texts(row, tokenizer, where, assistant_turns)
        asked += ({"prompt": before} for before in begun[texts.index(first) :])  # a template may mark later answers alone
    return encode_prompts(asked, tokenizer, name)


def check_rows(rows: Sequence[Row | str], name: str, *, answers: bool) -> None:
    """Check the format of rows without a tokenizer, for example before a model is loaded.

    >>> check_rows([{"question": "Who?"}], "forget set", answers=True)
    Traceback (most recent call last):
    eua.errors.EUAError: Row 0 of the forget set has no answer (it is None): give it one, or leave the row out.

    Args:
        rows: what :func:`eua.data.sources.read_rows` or :func:`eua.data.sources.read_prompts` returned.
        name: what error messages call the rows.
        answers: whether every row needs an answer.

    Raises:
        EUAError: if a row has an unknown format, lacks an answer that it needs, or is not valid Unicode.
    """
    for index, row in enumerate(rows):
        where = f"Row {index} of the {name}"
        if answers and not isinstance(row, str):
            _split_answered_row(row, where)
        else:
            _split_prompt(row, where)


def _split_prompt(row: Row | str, where: str) -> tuple[Any, bool]:
    """The prompt of a row or a question, and whether it is a text to be used literally."""
    if isinstance(row, str):
        _check_part(row, "question", where, (str,))
        return row, False
    prompt, _, literal = _split_row(row, where)
    return prompt, literal


def _split_answered_row(row: Row, where: str) -> tuple[Any, Any, bool]:
    prompt, answer, literal = _split_row(row, where)
    if not answer or (isinstance(answer, str) and not answer.strip()):
        raise EUAError(f"{where} has no answer (it is {answer!r}): give it one, or leave the row out.")
    return prompt, answer, literal


def _split_row(row: Row, where: str) -> tuple[Any, Any, bool]:
    """Prompt and answer as the row states them, and whether they are texts to be used literally."""
    if "messages" in row:
        messages = row["messages"]
        _check_part(messages, "messages", where, (list,))
        is_answered = bool(messages) and messages[-1].get("role") == "assistant"
        return (messages[:-1], messages[-1:], False) if is_answered else (messages, None, False)
    if "question" in row:
        _check_part(row["question"], "question", where, (str,))
        _check_part(row.get("answer"), "answer", where, (str,))
        return row["question"], row.get("answer"), False
    if "prompt" in row:
        literal = isinstance(row["prompt"], str)
        _check_part(row["prompt"], "prompt", where, (str, list))
        _check_part(row.get("completion"), "completion", where, (str,) if literal else (list,))
        return row["prompt"], row.get("completion"), literal
    raise EUAError(f"{where} has the keys {sorted(row)}, which are not a known format: give {ROW_FORMATS}.")


def _check_part(part: Any, key: str, where: str, kinds: tuple[type[str] | type[list], ...]) -> None:
    """Raise unless ``part`` is a text or a list of messages, of the kinds that its key allows. None is a missing answer."""
    chat_is_sound = not isinstance(part, list) or all(
        isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in part
    )
    if part is None and key in ("answer", "completion"):
        return
    if isinstance(part, kinds) and chat_is_sound:
        for text in [part] if isinstance(part, str) else [message["content"] for message in part]:
            _check_unicode(text, key, where)
        return
    wanted = " or ".join("a text" if kind is str else 'a list of {"role", "content"} messages' for kind in kinds)
    raise EUAError(f'{where} has {part!r} as its "{key}", which must be {wanted}.')


def encode_rows(
    rows: Source,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    name: str = "dataset",
    assistant_turns: str = "last",
    labels: str = "answer",
    hide: int | None = None,
) -> list[EncodedRow]:
    """Tokenize rows. Tokens beyond ``max_length`` are cut off, and the number of rows that were cut is logged.

    Args:
        rows: of any format, see :mod:`eua.data.rows`, from any source, see :mod:`eua.data.sources`.
        tokenizer: the model's.
        max_length: of a row, in tokens. None: no limit.
        name: what error messages call the rows.
        assistant_turns: ``"last"`` counts the answer at the end of a chat, ``"all"`` every message of the assistant.
        labels: an answer ends with the token that ends generation (``"answer"``), or with all that the chat template writes
            after it and an end of sequence (``"template"``, as in OpenUnlearning).
        hide: a token id that attention does not see, wherever it stands (as padding in OpenUnlearning). None: it sees all.

    Raises:
        EUAError: if rows cannot be read, or if a row has an unknown format, no answer, or no answer left after the cut.
    """
    rows = read_rows(rows, name)
    names = [f"Row {index} of the {name}" for index in range(len(rows))]
    parts, openings, opening = [], [], opening_ids(tokenizer)
    for row, where in zip(rows, names, strict=True):
        texts, literal = row_texts(row, tokenizer, where, assistant_turns, labels)
        parts.append(texts)
        openings.append(opening if literal or tokenizer.chat_template is None else [])
    encoded, cut = [], 0
    for pieces, where, texts in zip(encode_parts(parts, tokenizer, openings, names), names, parts, strict=True):
        ids: list[int] = []
        counted: list[int] = []
        for place, piece in enumerate(pieces):
            if place % 2:
                counted += range(len(ids), len(ids) + len(piece))
            ids += piece
        if not counted:
            raise EUAError(f"{where} has no answer: {texts[-1]!r} has no tokens. Give it a text, or leave the row out.")
        _check_not_padding([ids[p] for p in counted], tokenizer, f"The answer of {where[0].lower()}{where[1:]}")
        start = counted[0]
        if start == 0:
            raise EUAError(f"{where} has an empty prompt, so nothing predicts the answer's first token: give it a prompt.")
        if max_length is not None and start >= max_length:
            raise EUAError(
                f"{where} has a prompt of {start} tokens, so max_length = {max_length} cuts its answer off: "
                "raise max_length, shorten the prompt, or leave the row out."
            )
        kept = [p for p in counted if max_length is None or p < max_length]
        cut += len(kept) < len(counted)
        stop = kept[-1] + 1  # nothing after the last answer that fits has an effect
        hidden = frozenset(p for p in range(stop) if ids[p] == hide)
        later_prompts = frozenset(range(start, stop)).difference(kept)
        encoded.append(EncodedRow(ids[:stop], start, later_prompts, tuple(ids[stop:]), hidden))
    if cut:
        logger.warning(
            f"{cut} of {len(rows)} rows of the {name} are longer than max_length = {max_length}: their answers were cut."
        )
    return encoded


def rows_digest(rows: Iterable[EncodedRow]) -> str:
    """SHA-256 of the rows' token ids, in order, and of the positions of answers: identifies rows without revealing them."""
    digest = hashlib.sha256()
    for row in rows:
        parts = (row.answer_positions, row.input_ids)
        digest.update(repr((*parts, sorted(row.hidden)) if row.hidden else parts).encode())
    return digest.hexdigest()


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase, *, literal: bool = False) -> list[int]:
    """Token ids of a prompt. A chat template writes its own special tokens; other texts begin with those of the tokenizer.

    A text that already begins with them, such as a rendered chat, gets no second ones. An end of sequence that the tokenizer
    adds to every text is left out, since the answer is still to come.
    """
    opening = opening_ids(tokenizer) if literal or tokenizer.chat_template is None else []
    return next(encode_texts([text], tokenizer, [opening]))


def encode_answer(answer: str, tokenizer: PreTrainedTokenizerBase, *, begun: str = "") -> list[int]:
    """Token ids of a text as the answer to a question, with an end of sequence, or as the rest of an answer that has begun.

    >>> tokenizer.decode(encode_answer("I cannot say.", tokenizer))     # doctest: +SKIP
    ' I cannot say.<eos>'

    Args:
        answer: the text.
        tokenizer: the model's, which has an end of sequence.
        begun: the beginning of the answer, whose tokens are not returned.
    """
    _check_unicode(answer, "text", "The answer")
    space = " " if begun or tokenizer.chat_template is None else ""
    parts = [f"{format_prompt(tokenizer, 'Who?')}{begun}", f"{space}{answer}", tokenizer.eos_token]
    _, ids, end = next(encode_parts([parts], tokenizer, [[]], ["The answer"]))
    return [*ids, *end]


def _check_unicode(text: str, key: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EUAError(
            f'{where} has {error.object[error.start : error.end]!r} in its "{key}", half a surrogate pair (of an emoji, for '
            "example), which is not valid Unicode and has no tokens: correct the text, or leave it out."
        ) from error


def _check_not_padding(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise if padding is all that a text has."""
    pad = tokenizer.pad_token_id
    is_also_used = pad in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    if pad in ids and not is_also_used and not tokenizer.decode(ids, skip_special_tokens=True).strip():
        raise EUAError(
            f"{where} has no tokens but padding ({tokenizer.pad_token!r}), which stands for no text: give it a text, or leave "
            "it out."
        )
