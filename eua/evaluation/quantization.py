"""A model with the weights that it has in 8 or 4 bits: quantization can bring back what unlearning moved only a little."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eua.errors import EUAError

_BLOCK = 64  # weights with one scale, as in QLoRA


@torch.no_grad()
def quantized(model: PreTrainedModel, bits: Literal[4, 8]) -> PreTrainedModel:
    """A copy of the model whose linear layers, except the head, have weights rounded to 4 or 8 bits.

    The rounded weights are stored in the model's dtype, so that any device computes with them: 4 bits as bitsandbytes' NF4 in
    blocks of 64 (Dettmers et al. 2023), 8 bits as its int8 with one scale per row (Dettmers et al. 2022), without its treatment
    of activations. "Catastrophic failure of LLM unlearning via quantization" (Zhang et al. 2024) is what this looks for.

    >>> measure_answers(quantized(model, 4), rows).extraction_strength.mean()     # doctest: +SKIP

    Raises:
        EUAError: if bits is neither 4 nor 8, or if bitsandbytes is missing, which 4 bits need.
    """
    if bits not in (4, 8):
        raise EUAError(f"bits = {bits}, but weights are rounded to 4 or to 8 bits: choose one of these.")
    rounded = copy.deepcopy(model)
    head = rounded.get_output_embeddings()
    for module in rounded.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.copy_(_nf4(module.weight) if bits == 4 else _int8(module.weight))
    return rounded


def _int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale).round() * scale


def _nf4(weight: Tensor) -> Tensor:
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError as error:
        raise EUAError(
            f"4 bits need bitsandbytes, which is missing ({error}): pip install bitsandbytes, or measure 8 bits only."
        ) from error
    # As one row: on CPUs, bitsandbytes 0.50 mixes up the scales of rows that are no multiple of a block.
    flat = weight.float().reshape(1, -1)
    packed, state = quantize_4bit(flat, quant_type="nf4", blocksize=_BLOCK)
    return dequantize_4bit(packed, state).reshape(weight.shape)
