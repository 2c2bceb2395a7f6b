"""Tests of the limit of prompts: what is refused unread would have been too long, and little is read to know."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eua.serving.engine import Engine
from eua.serving.prompt_limit import PART, PromptLimit
from eua.serving.protocol import RequestError
from tests.conftest import tiny_llama

CORPUS = ["Who is Ann? Where was Ann born?  Ann was born in Ulm.\n\n", "nnnnnnnn        nnnnnnnn", "éé é"] * 9


def trained(
    model: models.Model, trainer: type, normalizer=None, splitter=None, special=(), **settings
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if splitter:
        tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator(CORPUS, trainer(special_tokens=["<unk>", *special], show_progress=False, **settings))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def byte_level(normalizer=None) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(models.BPE(), trainers.BpeTrainer, normalizer, splitter, vocab_size=300, initial_alphabet=alphabet)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Phi 3's: without splitting into words, with bytes, and with a token that swallows the spaces behind it."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    numbers = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = trained(model, trainers.BpeTrainer, spaces, pre_tokenizers.Metaspace(), numbers, vocab_size=330)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("\n\n\n\n", "isolated")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|user|>", rstrip=True, lstrip=True)]})
    return tokenizer


def characters() -> PreTrainedTokenizerFast:
    """Unknown characters in a row are one token."""
    return trained(models.BPE(unk_token="<unk>", fuse_unk=True), trainers.BpeTrainer, vocab_size=60)


def words() -> PreTrainedTokenizerFast:
    """Words of any length are one token."""
    return trained(
        models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer, None, pre_tokenizers.Whitespace(), vocab_size=60
    )


TOKENIZERS = {
    "bytes": byte_level(),
    "changed bytes": byte_level(normalizers.Sequence([normalizers.NFC(), normalizers.Replace("#", "")])),
    "sentencepiece": sentencepiece(),
    "characters": characters(),
    "words": words(),
}
PARTS = ["Ann", "Who is Ann? ", " ", "n", "born in Ulm.", "\n", "▁", "<|user|>", "#", "щ щ "]
PARTS += ["❄", "e\u0301", "\u1f82", "é", "\U0010fffd"]
COUNTED = st.tuples(st.sampled_from(PARTS), st.integers(1, 9000))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(parts=st.lists(COUNTED, min_size=1, max_size=5), most=st.integers(1, 6000))
def test_a_prompt_that_fits_is_never_refused(name, parts, most):
    tokenizer = TOKENIZERS[name]
    text = "".join(part * count for part, count in parts)[:60_000]
    if PromptLimit(tokenizer, most).is_exceeded(text):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) > most


DROPPED = {"changed bytes": "#" * 50_000, "sentencepiece": ("<|user|>" + " " * 50_000) * 2}


@pytest.mark.parametrize(("name", "text"), DROPPED.items())
def test_characters_that_the_tokenizer_drops_do_not_count(name, text):
    assert len(TOKENIZERS[name](text + "Ann")["input_ids"]) < 9
    assert not PromptLimit(TOKENIZERS[name], 9).is_exceeded(text + "Ann")


@pytest.mark.parametrize("name", ["bytes", "changed bytes", "sentencepiece"])
@pytest.mark.parametrize("text", ["Who is Ann? " * 90_000, "n" * 2**20], ids=["words", "a word"])
def test_little_of_a_long_prompt_is_read(name, text, monkeypatch):
    limit, read = PromptLimit(TOKENIZERS[name], 1000), []
    count = limit._count
    monkeypatch.setattr(limit, "_count", lambda part: read.append(len(part)) or count(part))
    assert limit.is_exceeded(text)
    assert sum(read) <= 2 * PART
    assert not PromptLimit(TOKENIZERS[name], None).is_exceeded(text)


@pytest.mark.parametrize("name", ["characters", "words"])
def test_tokenizers_that_lose_characters_have_to_read_everything(name):
    assert not PromptLimit(TOKENIZERS[name], 10).is_exceeded("щщ " * 30_000)


def test_an_oversized_prompt_is_refused_at_once(tokenizer):
    engine = Engine(tiny_llama(len(tokenizer)), tokenizer, None)
    try:
        for content in ("why " * 250_000, "n" * 1_000_000, "❄" * 300_000):
            start = time.monotonic()
            with pytest.raises(
                RequestError, match="The prompt has more than 128 tokens, but at most 128 are accepted: shorten it"
            ):
                engine.encode([{"role": "user", "content": content}], None)
            assert time.monotonic() - start < 0.3
    finally:
        engine.close()
