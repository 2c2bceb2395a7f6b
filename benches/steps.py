"""Training steps on a small Llama that the benchmarks compare: ours, and a plain one in which the model computes logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from eua.methods.d2 import d2_loss
from eua.model.forward import token_energies

ROWS, TOKENS, PROMPT = 8, 64, 16  # rows of each kind; tokens of the prompt do not count
GAMMA, ALPHA = 0.05, 1.0
TRAINED = {False: "everything trainable", True: "LoRA on all inner layers, frozen head"}  # by whether the model has an adapter
Batch = dict[str, Tensor]


def make_model(vocabulary: int, hidden_size: int, layers: int, lora: bool, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(device)
    with torch.no_grad():
        model.lm_head.weight *= 10.0  # larger logits, so that boundaries are violated on both sides
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")) if lora else model


def make_batch(vocabulary: int, device: str) -> Batch:
    """Forget rows, then retain rows."""
    ids = torch.randint(0, vocabulary, (2 * ROWS, TOKENS), generator=torch.Generator().manual_seed(1)).to(device)
    labels = ids.masked_fill(torch.arange(TOKENS, device=device) < PROMPT, -100)
    forget = (torch.arange(2 * ROWS, device=device) < ROWS)[:, None].expand(ids.shape)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "forget": forget}


def our_step(model: nn.Module, boundary: Tensor | tuple[float, float], batch: Batch) -> Tensor:
    """The computation of EUATrainer.compute_loss, and its backward."""
    energy, nll = token_energies(model, batch, 1.0)
    counted = batch["labels"][:, 1:] != -100
    loss = d2_loss(energy, nll, boundary, batch["forget"][:, 1:], counted, gamma=GAMMA, alpha=ALPHA).loss
    loss.backward()
    return loss.detach()


def plain_step(model: nn.Module, boundary: tuple[float, float], batch: Batch) -> Tensor:
    """The same loss from the model's own logits, with PyTorch's logsumexp and cross-entropy."""
    counted = batch["labels"][:, 1:] != -100
    forget = batch["forget"][:, 1:][counted]
    logits = counted_logits(model, batch, torch.ones_like(counted[:, 0]))
    nll = nn.functional.cross_entropy(logits, batch["labels"][:, 1:][counted], reduction="none")
    energy = -torch.logsumexp(logits, dim=1)
    loss = d2_loss(energy, nll, boundary, forget, torch.ones_like(forget), gamma=GAMMA, alpha=ALPHA).loss
    loss.backward()
    return loss.detach()


def counted_logits(model: nn.Module, batch: Batch, rows: Tensor) -> Tensor:
    """Logits of the counted tokens of these rows, (2 · ROWS,) bool → (tokens, V) float32."""
    output = model(input_ids=batch["input_ids"][rows], attention_mask=batch["attention_mask"][rows], use_cache=False)
    return output.logits[:, :-1][batch["labels"][rows, 1:] != -100].float()


def check_equal(model: nn.Module, steps: Iterable[Callable[[], Tensor]]) -> None:
    """Raise an error if steps differ in the loss or a gradient, or if there is no gradient. Clears all gradients."""
    results = []
    for step in steps:
        loss = step()
        results.append([loss, *(x.grad for x in model.parameters() if x.grad is not None)])
        model.zero_grad()
    for values in zip(*results, strict=True):
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], rtol=1e-3, atol=1e-5)
    assert any(gradient.any() for gradient in results[0][1:])
