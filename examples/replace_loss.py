"""Train a stock transformers model without computing its logits, by replacing its loss in a few lines.

    python examples/replace_loss.py                 # a small random Llama with a vocabulary of 128256
    python examples/replace_loss.py --model PATH    # yours

Prints the loss and PyTorch's peak allocated memory, for the original model and with its loss replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fused_energy import LinearEnergy


@contextmanager
def loss_without_logits(model: PreTrainedModel) -> Iterator[None]:
    """In this context, ``model(input_ids, labels=labels).loss`` is unchanged, and ``.logits`` are hidden states.

    It works for models that pass the output of ``lm_head`` directly to their loss. A model that scales or caps its logits would
    do so with hidden states: pass ``logit_scale`` and ``softcap`` to ``LinearEnergy`` and call it on the hidden states instead.
    """
    if getattr(model.config, "final_logit_softcapping", None) or getattr(model.config, "logits_scaling", 1.0) != 1.0:
        raise ValueError(f"{type(model).__name__} changes its logits after the head, so its loss cannot be replaced this way.")
    head, own_loss = LinearEnergy(model.lm_head), model.loss_function

    def loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | float | None = None, **_: Any) -> Tensor:
        return head.nll(logits[:, :-1], labels[:, 1:], num_items_in_batch)

    # The layer stays in the model, so that its parameters keep their names, but it returns the hidden states unchanged.
    model.lm_head.forward, model.loss_function = lambda hidden: hidden, loss
    try:
        yield
    finally:
        del model.lm_head.forward
        model.loss_function = own_loss


def step(model: PreTrainedModel, tokens: Tensor) -> tuple[float, float]:
    """Loss and peak allocated memory in GiB of one forward and backward pass."""
    model.zero_grad()
    if tokens.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        return loss.item(), torch.cuda.max_memory_allocated() / 2**30
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = max(accumulate(nbytes for _, nbytes in sorted(changes)))
    return loss.item(), peak / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or name that transformers can load")
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        sizes = {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "tie_word_embeddings": False,
        }
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128256, **sizes))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokens = torch.randint(0, model.config.vocab_size, (1, options.tokens), device=model.device)
    step(model, tokens)  # warm-up
    loss, peak = step(model, tokens)
    print(f"as it is:       loss {loss:.6f}, peak of a step {peak:.2f} GiB")
    with loss_without_logits(model):
        loss, peak = step(model, tokens)
    print(f"without logits: loss {loss:.6f}, peak of a step {peak:.2f} GiB")


if __name__ == "__main__":
    main()
