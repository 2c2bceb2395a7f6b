"""The gradient of the rows to forget: apart from the others it is the same, and what is left out of it is what should be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eua import EUAError
from eua.data.batches import ForgetRetainCollator
from eua.data.rows import EncodedRow
from eua.training.checks import check_setup
from eua.training.gradients import ForgetGradient, agreeing, parts_of, without_leading
from tests.conftest import tiny_llama
from tests.training.test_trainer import LORA, config, make, weights


def gradients(trainer, batches: int) -> dict[str, torch.Tensor]:
    """Of one step of some batches, as Trainer takes it."""
    loader = iter(trainer.get_train_dataloader())
    taken, counts = trainer.get_batch_samples(loader, batches, torch.device("cpu"))
    for index, batch in enumerate(taken):
        trainer.accelerator.gradient_state._set_sync_gradients(index == len(taken) - 1)
        trainer.training_step(trainer.model, batch, counts)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def prepared(tokenizer, rows, folder, **options):
    model = tiny_llama(len(tokenizer))
    trainer = make(model, tokenizer, rows, folder, alpha=0.5, gamma=50.0, retain_per_forget=2, **options)
    trainer.train_dataset = None
    trainer.train()  # makes the data set
    model.load_state_dict(tiny_llama(len(tokenizer)).state_dict())
    model.zero_grad()
    return trainer


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("method", ["eua", "npo", "idk_dpo"])
def test_the_two_parts_add_up_to_the_whole(method, batches, tokenizer, rows, tmp_path):
    options = {"method": method}
    whole = prepared(tokenizer, rows, tmp_path / "whole", **options)
    parts = prepared(tokenizer, rows, tmp_path / "parts", **options)
    parts._forget_gradient = ForgetGradient(parts.model)
    expected, found = gradients(whole, batches), gradients(parts, batches)
    assert expected.keys() == found.keys()
    size = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < 1e-5 * size
    assert whole._figures.keys() == parts._figures.keys()
    for name, figure in whole._figures.items():
        torch.testing.assert_close(parts._figures[name], figure, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batches", [1, 3])
def test_what_is_added_is_the_filtered_and_gated_part(batches, tokenizer, rows, tmp_path):
    """Against gradients of the rows to forget and to retain alone. What is filtered is the sum of a step's batches."""
    alone = {}
    for name in ("forget", "retain"):
        trainer = prepared(tokenizer, rows, tmp_path / name)
        trainer._forget_gradient = ForgetGradient(trainer.model)
        with pytest.MonkeyPatch.context() as patch:
            if name == "retain":
                patch.setattr(ForgetGradient, "add", lambda self: None)
            alone[name] = gradients(trainer, batches)
    alone["forget"] = {name: gradient - alone["retain"].get(name, 0) for name, gradient in alone["forget"].items()}

    both = prepared(tokenizer, rows, tmp_path / "both")
    both._forget_gradient = ForgetGradient(both.model, directions=2, sign_gate=True)
    found = gradients(both, batches)
    for name, gradient in found.items():
        forget, retain = alone["forget"][name], alone["retain"][name]
        if gradient.dim() == 2 and "embed" not in name:
            forget = without_leading(forget, 2)
        else:
            forget = torch.zeros_like(forget)
        expected = retain + torch.where(torch.sign(forget) == torch.sign(retain), forget, 0.0)
        assert float((gradient - expected).abs().max()) < 2e-3 * float(alone["forget"][name].abs().max())
    changed = [name for name, gradient in found.items() if not torch.equal(gradient, alone["retain"][name])]
    assert changed == [
        name for name, parameter in both.model.named_parameters() if parameter.dim() == 2 and "embed" not in name
    ]


@given(
    st.integers(1, 6),
    st.integers(2, 24),
    st.integers(2, 24),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_matrix_loses_its_leading_directions_and_nothing_else(directions, height, width, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for size in (height, width))
    rank = min(height, width)
    sizes = 3.0 ** -torch.arange(rank)
    matrix = (left[:, :rank] * sizes) @ right[:rank]
    found = without_leading(matrix.to(dtype), directions)
    expected = (left[:, directions:rank] * sizes[directions:]) @ right[directions:rank]
    assert found.dtype == dtype
    bound = 1e-4 if dtype == torch.float32 else 0.02
    assert float((found.float() - expected).abs().max()) < bound


def test_a_part_keeps_tokens_that_attention_does_not_see():
    rows = [
        EncodedRow([5, 6, 7, 8, 9], 2, hidden=frozenset({0, 1})),
        EncodedRow([1, 2, 3, 4, 5, 6, 7], 3),
        EncodedRow([1, 2], 1),
    ]
    items = [
        [{"row": row, "reference": torch.zeros(len(row.answer_ids)), "kind": kind}]
        for row, kind in zip(rows, ("forget", "retain", "forget"), strict=True)
    ]
    forget, retain = parts_of(ForgetRetainCollator()(items))
    assert forget["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 0, 0, 0]]
    assert forget["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert forget["row"][:, 0].tolist() == [0, 1]
    assert retain["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert len(parts_of(ForgetRetainCollator()(items[:1]))[1]["row"]) == 0


def test_a_gate_is_open_where_signs_agree():
    mine, theirs = torch.tensor([1.0, -1.0, 2.0, 0.0, -3.0]), torch.tensor([2.0, 3.0, 0.0, 1.0, -1.0])
    assert agreeing(mine, theirs).tolist() == [1.0, 0.0, 0.0, 0.0, -3.0]
    assert agreeing(mine, None).tolist() == [0.0] * 5
    small = torch.tensor([1e-30, -1e-30])  # their product is 0 in float32
    assert torch.equal(agreeing(small, 2 * small), small)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_an_interrupted_run_ends_with_the_same_weights(peft_config, tokenizer, rows, tmp_path):
    how = {"save_strategy": "steps", "save_steps": 2, "sign_gate": True, "gradient_filter": 1, "gradient_accumulation_steps": 2}
    torch.manual_seed(0)
    whole = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path / "whole", peft_config, **how)
    begun = weights(whole.model)
    whole.train()
    assert whole.state.global_step == 4
    assert [name for name, weight in weights(whole.model).items() if not torch.equal(weight, begun[name])]
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "last")
    torch.manual_seed(7)
    resumed = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path / "whole", peft_config, **how)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for name, weight in weights(whole.model).items():
        assert torch.equal(weight, weights(resumed.model)[name]), name


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gradient_filter": -1}, "gradient_filter = -1 cannot be used: a number of directions"),
        ({"gradient_filter": 0.5}, "gradient_filter = 0.5 cannot be used"),
        ({"sign_gate": True, "as_released": True, "method": "undial"}, "as_released = True was set with gradient_filter"),
        ({"sign_gate": True, "padding_free": True}, "padding_free = True was set with gradient_filter or sign_gate"),
        ({"sign_gate": True, "method": "grad_ascent"}, "without rows to retain"),
        ({"sign_gate": True, "alpha": 0.0}, "without rows to retain"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, text, tmp_path):
    with pytest.raises(EUAError, match=text):
        config(tmp_path, **options)


def test_several_processes_are_refused():
    class Accelerator:
        num_processes, state = 2, None

    with pytest.raises(EUAError, match="several processes .* leave both out, or train in one process"):
        check_setup(Accelerator(), torch.nn.Linear(1, 1), None, splits_gradient=True)
