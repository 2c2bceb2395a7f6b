"""EUATrainer with a frozen reference model: boundaries at every step, and KL instead of NLL."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eua import EUAError
from eua.methods.retain import reference_kl
from tests.conftest import tiny_llama
from tests.training.test_trainer import LORA, add_dropout, make, weights


def sharp(tokenizer, seed: int = 0):
    """A model whose logits are far from flat."""
    model = tiny_llama(len(tokenizer), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4
    return model


def test_kl_and_its_gradient_are_the_definition():
    torch.manual_seed(0)
    head, ref_head = torch.randn(50, 8, dtype=torch.float64, requires_grad=True), torch.randn(50, 6, dtype=torch.float64)
    hidden, ref = torch.randn(11, 8, dtype=torch.float64, requires_grad=True), torch.randn(11, 6, dtype=torch.float64)
    z, z_ref = hidden @ head.T, ref @ ref_head.T
    p, p_ref = z.softmax(-1), z_ref.softmax(-1)
    expected = torch.stack([(p_ref[i] * (p_ref[i] / p[i]).log()).sum() for i in range(11)])
    found = reference_kl(hidden, ref, logits=lambda h: h @ head.T, ref_logits=lambda h: h @ ref_head.T, tile=4)
    torch.testing.assert_close(found, expected)
    upstream = torch.rand(11, dtype=torch.float64)
    gradients = torch.autograd.grad(found, (hidden, head), upstream)
    by_hand = upstream[:, None] * (p - p_ref)  # in the logits
    torch.testing.assert_close(gradients, (by_hand @ head, by_hand.T @ hidden))
    same = reference_kl(hidden, hidden, logits=lambda h: h @ head.T, ref_logits=lambda h: h @ head.T, tile=4)
    assert same.abs().max() < 1e-12
    assert reference_kl(hidden[:0], ref[:0], logits=lambda h: h @ head.T, ref_logits=lambda h: h @ ref_head.T).shape == (0,)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *(x.numel() for x in made)])
        return out


def test_kl_holds_no_more_logits_than_those_of_a_tile():
    vocabulary, tokens = 1000, 640
    head, ref_head = torch.randn(vocabulary, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    hidden, ref, kept = torch.randn(tokens, 4, requires_grad=True), torch.randn(tokens, 4), []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        kl = reference_kl(hidden, ref, logits=lambda h: h @ head.T, ref_logits=lambda h: h @ ref_head.T)
        forward_kept = sum(kept)
        kl.sum().backward()
    assert largest.size == 64 * vocabulary
    assert forward_kept <= 2 * hidden.numel() + kl.numel()
    assert ref_head.grad is None


@pytest.mark.parametrize("constants", [{}, {"m_in": -6.2, "m_out": -5.9}], ids=["per step", "constant"])
@pytest.mark.parametrize(("temperature", "fill", "rho"), [(1.0, "zero", 0.1), (2.0, "none", 0.3)])
def test_a_reference_at_every_step_gives_the_loss_of_boundaries_made_beforehand(
    tokenizer, rows, tmp_path, temperature, fill, rho, constants
):
    """The same logs and, to rounding, the same weights; the reference stays as it was."""
    settings = {"temperature": temperature, "fill": fill, "rho": rho, "gamma": 0.2, "eval_strategy": "epoch"} | constants
    held_out = {"eval_forget_dataset": rows["forget"][6:], "eval_retain_dataset": rows["retain"][9:14]}
    logs, trained = [], []
    for with_reference in (False, True):
        model, passed = sharp(tokenizer), dict(held_out)
        if with_reference:
            passed["ref_model"] = reference = sharp(tokenizer).train()
            add_dropout(reference, 0.5)  # a reference answers without dropout, whatever mode it comes in
            settings |= {"retain_loss": "kl", "alpha": 0.0} if constants else {}
        elif constants:
            settings["alpha"] = 0.0
        trainer = make(model, tokenizer, rows, tmp_path / str(with_reference), passed=passed, **settings)
        trainer.train()
        logs.append(trainer.state.log_history)
        trained.append(weights(model))
    for name, parameter in trained[0].items():
        torch.testing.assert_close(parameter, trained[1][name], rtol=1e-4, atol=1e-5)
        assert torch.equal(weights(sharp(tokenizer))[name], weights(reference)[name])
    assert all(parameter.grad is None for parameter in reference.parameters())
    for one, other in zip(*logs, strict=True):
        for key in set(one) - {"train_runtime", "train_samples_per_second", "train_steps_per_second"}:
            if "runtime" not in key and "per_second" not in key:
                assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_kl_takes_the_place_of_nll(tokenizer, rows, tmp_path, peft_config):
    """The loss is the method with KL at retained tokens, from the whole logits of both models; in training and evaluation."""
    held_out = {"eval_forget_dataset": rows["forget"][6:], "eval_retain_dataset": rows["retain"][9:14]}
    trainer = make(
        sharp(tokenizer),
        tokenizer,
        rows,
        tmp_path,
        copy.deepcopy(peft_config),
        passed=held_out | {"ref_model": sharp(tokenizer)},
        retain_loss="kl",
        alpha=0.7,
        gamma=0.2,
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["kl_retain"] == pytest.approx(0.0, abs=1e-5)  # before the first step the two are the same
    for line in trainer.state.log_history[:6]:
        parts = 0.2 * (line["loss_forget"] + line["loss_retain"]) + 0.7 * line["kl_retain"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)
    reference, model = sharp(tokenizer), trainer.model
    found = trainer.evaluate()
    with torch.no_grad():
        total, tokens = 0.0, 0
        for row in trainer.encoded_rows["eval_retain"]:
            answer = slice(row.prompt_length - 1, len(row.input_ids) - 1)
            ids = torch.tensor([row.input_ids])
            log_p, log_ref = (m(ids).logits[0, answer].log_softmax(-1) for m in (model, reference))
            total += float((log_ref.exp() * (log_ref - log_p)).sum())
            tokens += len(row.answer_ids)
    assert found["eval_kl_retain"] == pytest.approx(total / tokens, rel=1e-3)
    assert found["eval_kl_retain"] > 1e-4
    parts = 0.2 * (found["eval_loss_forget"] + found["eval_loss_retain"]) + 0.7 * found["eval_kl_retain"]
    assert found["eval_loss"] == pytest.approx(parts)


def test_a_run_resumes_only_with_the_reference_it_had(tokenizer, rows, tmp_path):
    make(sharp(tokenizer), tokenizer, rows, tmp_path, passed={"ref_model": sharp(tokenizer)}, save_strategy="epoch").train()
    again = make(sharp(tokenizer), tokenizer, rows, tmp_path, passed={"ref_model": sharp(tokenizer)})
    assert torch.isnan(again._find_boundaries(resuming=True)["retain"][0]).all()  # no stand-in is ever taken for a boundary
    for passed in ({"ref_model": sharp(tokenizer, seed=1)}, None):
        with pytest.raises(EUAError, match="belongs to another model, other rows or other settings"):
            make(sharp(tokenizer), tokenizer, rows, tmp_path, passed=passed)._find_boundaries(resuming=True)


def test_a_reference_can_be_a_path(tokenizer, rows, tmp_path):
    sharp(tokenizer).save_pretrained(tmp_path / "before")
    tokenizer.save_pretrained(tmp_path / "before")
    trainer = make(
        sharp(tokenizer), tokenizer, rows, tmp_path / "run", passed={"ref_model": str(tmp_path / "before")}, max_steps=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_references_that_cannot_work_are_refused(model, tokenizer, rows, tmp_path):
    with pytest.raises(EUAError, match='retain_loss = "kl" was set without a ref_model, so there is nothing .* pass ref_model'):
        make(model, tokenizer, rows, tmp_path, retain_loss="kl")
    with pytest.raises(EUAError, match="m_in = -9.0 and m_out = -5.0, and nothing would be read from it, .* leave out one"):
        make(model, tokenizer, rows, tmp_path, passed={"ref_model": sharp(tokenizer)}, m_in=-9.0, m_out=-5.0)
    with pytest.raises(
        EUAError, match="ref_model has a vocabulary of 50 and the model in training one of 400, .* pass the model"
    ):
        make(model, tokenizer, rows, tmp_path, passed={"ref_model": tiny_llama(50)})
    with pytest.raises(EUAError, match="ref_model shares weights with the model in training, .* pass a copy"):
        make(model, tokenizer, rows, tmp_path, passed={"ref_model": model})
    with pytest.raises(EUAError, match="ref_model shares weights with the model in training, .* pass a copy"):
        make(model, tokenizer, rows, tmp_path, copy.deepcopy(LORA), passed={"ref_model": model})
