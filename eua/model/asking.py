"""Ask a model questions in plain text."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.batches import pad_prompts
from eua.data.rows import encode_prompts
from eua.data.sources import Prompts
from eua.model.forward import check_token_ids


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Prompts,
    max_new_tokens: int = 64,
    **options: Any,
) -> list[str]:
    """The model's answers to questions (or the prompts of rows), generated as one batch, greedily unless ``options`` say else.

    A guard attached to the model acts as in any ``model.generate``.

    >>> answer(model, tokenizer, "Where was Ann born?")     # doctest: +SKIP
    ['In Oslo.']

    Args:
        model: a causal language model; left in the mode (train or eval) it was in.
        tokenizer: its tokenizer.
        questions: one question, or a list of questions and rows; a ``Path`` or any other source of :mod:`eua.data.sources`
            gives the questions of its rows.
        max_new_tokens: how long an answer may be.
        options: of ``model.generate``.

    Returns:
        One answer for each question, in their order.

    Raises:
        EUAError: questions that cannot be read, or a tokenizer of another vocabulary than the model's.
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
