"""Relearning and quantization: the model is left alone, knowledge comes back, rounding is that of the formats."""

from __future__ import annotations

import copy

import pytest
import torch

from eua import EUAError
from eua.data.rows import encode_rows
from eua.evaluation.metrics import measure_answers
from eua.evaluation.quantization import quantized
from eua.evaluation.relearning import relearning_curve
from tests.conftest import tiny_llama
from tests.training.test_trainer import weights


def knowledge(rows):
    return lambda model: float(measure_answers(model, rows).exact_memorization.mean())


def test_a_model_learns_the_rows_that_it_is_trained_on(model, tokenizer, rows):
    taught, others = (encode_rows(rows[kind][:4], tokenizer, None) for kind in ("forget", "test"))
    before = weights(model)
    how = {"steps": (3, 60), "batch_size": 4, "learning_rate": 1e-2}
    curve = relearning_curve(model, taught, knowledge(taught), **how)
    assert list(curve) == [0, 3, 60]
    assert curve[0] < 0.2
    assert curve[60] > 0.95
    assert relearning_curve(model, others, knowledge(taught), **how)[60] < 0.6
    assert curve == relearning_curve(model, taught, knowledge(taught), **how)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_relearning_is_plain_training_on_answers(model, tokenizer, rows):
    """The first step is that of AdamW on the mean NLL of the answers' tokens."""
    (row,) = encode_rows(rows["forget"][:1], tokenizer, None)
    expected = copy.deepcopy(model)
    labels = torch.tensor([[-100] * row.prompt_length + row.answer_ids])
    expected(torch.tensor([row.input_ids]), labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0.0).step()
    found = relearning_curve(model, [row], weights, steps=(1,), batch_size=1, learning_rate=1e-3)[1]
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("rows", "steps"), [(0, (1,)), (1, ()), (1, (0, 2))])
def test_relearning_needs_rows_and_steps(model, tokenizer, rows, steps):
    row = encode_rows([{"question": "Who?", "answer": "Ann."}], tokenizer, None)
    with pytest.raises(EUAError, match="relearning is measured after steps on rows, so give at least one row"):
        relearning_curve(model, row * rows, lambda m: 0, steps=steps)


@pytest.mark.parametrize(("bits", "levels"), [(4, 16), (8, 255)])
def test_weights_have_the_levels_of_the_format(bits, levels, tokenizer):
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    model = tiny_llama(len(tokenizer))
    before = weights(model)
    rounded = quantized(model, bits)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    for name, parameter in rounded.named_parameters():
        is_rounded = "proj" in name
        assert torch.equal(parameter, before[name]) != is_rounded, name
        if is_rounded:
            block = parameter.flatten()[:64] if bits == 4 else parameter[0]
            assert len(block.unique()) <= levels
            off = (parameter - before[name]).abs().max() / before[name].abs().max()
            assert off <= {4: 0.153, 8: 0.5 / 127 * 1.01}[bits]  # NF4: half of its widest step, from -1 to -0.696


def test_what_is_known_well_survives_rounding(known, tokenizer, rows):
    pytest.importorskip("bitsandbytes")
    encoded = encode_rows(rows["retain"][:8], tokenizer, None)
    assert knowledge(encoded)(quantized(known, 8)) == pytest.approx(knowledge(encoded)(known), abs=0.02)
    assert knowledge(encoded)(quantized(known, 4)) > 0.8
    with pytest.raises(EUAError, match="bits = 3, but weights are rounded to 4 or to 8 bits: choose one"):
        quantized(known, 3)
