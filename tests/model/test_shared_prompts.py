"""Rows that share a prompt have the hidden states that they have alone, in every family, and run fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from eua.data.rows import EncodedRow
from eua.model.forward import answer_states, eval_hidden_states
from eua.model.shared_prompts import eval_answer_states
from tests.model.test_forward import LLAMA_LIKE, MODELS, SPECIAL, V, config_of, random_model, randomized

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {name: entry[:2] for name, entry in MODELS.items()}
FAMILIES |= {
    "mistral, sliding window": ("MistralConfig", LLAMA_LIKE | {"sliding_window": 5}),
    "gemma3, sliding window": (
        "Gemma3TextConfig",
        LLAMA_LIKE | {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2},
    ),
    "bloom": ("BloomConfig", SPECIAL | {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
# Models that keep something else than keys and values, or compute a text that continues in another way.
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", SPECIAL | {"vocab_size": V, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}),
    "phi3, longrope": (
        "Phi3Config",
        LLAMA_LIKE
        | {"original_max_position_embeddings": 16}
        | {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
        },
    ),
}


def rows_of_questions() -> list[EncodedRow]:
    """Two questions of one length, one that is shorter, a lone one, and one with more answers than a batch; mixed."""
    draw = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, V, (count,), generator=draw).tolist()

    rows = []
    for prompt_length, answer_lengths in ((11, (7, 1, 4)), (11, (3, 9)), (6, (2, 5)), (8, (6,)), (1, (2, 3)), (4, range(1, 8))):
        prompt = tokens(prompt_length)
        rows += [EncodedRow(prompt + tokens(length), prompt_length) for length in answer_lengths]
    chat = rows[0].input_ids[:11] + tokens(6)
    rows.append(EncodedRow(chat, 11, frozenset({13, 14})))
    return [rows[i] for i in torch.randperm(len(rows), generator=draw).tolist()]


def tokens_run(model: nn.Module, run: Callable[[], Any]) -> int:
    """The number of tokens that are embedded, without padding to the right of a text, while ``run`` runs."""
    count = 0

    def add(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal count
        width = options["input_ids"].shape[1]
        count += int(options["attention_mask"][:, -width:].sum())

    hook = model.register_forward_pre_hook(add, with_kwargs=True)
    run()
    hook.remove()
    return count


def states_of(model: nn.Module, rows: list[EncodedRow], batch_size: int = 5) -> list[Tensor]:
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for indices, states in eval_answer_states(model, rows, batch_size):
        for i, part in zip(indices, states.split([len(rows[i].answer_positions) for i in indices]), strict=True):
            found[i] = part
    return found


def plain_states(model: nn.Module, rows: list[EncodedRow]) -> list[Tensor]:
    found = {}
    for (i,), hidden in eval_hidden_states(model, rows, 1):
        found[i] = answer_states(hidden, [rows[i]])
    return [found[i] for i in range(len(rows))]


def model_of(families: dict[str, tuple[str, dict[str, Any]]], name: str) -> PreTrainedModel:
    return randomized(AutoModelForCausalLM.from_config(config_of(*families[name])))


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_that_share_a_prompt_have_the_states_that_they_have_alone(name):
    model, rows = model_of(FAMILIES, name), rows_of_questions()
    expected = plain_states(model, rows)
    model.train()
    for found, alone in zip(states_of(model, rows), expected, strict=True):
        torch.testing.assert_close(found, alone, atol=2e-4, rtol=2e-4)
    assert model.training
    cost = tokens_run(model, lambda: states_of(model, rows))
    prompts_but_last, answers = 10 + 10 + 5 + 2 * 3, 18 + 12 + 7 + 28  # the question with most answers takes two batches
    alone, checked = 14 + 3 + 4, 20
    assert cost == prompts_but_last + answers + alone + checked == 137
    assert sum(len(row.input_ids) for row in rows) == 192


@pytest.mark.parametrize("name", ALONE)
def test_models_that_cannot_continue_a_prompt_run_every_text_alone(name):
    model, rows = model_of(ALONE, name), rows_of_questions()
    if name == "mamba":
        expected = plain_states(model, rows)
        for found, alone in zip(states_of(model, rows), expected, strict=True):
            torch.testing.assert_close(found, alone, atol=2e-4, rtol=2e-4)
    assert tokens_run(model, lambda: states_of(model, rows)) > sum(len(row.input_ids) for row in rows)


@pytest.mark.parametrize("kind", ["lora", "prefix", "compiled"])
def test_wrapped_models_have_the_states_of_texts_alone(kind):
    model = random_model("llama")
    rows = [row for row in rows_of_questions() if row.prompt_length == 11]
    if kind == "compiled":
        wrapped: Any = torch.compile(model, backend="eager")
    else:
        config = (
            LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
            if kind == "lora"
            else PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        )
        wrapped = get_peft_model(model, config).eval()
    expected = plain_states(wrapped, rows)
    for _ in range(2):
        for found, alone in zip(states_of(wrapped, rows), expected, strict=True):
            torch.testing.assert_close(found, alone, atol=2e-4, rtol=2e-4)
