"""Tests of keys and of the tokens that say them: hypothesis checks that exactly these tokens are needed to say a key."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from eua.data.keys import check_keys, key_places, says
from eua.demo.target import train_tokenizer
from eua.errors import EUAError

WORDS = [
    "the",
    "New",
    "York",
    "Rome",
    "Romeo",
    "is",
    ".",
    "of",
    "in",
    "Paris",
    "Paris's",
    "cities",
    "city",
    "1,000",
    "Brasília",
]
ROWS = [{"question": " ".join(WORDS), "answer": "Rome, New York, Paris"}]
TOKENIZER, OF_LETTERS = train_tokenizer(ROWS, 300), train_tokenizer(ROWS, 259)
KEYS = [["Rome"], ["New York"], ["Paris", "the city"], ["York", "New York City"], ["Brasilia"], ["1000"]]


@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join),
    st.sampled_from(KEYS),
    st.sampled_from([TOKENIZER, OF_LETTERS]),
)
@example("Rome Rome", ["Rome"], TOKENIZER)
@example("Romeo", ["Rome"], OF_LETTERS)
def test_the_tokens_of_a_key_and_no_fewer_say_it(text: str, keys: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(text)["input_ids"]
    places = key_places(ids, keys, tokenizer)

    assert bool(places) == says(tokenizer.decode(ids), keys)
    assert all(one.stop <= other.start for one, other in zip(places, places[1:], strict=False))
    for place in places:
        assert says(tokenizer.decode(ids[place.start : place.stop]), keys)
        assert not says(tokenizer.decode(ids[place.start + 1 : place.stop]), keys)
        assert not says(tokenizer.decode(ids[place.start : place.stop - 1]), keys)
    if len(places) == 1:  # what is left of several may join up to a key
        assert not says(tokenizer.decode(ids[: places[0].start]), keys)
        assert not says(tokenizer.decode(ids[places[0].stop :]), keys)


def test_every_place_where_a_key_is_said_is_found() -> None:
    ids = TOKENIZER("Rome is old. It is Rome.")["input_ids"]

    places = key_places(ids, ["Rome"], TOKENIZER)

    assert [TOKENIZER.decode(ids[place.start : place.stop]).strip() for place in places] == ["Rome", "Rome"]


@pytest.mark.parametrize("keys", ["Rome", [], ["."], [3]])
def test_keys_that_cannot_be_looked_for_are_refused(keys: list[str]) -> None:
    with pytest.raises(EUAError, match="the words that give"):
        check_keys(keys)
