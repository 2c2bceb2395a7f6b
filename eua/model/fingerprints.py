"""Digests that identify a model and a tokenizer."""

from __future__ import annotations

import hashlib
import math

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from eua.data.rows import QUESTION_TEMPLATE
from eua.distributed import full_shape, full_tensor

_SAMPLES_PER_TENSOR = 4096
_PROBE = "What did Ann say?  «Naïve 42!»"


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights (their names, shapes, dtypes and up to 4096 evenly spaced values of each) and of active adapters.

    A training step, another dtype or quantization changes it. For quantized weights, only names and dtypes count, since layers
    repack the values when they run. PEFT's prefixes are left out, so it does not matter how an adapter was loaded. All
    processes must call this, because sharded weights are gathered.
    """
    digest = hashlib.sha256()
    parameters = {
        name.removeprefix("_orig_mod.").removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
    }
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name} {parameter.dtype}".encode())
        if parameter.is_floating_point():
            flat = full_tensor(parameter).reshape(-1)
            step = max(1, math.ceil(flat.numel() / _SAMPLES_PER_TENSOR))
            digest.update(repr(tuple(full_shape(parameter))).encode())
            digest.update(flat[::step].to("cpu", torch.float32).numpy().tobytes())
    digest.update(repr(adapter_states(model)).encode())
    return digest.hexdigest()


def adapter_states(model: nn.Module) -> list[tuple[object, ...]]:
    """Which of PEFT's adapters are active in each layer, and with which scaling, which the weights do not show."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return [
        (layer.disable_adapters, layer.active_adapters, layer.merged_adapters, sorted(getattr(layer, "scaling", {}).items()))
        for layer in layers
    ]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template, of the token ids of a text, and of the special tokens.

    It does not include a rendered template, because some templates write the current date.
    """
    template = QUESTION_TEMPLATE if tokenizer.chat_template is None else tokenizer.get_chat_template()
    known = (template, tokenizer(_PROBE)["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id)
    return hashlib.sha256(repr(known).encode()).hexdigest()
