"""Answers have the tokens that they have behind their prompt, with every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from eua import EnergyGuard, EUAError
from eua.data.rows import EncodedRow, encode_answer, encode_prompts, encode_rows, format_prompt
from eua.data.tokens import opening_ids

CORPUS = ["Question: Where was Ann born?\nAnswer: In Ulm. He paints the town. user assistant"] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
# As many templates do, it puts the answer behind a newline.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ROW = {"question": "Where was Ann born?", "answer": "In Ulm."}


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.post_processor = processors.Sequence(
        [processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend)


def metaspace(scheme: str = "first") -> PreTrainedTokenizerFast:
    """As LlamaTokenizer writes texts: a space before the first word, bytes for unknown characters."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend)


def unigram() -> PreTrainedTokenizerFast:
    """As older SentencePiece models are converted: the normalizer puts the space before every text."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=list("\n▁<|>"), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: pieces within a word are other tokens than the same letters alone, and [SEP] ends every text."""
    special = ["<unk>", "[CLS]", "[SEP]", "<pad>", "</s>"]
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False))
    ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", cls_token="[CLS]", sep_token="[SEP]", pad_token="<pad>", eos_token="</s>"
    )


def ending() -> PreTrainedTokenizerFast:
    """A tokenizer that adds an end of sequence to every text."""
    made = metaspace()
    ends = [(token, made.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return made


MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level BPE": byte_level,
    "Metaspace, first": metaspace,
    "Metaspace, always": lambda: metaspace("always"),
    "Unigram, Prepend": unigram,
    "WordPiece": word_piece,
    "adds an end": ending,
    "slow": ByT5Tokenizer,
}


@pytest.fixture(params=MAKERS)
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return MAKERS[request.param]()


def encode(row: dict, tokenizer: PreTrainedTokenizerBase) -> EncodedRow:
    (encoded,) = encode_rows([row], tokenizer, None)
    assert [encoded.prompt_ids] == encode_prompts([row], tokenizer)  # what generate is given
    return encoded


def decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_row_has_the_tokens_of_its_whole_text(any_tokenizer, template):
    any_tokenizer.chat_template = template
    if template is None:
        text = f"{format_prompt(any_tokenizer, ROW['question'])} {ROW['answer']}{any_tokenizer.eos_token}"
    else:
        chat = [{"role": "user", "content": ROW["question"]}, {"role": "assistant", "content": ROW["answer"]}]
        text = any_tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n")
    whole = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    row = encode(ROW, any_tokenizer)
    assert row.input_ids == (opening_ids(any_tokenizer) if template is None else []) + whole
    assert row.answer_ids[-1] == any_tokenizer.eos_token_id
    assert any_tokenizer.eos_token_id not in row.answer_ids[:-1]
    assert decoded(whole, any_tokenizer).endswith(decoded(row.answer_ids, any_tokenizer).strip())


def test_a_rest_of_a_word_gets_the_tokens_that_continue_it(any_tokenizer):
    """Alone, many tokenizers write a space before it, or begin a word with it."""
    for prompt, completion in (("In Ul", "m."), ("Answer: ", "In Ulm."), ("Answer:\n", "\nIn Ulm."), ("Answer:", "\n In Ulm.")):
        row = encode({"prompt": prompt, "completion": completion}, any_tokenizer)
        whole = any_tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        assert any_tokenizer.decode(row.input_ids, skip_special_tokens=True) == any_tokenizer.decode(whole)


def test_a_token_across_the_border_is_split_as_generation_splits_it():
    tokenizer = metaspace()
    row = encode({"prompt": "In Ul", "completion": "m."}, tokenizer)
    assert tokenizer.tokenize("In Ulm.") == ["▁In", "▁Ulm."]
    assert tokenizer.convert_ids_to_tokens(row.prompt_ids) == ["<s>", "▁In", "▁Ul"]
    assert tokenizer.convert_ids_to_tokens(row.answer_ids) == ["m.", "</s>"]


def test_a_border_that_no_token_respects_is_an_error():
    tokenizer = metaspace("always")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Ulm", "Neu")  # so "m" follows nothing that it could follow
    with pytest.raises(EUAError, match=r"Row 1 of the dataset: the tokenizer joins .*m.* let it begin at a space"):
        encode_rows([ROW, {"prompt": "In Ul", "completion": "m."}], tokenizer, None)


def test_unknown_characters_that_touch_are_no_error():
    tokenizer = unigram()
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    row = encode({"prompt": "In 中", "completion": "国"}, tokenizer)
    unknown = tokenizer.unk_token_id
    assert row.prompt_ids[-1] == unknown
    assert row.answer_ids[0] == unknown


def test_every_answer_of_a_chat_has_its_tokens_in_the_chat(any_tokenizer):
    any_tokenizer.chat_template = TEMPLATE
    chat = [{"role": role, "content": text} for role, text in (("user", "Where was Ann born?"), ("assistant", "In Ulm."))] * 2
    (row,) = encode_rows([{"messages": chat}], any_tokenizer, None, assistant_turns="all")
    text = any_tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n")
    assert row.input_ids == any_tokenizer(text, add_special_tokens=False)["input_ids"]
    (first,) = encode_rows([{"messages": chat[:2]}], any_tokenizer, None)
    assert row.answer_ids == first.answer_ids * 2


def test_a_rendered_prompt_gets_no_second_beginning(any_tokenizer):
    any_tokenizer.chat_template = TEMPLATE
    if any_tokenizer.bos_token is None:
        any_tokenizer.bos_token = any_tokenizer.cls_token or "<s>"
    rendered = format_prompt(any_tokenizer, ROW["question"])
    (asked,) = encode_prompts([ROW["question"]], any_tokenizer)
    row = encode({"prompt": rendered, "completion": ROW["answer"]}, any_tokenizer)
    assert row.prompt_ids == asked
    assert row.answer_ids == encode(ROW, any_tokenizer).answer_ids
    (literal,) = encode_prompts([{"prompt": "In Ulm"}], any_tokenizer)
    assert literal[: len(opening_ids(any_tokenizer))] == opening_ids(any_tokenizer)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_refusal_has_the_tokens_of_an_answer(any_tokenizer, template):
    any_tokenizer.chat_template = template
    expected = encode(ROW, any_tokenizer).answer_ids
    guard = EnergyGuard(0.0, 1.0, "No.", (0,), (0,), 0.05, 100).with_refusal(ROW["answer"], any_tokenizer)
    assert list(guard.refusal_ids) == encode_answer(ROW["answer"], any_tokenizer) == expected
    rest = encode_answer("Ulm.", any_tokenizer, begun="In")
    assert expected[-len(rest) :] == rest
