"""The depth of unlearning: 0 for the model before unlearning, 1 for the retain model, and changes that are their definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from eua import EUAError
from eua.data.rows import EncodedRow
from eua.evaluation.depth import encode_entities, output_hooks, patching_changes, unlearning_depth_score, unlearning_depths
from eua.model.forward import blocks_of
from tests.conftest import tiny_llama


def split_rows(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Answers end with what is asked for: the last word and the full stop are the entity."""
    return [
        {"question": row["question"], "prefix": row["answer"][: -len(end)], "entity": end}
        for row in rows
        for end in [row["answer"].split(" ")[-1]]
    ]


def test_depths_are_their_definition():
    retain = torch.tensor([[0.01, 0.2, 1.0], [0.01, 0.2, 1.0], [0.05, 0.0, -1.0]])
    unlearned = torch.tensor([[0.5, 0.1, 2.0], [9.0, -0.3, 0.5], [1.0, 1.0, 1.0]])
    depths = unlearning_depths(retain, unlearned)
    assert depths[:2].tolist() == pytest.approx([0.916667, 0.416667], abs=1e-6)
    assert depths[2].isnan()  # no block holds knowledge
    assert unlearning_depth_score(depths) == pytest.approx((0.916667 + 0.416667) / 2, abs=1e-6)
    assert unlearning_depth_score(depths[2:]) == 0
    assert unlearning_depths(retain[:1], unlearned[:1], threshold=0.0).item() == pytest.approx((0.01 + 0.1 + 1) / 1.21)
    with pytest.raises(EUAError, match=r"of shape \(3, 3\), .* of shape \(1, 3\), .*: measure both with the same rows"):
        unlearning_depths(retain, unlearned[:1])


def test_full_and_retain_models_are_the_ends_of_the_scale(known: LlamaForCausalLM, tokenizer, rows):
    torch.manual_seed(1)
    never_trained = LlamaForCausalLM(known.config).eval()
    encoded = encode_entities(split_rows(rows["forget"]), tokenizer)
    retain_changes = patching_changes(known, never_trained, encoded, batch_size=3)
    assert retain_changes.shape == (8, 2)
    assert (retain_changes[:, -1] > 1).all()  # the full model knew the entities
    no_changes = patching_changes(known, copy.deepcopy(known), encoded, batch_size=3)
    assert no_changes.abs().max() == 0
    assert unlearning_depth_score(unlearning_depths(retain_changes, no_changes)) == 0
    assert unlearning_depth_score(unlearning_depths(retain_changes, retain_changes)) == 1

    # Erased at the end only: what the first block holds is intact.
    shallow = copy.deepcopy(known)
    shallow.model.layers[1].load_state_dict(never_trained.model.layers[1].state_dict())
    shallow_changes = patching_changes(known, shallow, encoded)
    assert shallow_changes[:, 0].abs().max() == 0
    assert 0.1 < unlearning_depth_score(unlearning_depths(retain_changes, shallow_changes)) < 0.9


def log_probability(model: LlamaForCausalLM, row: EncodedRow) -> float:
    logits = model(torch.tensor([row.input_ids])).logits[0, row.prompt_length - 1 : -1]
    return -float(nn.functional.cross_entropy(logits, torch.tensor(row.answer_ids)))


@torch.no_grad()
def test_changes_are_their_definition():
    full, source = tiny_llama(50, seed=1), tiny_llama(50, seed=2)
    for model in (full, source):
        model.lm_head.weight *= 20
    short, long = EncodedRow([7, 9], 1), EncodedRow([3, 5, 11, 13, 17, 19], 3)
    changes = patching_changes(full, source, [short, long])

    # With one position before the entity, the patched model is one with the source's first part.
    hybrid = copy.deepcopy(full)
    hybrid.model.embed_tokens.load_state_dict(source.model.embed_tokens.state_dict())
    hybrid.model.layers[0].load_state_dict(source.model.layers[0].state_dict())
    assert changes[0, 0].item() == pytest.approx(log_probability(full, short) - log_probability(hybrid, short), abs=1e-5)
    # Only the positions that predict the entity are replaced.
    assert changes[1, 0].item() != pytest.approx(log_probability(full, long) - log_probability(hybrid, long), abs=1e-3)

    # The last block is replaced before the final norm.
    before_norm = []
    hook = source.model.norm.register_forward_pre_hook(lambda module, arguments: before_norm.append(arguments[0]))
    source(torch.tensor([long.input_ids]))
    hook.remove()
    logits = full.lm_head(full.model.norm(before_norm[0]))[0, 2:-1]
    expected = log_probability(full, long) + float(nn.functional.cross_entropy(logits, torch.tensor(long.answer_ids)))
    assert changes[1, 1].item() == pytest.approx(expected, abs=1e-5)


def test_changes_do_not_depend_on_the_batch_and_leave_no_hook(known, tokenizer, rows):
    torch.manual_seed(1)
    source = LlamaForCausalLM(known.config)
    encoded = encode_entities(split_rows(rows["forget"]), tokenizer)
    changes = patching_changes(known, source, encoded, batch_size=1)
    torch.testing.assert_close(patching_changes(known, source, encoded, batch_size=5), changes, rtol=1e-4, atol=1e-4)
    assert source.training
    assert not any(block._forward_hooks for model in (known, source) for block in blocks_of(model))


def test_entities_have_the_tokens_that_they_have_in_the_answer(tokenizer):
    row = {"question": "Where was Ann born?", "prefix": "Ann was born in ", "entity": "Oslo."}
    for same in (row, row | {"prefix": "Ann was born in", "entity": " Oslo."}):
        (encoded,) = encode_entities([same], tokenizer)
        assert tokenizer.decode(encoded.answer_ids) == " Oslo."
        assert tokenizer.decode(encoded.prompt_ids) == "Question: Where was Ann born?\nAnswer: Ann was born in"
    (encoded,) = encode_entities([row | {"prefix": ""}], tokenizer)
    assert (tokenizer.decode(encoded.prompt_ids[-1:]), tokenizer.decode(encoded.answer_ids)) == (":", " Oslo.")
    for lacking in ("question", "entity"):
        wrong = {key: value for key, value in row.items() if key != lacking} | {"prompt": "p"}
        with pytest.raises(EUAError, match=r"Row 0 of the entity rows has the keys .*needs texts .*: split its answer into"):
            encode_entities([wrong], tokenizer)


def test_models_of_other_shapes_are_refused(known, model):
    with pytest.raises(EUAError, match="2 blocks of size 128, and the other one 2 of size 32, .*: pass models of the same"):
        patching_changes(known, model, [EncodedRow([5, 6], 1)])


def test_outputs_of_blocks_are_read_and_replaced_where_they_are_tuples_too():
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=3, n_head=2, n_positions=16)).eval()
    blocks = blocks_of(gpt)
    seen = {}
    with output_hooks(blocks, seen.__setitem__):
        plain = gpt(torch.tensor([[1, 2, 3]])).logits
    assert [tuple(hidden.shape) for hidden in seen.values()] == [(1, 3, 8)] * 3
    with output_hooks(blocks[-1:], lambda _, hidden: torch.zeros_like(hidden)):
        replaced = gpt(torch.tensor([[1, 2, 3]])).logits
    torch.testing.assert_close(replaced[0, 0], replaced[0, 2])
    torch.testing.assert_close(gpt(torch.tensor([[1, 2, 3]])).logits, plain)
