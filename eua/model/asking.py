"""Ask a model questions in plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.batches import pad_prompts
from eua.data.rows import Row, encode_prompts
from eua.model.forward import check_token_ids


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Row | str],
    max_new_tokens: int = 64,
    **options: Any,
) -> list[str]:
    """The model's answers to questions (or the prompts of rows), generated as one batch, greedily unless ``options`` say else.

    A guard attached to the model acts as in any ``model.generate``.
    """
    ids = encode_prompts(questions, tokenizer, "questions")
    check_token_ids(model, ids)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)  # masked anyway
    batch = pad_prompts(ids, pad, model.device)
    training = model.training
    model.eval()
    try:
        options = {"do_sample": False} | options
        output = model.generate(**batch, max_new_tokens=max_new_tokens, pad_token_id=pad, **options)
    finally:
        model.train(training)
    return [text.strip() for text in tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)]
