"""Turns texts into token ids, so that an answer gets the tokens that it has behind its prompt.

Many tokenizers write a text that stands alone differently from the same text inside a longer one (SentencePiece puts a space
before it, WordPiece begins a word). So a text is never tokenized apart from what precedes it: the text up to the end of each
part is tokenized as a whole, and the tokens that a part adds are the part's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from eua.errors import EUAError

_TEXTS_AT_ONCE = 1024  # fast tokenizers work on a list in parallel, but keep more than the ids of all its texts
# Texts that may precede a part without sharing a token with it.
_NEUTRAL = ("", "\n", "a", "1", ".", " ")


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as a beginning of sequence."""
    probe = "a"
    whole, bare = (tokenizer(probe, add_special_tokens=special)["input_ids"] for special in (True, False))
    places = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    return whole[: places[0]] if bare and places else []


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, openings: Sequence[Sequence[int]]
) -> Iterator[list[int]]:
    """Token ids of texts that something may follow: each behind its opening, without an end of sequence that is added to it.

    A text that already begins with its opening, as a rendered chat does, gets no second one.
    """
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        chosen = slice(start, start + _TEXTS_AT_ONCE)
        encoded = tokenizer(list(texts[chosen]), add_special_tokens=False)["input_ids"]
        for ids, opening in zip(encoded, openings[chosen], strict=True):
            yield ids if ids[: len(opening)] == list(opening) else [*opening, *ids]


def encode_parts(
    rows: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, openings: Sequence[Sequence[int]], names: Sequence[str]
) -> Iterator[list[list[int]]]:
    """Token ids of each part of each row, where the parts of a row are successive pieces of one text.

    The first part has the ids that ``generate`` is given for it. If the tokenizer joins the end of a part and the beginning of
    the next one in one token, the earlier part keeps its own tokens, and the next one gets those that the model would have to
    generate for the rest of the text.

    >>> [prompt, answer] = next(encode_parts([["Ul", "m"]], tokenizer, [[]], ["Row 0"]))     # doctest: +SKIP
    >>> tokenizer.convert_ids_to_tokens(prompt + answer)     # although "Ulm" is a token       # doctest: +SKIP
    ['▁Ul', 'm']

    Args:
        rows: the parts of each row.
        tokenizer: fast or slow; offsets are not used.
        openings: the special tokens before each row, see :func:`opening_ids`.
        names: what an error message calls each row.

    Raises:
        EUAError: if two parts share a token, and no tokens of their own are found for the second one.
    """
    texts = ["".join(parts[: i + 1]) for parts in rows for i in range(len(parts))]
    of_texts = [opening for parts, opening in zip(rows, openings, strict=True) for _ in parts]
    encoded = encode_texts(texts, tokenizer, of_texts)
    for parts, name in zip(rows, names, strict=True):
        before: list[int] = []
        added = []
        for part in parts:
            until = next(encoded)
            # Where two unknown characters touch, one token may stand for both.
            follows = until[: len(before)] == before and before[-1:] != [tokenizer.unk_token_id]
            added.append(until[len(before) :] if follows else _alone(part, before, until, tokenizer, name))
            before = until
        yield added


def _alone(part: str, before: list[int], until: list[int], tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """The tokens of ``part`` that make the same text behind ``before`` as ``until`` is, which joins the two in a token."""
    text = _decode(until, tokenizer)
    for neutral in _NEUTRAL:
        lead, both = (tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in (neutral, neutral + part))
        ids: list[int] = both[len(lead) :]
        if both[: len(lead)] == lead and _decode(before + ids, tokenizer) == text:
            return ids
    raise EUAError(
        f"{name}: the tokenizer joins the beginning of {part[:40]!r} with the text before it in one token, and has no tokens "
        "for it alone, which the model would have to generate: let it begin at a space or a new line."
    )


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    # Without special tokens, since unknown characters are one token where they touch, and two where they are apart.
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
