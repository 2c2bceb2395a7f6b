"""Loads a model and its tokenizer by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from eua.errors import EUAError
from eua.model.forgotten import read_forgotten, set_forgotten


def load_model(name: str, dtype: Any = "auto", *, place: bool = True) -> tuple[Any, Any]:
    """The model and tokenizer of a folder or hub name, in eval mode and, with ``place``, on the fastest device.

    The tokenizer is loaded first: it is small, so a wrong name fails at once. Weights are read from safetensors only, since
    other formats can be pickles.

    Raises:
        EUAError: if nothing of that name can be loaded as a causal language model.
    """
    tokenizer = load_tokenizer(name)
    with _explained(name):
        config, _ = PreTrainedConfig.get_config_dict(name)  # without values, if it is an adapter's folder
    if config.get("is_encoder_decoder"):
        raise EUAError(
            f"{name!r} is an encoder–decoder model, of which only the decoder would be loaded as a causal language model: "
            "name a causal language model."
        )
    with _explained(name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)  # no pickles
    set_forgotten(model, read_forgotten(name))  # transformers does not say from which folder it loads an adapter
    if place and torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name.

    Raises:
        EUAError: if there is none.
    """
    with _explained(name):
        return AutoTokenizer.from_pretrained(name)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EUAError(
            f"{name!r} cannot be loaded as a causal language model ({reason}): check the path or name. Its weights must be "
            "safetensors."
        ) from error
