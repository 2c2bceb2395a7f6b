"""Chats in which every message of the assistant counts: the tokens that count, and the losses from them."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from eua import EUAConfig, EUAError, EUATrainer
from eua.data.batches import ForgetRetainCollator, ForgetRetainDataset
from eua.data.rows import EncodedRow, encode_prompts, encode_rows
from eua.guard.scores import prompt_scores
from eua.statistics import auroc
from eua.training.boundaries import compute_boundaries, fingerprint
from tests.conftest import tiny_llama
from tests.methods.test_d2 import transcription

START, END = "<|im_start|>", "<|im_end|>"
WORDS = """
system user assistant tool note user: bot: Be kind. Hi Hello Who? Ann. Where? Here. and there <think> hm </think>
"""

# Written with expressions alone: a newline after a block tag would be dropped.
HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
TURN = HEADER + "{{ m.content + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def template(answer: str) -> str:
    """A ChatML template that writes ``answer`` for messages of the assistant."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + answer + "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
    )


def marked(text: str) -> str:
    return "{% generation %}" + text + "{%- endgeneration %}"


BODY = "{{ m.content + '<|im_end|>\n' }}"
STRIPPED_BODY = "{{ (m.content if loop.last else m.content.split('</think> ')[-1]) + '<|im_end|>\n' }}"
PLAIN = template(TURN)
MARKED = template(HEADER + marked(BODY))
MARKED_WITH_HEADER = template(marked(HEADER + BODY))
STRIPPING = template(HEADER + STRIPPED_BODY)
STRIPPING_MARKED = template(HEADER + marked(STRIPPED_BODY))
HIDDEN = [  # markers in blocks, where transformers mistakes their place
    "{% macro turn(m) %}" + HEADER + marked(BODY) + "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}" + ASK,
    template("{%- set text -%}" + HEADER + marked(BODY) + "{% endset %}{{ text }}"),
    template("{% filter trim %}" + HEADER + marked(BODY) + "{% endfilter %}{{ '\n' }}"),
]
MARKED_TEXT_ONLY = template(HEADER + marked("{{ m.content }}") + "{{ '<|im_end|>\n' }}")


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A tokenizer for which every word, space and newline is a token, so that masks can be written by hand."""
    vocabulary = ["<unk>", START, END, "\n", " ", *WORDS.split()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token=END, additional_special_tokens=[START], chat_template=PLAIN
    )


def chat(*messages: str) -> list[dict[str, str]]:
    """``"user: Hi"`` → ``{"role": "user", "content": "Hi"}``"""
    return [dict(zip(("role", "content"), message.split(": ", 1), strict=True)) for message in messages]


def shown(row: EncodedRow, tokenizer: PreTrainedTokenizerFast) -> str:
    """Tokens, separated by spaces; ⏎ and _ are newline and space, and * marks tokens that count."""
    tokens = [{"\n": "⏎", " ": "_"}.get(token, token) for token in tokenizer.convert_ids_to_tokens(row.input_ids)]
    tokens = [("*" if p in row.answer_positions else "") + token for p, token in enumerate(tokens)]
    return " ".join(tokens).replace(START, "<").replace(END, ">")


def encode(row: dict, tokenizer: PreTrainedTokenizerFast, max_length: int | None = None, turns: str = "all") -> EncodedRow:
    (encoded,) = encode_rows([row], tokenizer, max_length, assistant_turns=turns)
    return encoded


TALK = chat("system: Be kind.", "user: Who?", "assistant: Ann. and", "user: Where?", "assistant: Here.")
SHOWN = (
    "< system ⏎ Be _ kind. > ⏎ < user ⏎ Who? > ⏎ < assistant ⏎ *Ann. *_ *and *> ⏎ < user ⏎ Where? > ⏎ < assistant ⏎ *Here. *>"
)


@pytest.mark.parametrize("form", [PLAIN, MARKED, MARKED_WITH_HEADER, STRIPPING_MARKED])
def test_every_turn_counts_up_to_its_end(words, form):
    words.chat_template = form
    row = encode({"messages": TALK}, words)
    assert shown(row, words) == SHOWN
    assert row.input_ids == words(words.apply_chat_template(TALK, tokenize=False).rstrip())["input_ids"]
    assert [row.prompt_ids] == encode_prompts([{"messages": TALK[:2]}], words)
    assert words.convert_ids_to_tokens(row.answer_ids) == ["Ann.", " ", "and", END, "Here.", END]
    assert shown(encode({"messages": TALK}, words, turns="last"), words) == SHOWN.replace("*Ann. *_ *and *>", "Ann. _ and >")


@pytest.mark.parametrize("form", [PLAIN, MARKED])
def test_rows_of_any_form_are_read_alike(words, form):
    words.chat_template = form
    parts = [{"prompt": TALK[:cut], "completion": TALK[cut:]} for cut in (2, 3, 4)]
    assert [encode(row, words) for row in parts] == [encode({"messages": TALK}, words)] * 3
    for row in ({"messages": TALK[1:3]}, {"question": "Who?", "answer": "Ann."}, {"prompt": "Who?", "completion": " Ann."}):
        assert encode(row, words) == encode(row, words, turns="last")


@pytest.mark.parametrize("form", [PLAIN, MARKED])
def test_other_roles_and_a_start_without_system_pass_through(words, form):
    words.chat_template = form
    talk = chat("user: Who?", "assistant: hm", "tool: Ann.", "assistant: Ann.", "note: Be", "user: Hi", "assistant: Hello")
    assert shown(encode({"messages": talk}, words), words) == (
        "< user ⏎ Who? > ⏎ < assistant ⏎ *hm *> ⏎ < tool ⏎ Ann. > ⏎ < assistant ⏎ *Ann. *> "
        "⏎ < note ⏎ Be > ⏎ < user ⏎ Hi > ⏎ < assistant ⏎ *Hello *>"
    )


@pytest.mark.parametrize("form", [PLAIN, MARKED])
def test_an_answer_may_begin_as_its_header_does_and_keys_may_be_none(words, form):
    words.chat_template = form.replace("m.role +", "m.role + (' ' + m.name if m.name is defined else '') +")
    talk = [message | {"name": None} for message in chat("user: Who?", f"assistant: {START}assistant\nHi")]
    expected = "< user ⏎ Who? > ⏎ < assistant ⏎ *< *assistant *⏎ *Hi *>"
    assert shown(encode({"messages": talk}, words), words) == expected


THOUGHTS = chat("user: Who?", "assistant: <think> hm </think> Ann.", "user: Where?", "assistant: <think> hm </think> Here.")


def test_a_template_that_rewrites_earlier_turns_has_to_mark_them(words):
    words.chat_template = STRIPPING
    with pytest.raises(
        EUAError, match=r"up to message 3 the chat template .* changes earlier messages, .* marks them with \{% gen"
    ):
        encode({"messages": THOUGHTS}, words)
    last = encode({"messages": THOUGHTS}, words, turns="last")
    words.chat_template = STRIPPING_MARKED
    row = encode({"messages": THOUGHTS}, words)
    assert shown(row, words) == (
        "< user ⏎ Who? > ⏎ < assistant ⏎ *Ann. *> ⏎ < user ⏎ Where? > ⏎ < assistant ⏎ *<think> *_ *hm *_ *</think> *_ *Here. *>"
    )
    assert row.input_ids == last.input_ids


def test_what_a_template_leaves_unmarked_does_not_count(words):
    words.chat_template = MARKED_TEXT_ONLY
    expected = "< user ⏎ Who? > ⏎ < assistant ⏎ *Ann. > ⏎ < user ⏎ Where? > ⏎ < assistant ⏎ *Here."
    talk = chat("user: Who?", "assistant: Ann.", "user: Where?", "assistant: Here.")
    assert shown(encode({"messages": talk}, words), words) == expected
    words.chat_template = MARKED.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
        "{%- endgeneration %}", "{%- endgeneration %}{% else %}" + BODY + "{% endif %}"
    )
    assert encode({"messages": TALK}, words) == encode({"messages": TALK}, words, turns="last")


@pytest.mark.parametrize("edge", [" Ann.", "Ann. "])
def test_spaces_at_the_edge_of_an_answer_shift_no_other_token(words, edge):
    """If they belong to no token, a mask made from tokens loses later answers, or includes the prompts between answers."""
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.chat_template = MARKED_TEXT_ONLY
    talk = chat("user: Who?", f"assistant: {edge}", "user: Where?", "assistant: Here.")
    expected = "< user Who? > < assistant *Ann. > < user Where? > < assistant *Here."
    assert shown(encode({"messages": talk}, words), words) == expected


def test_a_template_without_an_end_of_turn_appends_and_counts_all(words):
    words.chat_template = (
        "{% for m in messages %}{{ ('bot: ' if m.role == 'assistant' else 'user: ') + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'bot: ' }}{% endif %}"
    )
    talk = chat("user: Who?", "assistant: Ann.", "user: Hi", "assistant: Hello")
    assert shown(encode({"messages": talk}, words), words) == "user: _ Who? ⏎ bot: _ *Ann. *⏎ user: _ Hi ⏎ bot: _ *Hello *⏎"


@pytest.mark.parametrize("form", [PLAIN, MARKED])
def test_rows_that_are_cut_keep_what_fits(words, form, caplog):
    words.chat_template = form
    row, tokens = {"messages": TALK}, SHOWN.split()
    first, end, second = tokens.index("*Ann."), tokens.index("*>"), tokens.index("*Here.")
    assert shown(encode(row, words, len(tokens)), words) == SHOWN
    assert shown(encode(row, words, second + 1), words).split() == tokens[: second + 1]
    for length in range(end + 1, second + 1):  # a second prompt without its answer is dropped
        assert shown(encode(row, words, length), words).split() == tokens[: end + 1]
    assert shown(encode(row, words, first + 1), words).split() == tokens[: first + 1]
    with pytest.raises(EUAError, match=f"a prompt of {first} tokens, so max_length = {first} cuts its answer off"):
        encode(row, words, first)


@pytest.mark.parametrize(
    ("form", "row", "text"),
    [
        (PLAIN, {"messages": chat("assistant: Hi", "user: Who?", "assistant: Ann.")}, "begins with the assistant's message"),
        (MARKED, {"messages": chat("assistant: Hi", "user: Who?", "assistant: Ann.")}, "begins with the assistant's message"),
        (PLAIN, {"messages": chat("assistant: Hi")}, "a chat without a message before its answer"),
        (PLAIN, {"messages": chat("user: Hi", "assistant: Hi", "user: Who?")}, "Row 0 of the dataset has no answer"),
        (PLAIN, {"prompt": chat("user: Hi"), "completion": chat("bot: Hi")}, "whose role is 'bot', so its last answer"),
        (MARKED.replace("'assistant'", "'bot'"), {"messages": TALK}, "markers, but marks nothing in this chat, so no token"),
        (
            MARKED.replace("assistant\n", "assistant\n<think>\n"),
            {"messages": TALK},
            r"marker begins the first answer after .*assistant\\n', but `generate` gets a prompt that ends with .*<think>",
        ),
        *((form, {"messages": TALK}, "inside a macro, call, filter or set block, where its place .*: move") for form in HIDDEN),
        (PLAIN, {"prompt": "", "completion": "Hi"}, "has an empty prompt, so nothing predicts the answer's first token"),
        (PLAIN.replace("{{ '<|im_start|>' + m.role + '\n' }}", ""), {"messages": TALK}, "up to message 2 the chat template"),
    ],
)
def test_errors_say_why_a_chat_cannot_be_read(words, form, row, text):
    words.chat_template = form
    with pytest.raises(EUAError, match=text):
        encode(row, words)


@pytest.mark.parametrize(
    "head", ["{% set n = 1 %}", "{% macro shout(m) %}{{ m.content | upper }}{% endmacro %}{% set a %}b{% endset %}"]
)
def test_macros_next_to_the_markers_do_no_harm(words, head):
    words.chat_template = head + MARKED
    assert shown(encode({"messages": TALK}, words), words) == SHOWN


def test_the_last_turn_of_a_chat_has_the_ids_it_always_had(tokenizer):
    chatty = copy.deepcopy(tokenizer)
    end = chatty.eos_token
    for after in ("", "\n", "\n\nand so on"):
        chatty.chat_template = PLAIN.replace(END + "\\n", end + after).replace(END + "\n", end + after)
        for talk in (TALK[1:3], TALK):
            before = chatty.apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True)
            prompt = chatty(before, add_special_tokens=False)["input_ids"]
            answer = chatty(talk[-1]["content"] + end, add_special_tokens=False)["input_ids"]
            assert encode({"messages": talk}, chatty, turns="last") == EncodedRow(prompt + answer, len(prompt))


def test_a_batch_has_labels_and_boundaries_where_tokens_count():
    rows = [EncodedRow([5, 6, 7, 8, 9], 1, frozenset({2, 3})), EncodedRow([1, 2], 1)]
    dataset = ForgetRetainDataset(
        {"forget": rows[:1], "retain": rows[1:]},
        {"forget": [torch.tensor([-1.0, -2.0])], "retain": [torch.tensor([-3.0])]},
    )
    batch = ForgetRetainCollator()([dataset[0, (0,)]])
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 9], [-100, 2, -100, -100, -100]]
    assert batch["reference"].tolist() == [[0, -1, 0, 0, -2], [0, -3, 0, 0, 0]]


def test_boundaries_belong_to_positions(model):
    ids = [5, 6, 7, 8, 9]
    rows = [EncodedRow(ids, 1), EncodedRow(ids, 1, frozenset({3})), EncodedRow(ids, 1, frozenset({2})), EncodedRow(ids, 3)]
    assert len({fingerprint(model, {"forget": [row]}, {}) for row in rows}) == len(rows)
    settings = {"fraction": 0.1, "temperature": 1.0, "fill": "zero"}
    (whole,) = compute_boundaries(model, rows[:1], "forget", **settings)
    (part,) = compute_boundaries(model, rows[1:2], "forget", **settings)
    torch.testing.assert_close(part, whole[[0, 1, 3]])


@pytest.mark.parametrize("form", [PLAIN, MARKED])
def test_step_and_evaluation_are_the_method_at_every_turn(words, form, tmp_path):
    """The losses equal method.md on logits of the model and of a reference, taken before each token of an answer."""
    words.chat_template = form
    forget = [{"messages": TALK}, {"messages": THOUGHTS}, {"question": "Who?", "answer": "Ann. and Ann."}]
    retain = [
        {"messages": chat("user: Hi", "assistant: Hello", *["user: Where?", "assistant: Here. and there"] * n)} for n in (2, 0)
    ]
    model = tiny_llama(len(words))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4  # the logits of a new model are nearly flat, whatever its layers do
    settings = {"rho": 0.2, "temperature": 2.0, "gamma": 0.2, "alpha": 0.5, "per_device_eval_batch_size": 2}
    arguments = EUAConfig(
        output_dir=str(tmp_path), assistant_turns="all", report_to="none", use_cpu=True, disable_tqdm=True, **settings
    )
    sets = {"forget_dataset": forget, "retain_dataset": retain, "eval_forget_dataset": forget, "eval_retain_dataset": retain}
    trainer = EUATrainer(model, arguments, processing_class=words, **sets)
    assert shown(trainer.encoded_rows["forget"][0], words) == shown(trainer.encoded_rows["eval_forget"][0], words) == SHOWN
    boundaries = trainer._find_boundaries(resuming=False)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)

    def states_of(which: LlamaForCausalLM, row: EncodedRow, tokens: list[str]) -> torch.Tensor:
        before = torch.tensor([place - 1 for place, token in enumerate(tokens) if token.startswith("*")])
        return which(torch.tensor([row.input_ids])).logits[0, before].double().detach()

    items, logits, ref_logits, targets, is_forget, prompts = [], [], [], [], [], {}
    for kind in ("forget", "retain"):
        encoded = trainer.encoded_rows[kind]
        prompts[kind] = [row.prompt_ids for row in encoded]
        for row, boundary in zip(encoded, boundaries[kind], strict=True):
            items.append({"row": row, "reference": boundary, "kind": kind})
            tokens = shown(row, words).split()
            logits.append(states_of(model, row, tokens))
            ref_logits.append(states_of(reference, row, tokens))
            counted = [i for i, token in zip(row.input_ids, tokens, strict=True) if token.startswith("*")]
            targets += counted
            is_forget += [kind == "forget"] * len(counted)
    expected = transcription(
        torch.cat(logits), torch.cat(ref_logits), torch.tensor(targets), torch.tensor(is_forget), 0.2, 2.0, 0.2, 0.5
    )
    found = trainer.compute_loss(model, trainer.data_collator([items]))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    scores = {kind: prompt_scores(model, of_kind, temperature=2.0) for kind, of_kind in prompts.items()}
    assert metrics["eval_auroc"] == auroc(scores["forget"], scores["retain"])


def test_only_known_ways_to_count_turns_are_taken(tmp_path):
    with pytest.raises(EUAError, match='assistant_turns = \'some\' cannot be used: known are "last" and "all"'):
        EUAConfig(output_dir=str(tmp_path), assistant_turns="some")
