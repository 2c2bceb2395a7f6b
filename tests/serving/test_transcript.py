"""Tests of streaming text: joined pieces equal the whole text for every kind of tokenizer, at a constant cost per token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel, WordPiece
from transformers import PreTrainedTokenizerFast

from eua.serving.transcript import Transcript


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are ▁, the first one is not shown, and characters that are not in the vocabulary are bytes."""
    texts = ["<unk>", "▁", "▁do", "▁n", "'t", "a", "❄", "\n", "."]
    vocabulary = {text: place for place, text in enumerate([*texts, *(f"<0x{byte:02X}>" for byte in range(256))])}
    model = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    first = decoders.Strip(" ", 1, 0)
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), first])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token=AddedToken("</s>", special=True))


def wordpiece() -> PreTrainedTokenizerFast:
    texts = ["[UNK]", "do", "n", "##n", "##ot", "'", "t", ".", "❄"]
    model = Tokenizer(WordPiece({text: place for place, text in enumerate(texts)}, unk_token="[UNK]"))
    model.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", sep_token="[SEP]")


def byte_level() -> PreTrainedTokenizerFast:
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġdo", "ĠĠ", "ðŁ", "âĿĦ", "ï¿½"]
    model = Tokenizer(BPE({text: place for place, text in enumerate(texts)}, []))
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")


TOKENIZERS = {make.__name__: make() for make in (sentencepiece, wordpiece, byte_level)}


def pieces_of(transcript: Transcript, ids: Sequence[int]) -> list[str]:
    pieces = []
    for count in range(1, len(ids) + 1):
        pieces.append(transcript.piece(ids[:count], final=count == len(ids)))
        if transcript.stopped:
            break
    return pieces


def whole(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text[: min((text.find(end) for end in stop if end in text), default=None)].strip()


def answers(tokenizer: PreTrainedTokenizerFast) -> st.SearchStrategy[list[int]]:
    """Answers of a few tokens: long runs of bytes, of spaces, of invalid characters."""
    few = st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=6)
    return few.flatmap(lambda ids: st.lists(st.sampled_from(ids), min_size=1, max_size=90)).filter(bool)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_joined_pieces_equal_the_whole_text(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(answers(tokenizer))
    assert "".join(pieces_of(Transcript(tokenizer), ids)) == whole(tokenizer, ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_a_stop_text_ends_a_stream_where_it_ends_the_whole_text(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(answers(tokenizer))
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    start, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(1, 6))
    stop = [text[start : start + length].replace("\ufffd", "") or "x"]
    transcript = Transcript(tokenizer, stop)
    assert "".join(pieces_of(transcript, ids)) == whole(tokenizer, ids, stop)
    assert transcript.stopped == any(end in text for end in stop)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("byte_level", "H Ġdo Ġdo âĿĦ ĠĠ"),
        ("byte_level", "ð"),  # the first byte of a character that is never complete
        ("byte_level", "<eos>"),
        ("sentencepiece", "▁do ▁n 't ▁ ❄"),
        ("sentencepiece", "<0xE2> <0x9D> <0x84>"),  # one run of bytes, of which any byte may still be invalid
        ("sentencepiece", "</s> ▁"),
        ("wordpiece", "do ##n ' t ."),
    ],
)
def test_the_cost_of_a_token_does_not_grow_with_the_answer(name, pattern, monkeypatch):
    tokenizer = TOKENIZERS[name]
    period = tokenizer.convert_tokens_to_ids(pattern.split())
    decoded = [0]
    decode = PreTrainedTokenizerFast.decode

    def counting(self, ids, **kwargs):
        decoded[0] += len(ids)
        return decode(self, ids, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", counting)

    def cost(length: int) -> int:
        ids, transcript = (period * length)[:length], Transcript(tokenizer)
        before, texts = decoded[0], []
        for count in range(1, length + 1):
            texts.append(transcript.piece(ids[:count], final=count == length))
        spent = decoded[0] - before
        assert "".join(texts) == whole(tokenizer, ids)
        return spent

    assert cost(2000) <= 2.2 * cost(1000) + 1000
    assert cost(2000) <= 100 * 2000


def test_spaces_that_were_shown_are_not_cleaned_up():
    words = Tokenizer(WordLevel({"▁do": 0, "▁n": 1, "'t": 2, "<unk>": 3}, unk_token="<unk>"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", clean_up_tokenization_spaces=True)
    assert pieces_of(Transcript(tokenizer), [0, 1, 2]) == ["do", " n", "'t"]
