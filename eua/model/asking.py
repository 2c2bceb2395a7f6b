"""Asks a model questions in plain text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.batches import pad_prompts
from eua.data.rows import encode_prompts
from eua.data.sources import Prompts
from eua.errors import EUAError, in_one_line
from eua.model.energy_recorder import end_ids
from eua.model.forward import check_ids
from eua.model.head import vocabulary_and_device


def padding_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to pad prompts with. It is masked, but the model looks it up, so it is one of the model's vocabulary.

    A padding token is often added to a tokenizer and not to its model.
    """
    vocabulary, _ = vocabulary_and_device(model)
    known = (tokenizer.pad_token_id, *end_ids(model.generation_config.eos_token_id), tokenizer.eos_token_id)
    return next((token for token in known if token is not None and token < vocabulary), 0)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Prompts,
    max_new_tokens: int = 64,
    **options: Any,
) -> list[str]:
    """The model's answers to questions or to the prompts of rows, in one batch, greedily unless ``options`` say otherwise.

    A guard that is attached to the model acts as in any ``model.generate``.

    >>> answer(model, tokenizer, "Where was Ann born?")     # doctest: +SKIP
    ['In Oslo.']

    Args:
        model: a causal language model, which keeps its mode (train or eval).
        tokenizer: its tokenizer.
        questions: one question, or a list of questions and rows. A ``Path`` or any other source of :mod:`eua.data.sources`
            stands for the questions of its rows.
        max_new_tokens: maximal length of an answer.
        options: further options of ``model.generate``.

    Returns:
        One answer per question, in the same order.

    Raises:
        EUAError: if questions cannot be read, if tokenizer and model have different vocabularies, if the model has too few
            learned positions for a question and its answer, or if it cannot generate with these options and its own settings.
    """
    ids = encode_prompts(questions, tokenizer, "questions")
    check_ids(model, ids, "questions", max_new_tokens)
    pad = padding_id(model, tokenizer)
    batch = pad_prompts(ids, pad, model.device)
    training = model.training
    model.eval()
    try:
        options = {"do_sample": False, "tokenizer": tokenizer} | options
        with generation_explained():
            output = model.generate(**batch, max_new_tokens=max_new_tokens, pad_token_id=pad, **options)
    finally:
        model.train(training)
    return [text.strip() for text in tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)]


@contextmanager
def generation_explained() -> Iterator[None]:
    """Turn what transformers raises for settings of generation that cannot work into an :class:`EUAError`."""
    try:
        yield
    except EUAError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise EUAError(
            f"The model cannot generate with its settings ({in_one_line(error)}): correct its generation_config.json, or the "
            "options of `generate`."
        ) from error
