"""A model and its tokenizer by name, for the command line."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eua.errors import EUAError


def load_model(name: str, dtype: str = "auto", *, place: bool = True) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub name, in eval mode, with ``place`` on the fastest device there is.

    Raises:
        EUAError: when nothing of that name can be loaded as a causal language model.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EUAError(f"{name!r} cannot be loaded as a causal language model ({reason}): check the path or name.") from error
    if place and torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer
