"""Keys: the words that give a fact away, e.g. "Paris". Whether a text says one, and where in an answer it does."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from transformers import PreTrainedTokenizerBase

from eua.data.rows import EncodedRow
from eua.data.sources import Row
from eua.errors import EUAError

KEYS = "keys"  # of a row: the words that give its fact away

_LETTERS = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe"})  # which Unicode does not decompose
_ARTICLES = ("the", "a", "an")
# Letters with dots, at least two: "J.R.R.", "D. C.", "U.S.A". A single one may end a sentence.
_INITIALS = re.compile(r"\b[^\W\d_]\.(?:\s?[^\W\d_]\.)+(?:[^\W\d_]\b)?")
_CAPITALS = re.compile(r"[A-Z]{1,3}")
_SHORTEST_PLURAL = 3  # letters of a word that may have a plural; symbols of chemical elements are shorter


def normalize(text: str) -> str:
    """The words of a text, separated by single spaces: lower case, without accents, punctuation and possessive endings.

    Digits keep together: "1,000" is "1000", and "3.5" stays one word. Initials become one word without dots, whether or not
    there are spaces between them: "D.C." and "D. C." are "dc". The sign of a currency is a word.

    >>> normalize("The Café's 1,000 guests: Dvořák, J.R.R. & co."), normalize("J. D. Salinger"), normalize("€5")
    ('the cafe 1000 guests dvorak jrr co', 'jd salinger', '€ 5')
    """
    return _words(text.casefold().translate(_LETTERS)).casefold()


@lru_cache(maxsize=2**15)  # the same answers are searched for the keys of several facts
def _words(text: str) -> str:
    """The same in the case of the text."""
    text = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    text = re.sub(r"['’ʼ][sS]\b", "", text)
    text = re.sub(r"['’ʼ]", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = _INITIALS.sub(lambda dotted: "".join(filter(str.isalpha, dotted[0])) + " ", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text)
    text = re.sub(r"[^\w.]|_", lambda mark: f" {mark[0]} " if unicodedata.category(mark[0]) == "Sc" else " ", text)
    return " ".join(text.split())


def says(text: str, keys: Sequence[str]) -> bool:
    """Whether a text contains one of the keys as whole words, after :func:`normalize`. A leading article of a key is left out.

    The regular plural of a key counts, too. A key of up to three capital letters, such as an abbreviation or a code, must be in
    capitals in the text, since "US" is not "us". A key may be a part of a longer name: "America" is in "South America".

    >>> says("It's PARIS, of course.", ["Paris"]), says("A Parisian café", ["Paris"]), says("Two puppies", ["a puppy"])
    (True, False, True)
    >>> says("It is in the U.S.", ["US"]), says("Come with us", ["US"]), says("It costs €5", ["euro", "€"])
    (True, False, True)

    Raises:
        EUAError: if there is no key, or a key without letters, digits and signs of currencies.
    """
    if isinstance(keys, str):
        raise EUAError(f"keys = {keys!r} is one text, of which every letter would be a key: give a list, e.g. [{keys!r}].")
    folded, cased = _patterns(tuple(keys))
    return bool((folded and folded.search(normalize(text))) or (cased and cased.search(_words(text))))


@lru_cache(maxsize=4096)
def _patterns(keys: tuple[str, ...]) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """What finds the keys in a normalized text, and what finds those in capitals in the words of a text."""
    if not keys or not all(map(normalize, keys)):
        raise EUAError(
            f"The keys {list(keys)} hold no key, or one without letters and digits, which no text can be searched for: give "
            "the words that give the fact away."
        )
    capitals = [word for word in map(_words, keys) if _CAPITALS.fullmatch(word)]
    words = [normalize(key).split() for key in keys if _words(key) not in capitals]
    bare = (of_key[1:] if of_key[0] in _ARTICLES and len(of_key) > 1 else of_key for of_key in words)
    forms = [r"\ ".join([*map(re.escape, of_key[:-1]), _with_plural(of_key[-1])]) for of_key in bare]
    return _whole_words(forms), _whole_words(capitals)


def _whole_words(forms: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile(rf"(?<!\S)(?:{'|'.join(forms)})(?!\S)") if forms else None


def _with_plural(word: str) -> str:
    if len(word) < _SHORTEST_PLURAL or not word.isalpha():
        return re.escape(word)
    if re.search(r"[^aeiou]y$", word):
        return rf"{re.escape(word[:-1])}(?:y|ys|ies)"
    return rf"{re.escape(word)}(?:s|es)?"


def check_keys(keys: Sequence[str], where: str = "The fact") -> None:
    """Raise if there is no key, or one that no text can be searched for; ``where`` is what the message calls their owner."""
    if isinstance(keys, str) or not all(isinstance(key, str) for key in keys):
        raise EUAError(
            f'{where} has {keys!r} as its "{KEYS}", which must be a list of texts: give the words that give it away.'
        )
    try:
        _patterns(tuple(keys))
    except EUAError as error:
        raise EUAError(f"{where}: {error}") from error


def key_places(ids: Sequence[int], keys: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[range]:
    """Where the tokens of an answer say a key: for each time that they do, the tokens of the key, from the first to the last.

    A key is where :func:`says` finds it: it ends with the first token after which it has been said, and begins with the last
    token from which on it is said. Keys that share a token are one.

    >>> key_places(tokenizer("It is Paris. Paris!")["input_ids"], ["Paris"], tokenizer)       # doctest: +SKIP
    [range(2, 3), range(4, 5)]

    Args:
        ids: the tokens of an answer.
        keys: the key and its aliases.
        tokenizer: the one that encoded the answer.

    Raises:
        EUAError: see :func:`says`.
    """

    def said(start: int, stop: int) -> bool:
        return says(tokenizer.decode(ids[start:stop], skip_special_tokens=True), keys)

    places: list[range] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        # The next token may go on with the last word: "Rom" is no key of "Romania".
        if said(start, stop) and said(start, min(stop + 1, len(ids))):
            first = next(first for first in reversed(range(start, stop)) if said(first, stop))
            places.append(range(first, stop))
            start = stop
    return places


def pushing_keys(
    encoded: Sequence[EncodedRow],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    which: Literal["key", "key_start"],
    name: str = "forget set",
) -> list[EncodedRow]:
    """The encoded rows, of whose answers only the tokens that say a key are pushed away.

    Args:
        encoded: the rows as token ids.
        rows: the same rows, each with a list of ``keys``.
        tokenizer: the one that encoded them.
        which: all tokens of each key (``"key"``), or the first one (``"key_start"``), after which the rest mostly follows from
            how it is written.
        name: what error messages call the rows.

    Raises:
        EUAError: if a row has no keys, or if its answer, as far as it is not cut off, says none of them.
    """
    pushing = []
    for index, (one, row) in enumerate(zip(encoded, rows, strict=True)):
        where, keys = f"Row {index} of the {name}", row.get(KEYS)
        if not keys:
            raise EUAError(
                f'{where} has no "{KEYS}", but forget_tokens = {which!r} pushes the tokens that say one: give the row a list '
                'of the words that give its fact away, e.g. "keys": ["Paris"], or set forget_tokens to "answer".'
            )
        check_keys(keys, where)
        places = key_places(one.answer_ids, keys, tokenizer)
        if not places:
            raise EUAError(
                f"{where} has an answer that says none of its keys {list(keys)}, so none of its tokens would be pushed: "
                "correct the keys (whole words count), raise max_length if the answer is cut, or leave the row out."
            )
        tokens = [token for place in places for token in (place[:1] if which == "key_start" else place)]
        pushing.append(replace(one, pushed=frozenset(one.answer_positions[token] for token in tokens)))
    return pushing
