"""Rows of every format: their encoding, batches, and order in training."""

from __future__ import annotations

import copy
import json

import datasets
import pytest
import torch

from eua import EUAError
from eua.data.batches import ForgetRetainCollator, ForgetRetainDataset, pad_rows
from eua.data.pairing import PairedSampler
from eua.data.rows import EncodedRow, encode_prompts, encode_rows, rows_digest
from eua.data.sources import read_rows
from eua.files import write_jsonl

CHAT_TEMPLATE = """
{%- for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def test_sources_read_alike(tmp_path):
    rows = [{"question": "Who?", "answer": "Ä."}, {"question": "What?", "answer": "B."}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    assert read_rows(path) == read_rows(str(path)) == read_rows(rows) == read_rows(datasets.Dataset.from_list(rows)) == rows


def test_question_rows_and_their_prompts_share_ids(tokenizer):
    (row,) = encode_rows([{"question": "Where?", "answer": "There."}], tokenizer, None)
    assert tokenizer.decode(row.input_ids) == "Question: Where?\nAnswer: There.<eos>"
    assert encode_prompts(["Where?"], tokenizer) == [row.prompt_ids]
    assert encode_prompts([{"question": "Where?"}], tokenizer) == [row.prompt_ids]


def test_prompt_and_completion_are_literal(tokenizer):
    (row,) = encode_rows([{"prompt": "One, two,", "completion": " three"}], tokenizer, None)
    assert tokenizer.decode(row.prompt_ids) == "One, two,"
    assert tokenizer.decode(row.answer_ids) == " three<eos>"


def test_chats_use_the_template(tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT_TEMPLATE
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    forms = [
        {"messages": messages},
        {"question": "Who?", "answer": "Me."},
        {"prompt": messages[:1], "completion": messages[1:]},
    ]
    encoded = encode_rows(forms, chatty, None)
    assert encoded[0] == encoded[1] == encoded[2]
    assert chatty.decode(encoded[0].prompt_ids) == "<user>Who?<eos><assistant>"
    assert chatty.decode(encoded[0].answer_ids) == "Me.<eos>"
    chatty.chat_template = CHAT_TEMPLATE.replace("{{ eos_token }}", "{{ eos_token }}\n")  # text after the end is not trained on
    assert encode_rows(forms[:1], chatty, None)[0].answer_ids == encoded[0].answer_ids
    chatty.chat_template = "{{ messages | length }}"
    with pytest.raises(EUAError, match="differently from the prompt alone"):
        encode_rows(forms[:1], chatty, None)


def test_long_answers_are_cut_and_counted(tokenizer, caplog):
    row = {"question": "Where?", "answer": "There and " * 20}
    (whole,) = encode_rows([row], tokenizer, None)
    (cut,) = encode_rows([row], tokenizer, whole.prompt_length + 3)
    assert cut.input_ids == whole.input_ids[: whole.prompt_length + 3]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "The forget set is empty"),
        ([{"question": "Who?", "answer": "  "}], "Row 0 of the forget set has no answer"),
        ([{"question": "Who?", "answer": "I."}, {"question": "Who?"}], "Row 1 of the forget set has no answer"),
        ([{"messages": [{"role": "user", "content": "Hi"}]}], "Row 0 of the forget set has no answer"),
        ([{"prompt": "Hi"}], "Row 0 of the forget set has no answer"),
        ([{"text": "Hi"}], r"has the keys \['text'\], which are not a known format"),
        ([{"question": "Who? " * 40, "answer": "I."}], "max_length = 32 cuts its answer off"),
        ([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}], "no chat template"),
        ([{"question": 5, "answer": "I."}], 'has 5 as its "question", which must be a text'),
        ([{"messages": None}], r"has the keys \[\], which are not a known format"),
        ([{"messages": "Hi"}], "has 'Hi' as its \"messages\", which must be a list of"),
        ([{"messages": ["x"]}], 'which must be a list of {"role", "content"} messages'),
        ([{"prompt": "a", "completion": ["b"]}], 'as its "completion", which must be a text'),
        ([{"question": "Who?", "answer": "<pad><pad>"}], "The answer of row 0 of the forget set has no tokens but padding"),
        ([{"question": "Who? \ud83d", "answer": "I."}], r"Row 0 of the forget set has '\\ud83d' in its \"question\", half"),
        ([{"prompt": "Who?", "completion": "\udc00"}], r"Row 0 .* has '\\udc00' in its \"completion\", half a surrogate pair"),
        (["Who?"], "Row 0 of the forget set is a str, not a mapping"),
        ("missing.jsonl", "missing.jsonl is not a file"),
    ],
)
def test_errors_say_what_is_wrong_with_a_row(rows, text, tokenizer):
    with pytest.raises(EUAError, match=text):
        encode_rows(read_rows(rows, "forget set"), tokenizer, 32, "forget set")


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        (["Who?", "Who? \ud83d"], r"Row 1 of the prompts has '\\ud83d' in its \"question\", half a surrogate pair"),
        (["Who?", {"prompt": "<pad><pad>"}], "Row 1 of the prompts has no tokens but padding"),
        (["Who?", {"prompt": ""}], "Row 1 of the prompts is empty"),
    ],
)
def test_errors_say_what_is_wrong_with_a_prompt(prompts, text, tokenizer):
    with pytest.raises(EUAError, match=text):
        encode_prompts(prompts, tokenizer)


@pytest.mark.parametrize("turns", ["last", "all"])
def test_a_template_that_does_not_take_a_chat_is_an_error_of_its_row(turns, tokenizer):
    chatty = copy.deepcopy(tokenizer)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role.') }}{% endif %}"
    rows = [
        {"question": "Who?", "answer": "Me."},
        {"messages": [{"role": role, "content": "Hi"} for role in ("system", "user", "assistant")]},
    ]
    text = r"cannot be written by the tokenizer's chat template \(No system role\): change the roles"
    for template in (refusing + CHAT_TEMPLATE, {"default": refusing + CHAT_TEMPLATE, "rag": "{{ messages[0].content }}"}):
        chatty.chat_template = template
        with pytest.raises(EUAError, match=f"Row 1 of the forget set {text}"):
            encode_rows(rows, chatty, None, "forget set", turns)
        with pytest.raises(EUAError, match=f"Row 1 of the prompts {text}"):
            encode_prompts(rows, chatty)
    chatty.chat_template = {"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}  # none of them is the default
    with pytest.raises(EUAError, match="Row 0 of the forget set cannot be written by the tokenizer's chat template"):
        encode_rows(rows, chatty, None, "forget set", turns)


def test_unusual_line_ends_inside_strings_survive(tmp_path):
    rows = [{"question": "Line\u2028break\x85?", "answer": "Ä"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    (tmp_path / "latin.jsonl").write_bytes('{"question": "Ä"}'.encode("latin-1"))
    with pytest.raises(EUAError, match="is not UTF-8 text"):
        read_rows(tmp_path / "latin.jsonl")


def test_malformed_jsonl_names_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Who?", "answer": "I."}\n{oops\n')
    with pytest.raises(EUAError, match="Line 2 of the dataset .* is not JSON"):
        read_rows(path)


def test_padding_masks_what_is_not_an_answer():
    batch = pad_rows([EncodedRow([5, 6, 7, 8], 2), EncodedRow([9, 4], 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 4, -100, -100]]


def test_a_batch_contains_both_kinds_with_their_boundaries():
    forget, retain = [EncodedRow([5, 6, 7], 1)], [EncodedRow([1, 2], 1), EncodedRow([3, 4, 5, 6], 3)]
    boundaries = {"forget": [torch.tensor([-1.0, -2.0])], "retain": [torch.tensor([-3.0]), torch.tensor([-4.0])]}
    dataset = ForgetRetainDataset({"forget": forget, "retain": retain}, boundaries)
    batch = ForgetRetainCollator()([dataset[0, (1, 0)]])
    assert batch["forget"].tolist() == [[True] * 4, [False] * 4, [False] * 4]
    assert batch["reference"].tolist() == [[0, -1, -2, 0], [0, 0, 0, -4], [0, -3, 0, 0]]

    flat = ForgetRetainCollator(padding_free=True)([dataset[0, (1, 0)]])
    for tensor in (*batch.values(), *flat.values()):
        assert tensor.is_contiguous()  # memory that several entries share cannot be pinned for a GPU
    assert {name: tensor.tolist() for name, tensor in flat.items()} == {
        "input_ids": [[5, 6, 7, 3, 4, 5, 6, 1, 2]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3, 0, 1]],
        "labels": [[-100, 6, 7, -100, -100, -100, 6, -100, 2]],
        "reference": [[0, -1, -2, 0, 0, 0, -4, 0, -3]],
        "forget": [[True] * 3 + [False] * 6],
        "alternative": [[False] * 9],
        "pushed": [[True] * 9],
        "row": [[0] * 3 + [1] * 4 + [2] * 2],
    }


def test_pairs_are_seeded_and_visit_all_alike():
    sampler = PairedSampler([1] * 5, [1] * 7, ratio=2, seed=1)
    epochs = []
    for epoch in range(7):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert epochs[-1] == list(sampler)
        assert sorted(forget for forget, *_ in epochs[-1]) == list(range(5))
    assert epochs[0] != epochs[1]
    visits = [index for epoch in epochs for _, retain, _ in epoch for index in retain]
    assert [visits.count(i) for i in range(7)] == [10] * 7
    assert epochs[0] != list(PairedSampler([1] * 5, [1] * 7, ratio=2, seed=2))


def test_rows_of_similar_length_share_a_batch():
    generator = torch.Generator().manual_seed(0)
    lengths = [torch.randint(5, 100, (size,), generator=generator).tolist() for size in (50, 70)]
    samplers = {group: PairedSampler(*lengths, ratio=2, seed=1, group=group) for group in (0, 4)}

    def padding(sampler: PairedSampler) -> float:
        """The share of padding in an epoch, in batches of four forget rows."""
        pairs, tokens, places = list(sampler), 0, 0
        for start in range(0, len(pairs), 4):
            batch = pairs[start : start + 4]
            of_rows = [lengths[0][f] for f, *_ in batch] + [lengths[1][r] for _, retain, _ in batch for r in retain]
            tokens, places = tokens + sum(of_rows), places + len(of_rows) * max(of_rows)
        return 1 - tokens / places

    assert padding(samplers[4]) < 0.6 * padding(samplers[0])
    for epoch in range(3):
        for sampler in samplers.values():
            sampler.set_epoch(epoch)
        plain, grouped = (list(sampler) for sampler in samplers.values())
        assert grouped == list(samplers[4])
        assert grouped != plain
        for rows in ([[forget] for forget, *_ in pairs] for pairs in (plain, grouped)):
            assert sorted(rows) == [[i] for i in range(50)]
        assert sorted(r for _, retain, _ in plain for r in retain) == sorted(r for _, retain, _ in grouped for r in retain)
        # Long rows do not always come first.
        longest = [max(lengths[0][f] for f, *_ in grouped[start : start + 4]) for start in range(0, 48, 4)]
        assert longest != sorted(longest, reverse=True)


# ---- as OpenUnlearning encodes rows ----------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def test_labels_to_the_end_of_the_template(tokenizer):
    """What the template writes behind the answer counts, and an end of sequence unless the template ends with one."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML
    row = {"question": "Who?", "answer": "Ann."}
    (short,) = encode_rows([row], tokenizer, None)
    (long,) = encode_rows([row], tokenizer, None, labels="template")
    assert tokenizer.decode(short.answer_ids) == "Ann.<eos>"
    assert tokenizer.decode(long.answer_ids) == "Ann.<eos>\n<eos>"
    assert long.prompt_ids == short.prompt_ids
    tokenizer.chat_template = CHATML.replace("<eos>\n", "<eos>")
    (ended,) = encode_rows([row], tokenizer, None, labels="template")
    assert tokenizer.decode(ended.answer_ids) == "Ann.<eos>"


def test_a_hidden_token_is_masked_wherever_it_stands(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML
    row = {"question": "Who?", "answer": "Ann."}
    (plain,) = encode_rows([row], tokenizer, None)
    (hiding,) = encode_rows([row], tokenizer, None, hide=tokenizer.eos_token_id)
    assert hiding.input_ids == plain.input_ids
    mask = pad_rows([hiding])["attention_mask"][0]
    assert mask.tolist() == [int(token != tokenizer.eos_token_id) for token in plain.input_ids]
    assert 0 < int((mask == 0).sum()) < len(plain.input_ids)
    assert pad_rows([plain])["attention_mask"].all()
    assert rows_digest([hiding]) != rows_digest([plain])
