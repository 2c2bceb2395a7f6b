"""Digests that identify a model and a tokenizer, and a check, cheap enough for every call, that a model is still the same.

:func:`model_fingerprint` reads every weight. Each block of weights has a checksum: the sum of its bits, as integers, times
fixed odd random numbers, modulo 2⁶⁴ (multilinear hashing, Carter & Wegman 1979). A change of a single value always changes it,
any other change with a probability of at least 1 − 2⁻³². It is integer arithmetic, so all devices get the same one.

:func:`recent_fingerprint` looks for signs that weights have changed since: another place in memory, dtype or device; PyTorch's
version counters; a step of any optimizer in the process (fused optimizers do not count versions); other active adapters.
Nothing shows that a caller has written through ``.data``, so it also compares the checksums of one sixteenth of every tensor,
of the next one each time, and small tensors as a whole: a change of a whole tensor shows at once, of any value within 16 calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedTokenizerBase

from eua.data.rows import QUESTION_TEMPLATE
from eua.distributed import full_shape, full_tensor, has_other_processes
from eua.model.head import check_present

PARTS = 16
_BITS = {1: torch.int8, 2: torch.int16}  # by bytes per value
_SMALL = 2**12  # words; a smaller tensor is in every part as a whole
_BLOCK = 2**18  # words; small enough for a processor's cache
_PROBE = "What did Ann say?  «Naïve 42!»"

Sums = list[list[int]]  # the checksums of the blocks of each of a tensor's parts


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights (names, shapes, dtypes and all values) and of active adapters.

    A training step, another dtype or quantization changes it. For quantized weights, only names and dtypes count, since layers
    repack the values when they run. Buffers count if they are saved with the model. PEFT's prefixes are left out, so it does
    not matter how an adapter was loaded. All processes must call this, because sharded weights are gathered.

    Raises:
        EUAError: if weights are offloaded.
    """
    check_present(model)
    saved = frozenset(model.state_dict())
    digest = hashlib.sha256()
    sums: dict[str, Sums] = {}
    weights = _weights(model, saved)
    signs = None if has_other_processes() else _signs(model, saved)
    plain = {name.removeprefix("_orig_mod.").removeprefix("base_model.model."): name for name in weights}
    for name, original in sorted(plain.items()):
        weight = weights[original]
        digest.update(f"{name} {weight.dtype}".encode())
        if weight.is_floating_point():
            sums[original] = [[int(total) for total in part] for part in _checksums(full_tensor(weight), range(PARTS))]
            digest.update(repr((tuple(full_shape(weight)), sums[original])).encode())
    digest.update(repr(adapter_states(model)).encode())
    if signs is not None:
        _known[model] = _Known(digest.hexdigest(), saved, signs, sums)
    return digest.hexdigest()


@torch.no_grad()
def recent_fingerprint(model: nn.Module) -> str:
    """:func:`model_fingerprint`, or the one that was found last if no sign shows that the model has changed since.

    With several processes, all weights are always read: processes that see different signs would wait for each other.
    """
    known = _known.get(model)
    if known is None or known.signs != _signs(model, known.saved) or known.differs_in_the_next_part(model):
        return model_fingerprint(model)
    return known.fingerprint


@dataclass
class _Known:
    """What was found when all weights of a model were last read."""

    fingerprint: str
    saved: Collection[str]
    signs: object
    sums: Mapping[str, Sums]
    calls: int = 0

    def differs_in_the_next_part(self, model: nn.Module) -> bool:
        part = self.calls % PARTS
        self.calls += 1
        weights = _weights(model, self.saved)
        # All sums are on their way before the first is waited for.
        found = [(name, _checksums(weights[name], [part])[0]) for name in self.sums]
        return any([int(total) for total in totals] != self.sums[name][part] for name, totals in found)


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
_steps = [0]  # of all optimizers in this process


def _count_step(*_: Any) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count_step)


def _weights(model: nn.Module, saved: Collection[str]) -> dict[str, Tensor]:
    """Parameters, and the buffers among the names in ``saved``."""
    return dict(model.named_parameters()) | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _signs(model: nn.Module, saved: Collection[str]) -> object:
    """Something that differs after most changes of weights: replaced, moved, cast, written to, trained, adapters switched."""
    weights = [
        (w.data_ptr(), w.dtype, w.device, 0 if w.is_inference() else w._version) for w in _weights(model, saved).values()
    ]
    return weights, repr(adapter_states(model)), _steps[0]


def _checksums(tensor: Tensor, parts: Iterable[int]) -> list[list[Tensor]]:
    """The checksums of the blocks of these parts of a tensor, each () int64 on its device."""
    size = tensor.element_size() * tensor.numel()
    flat = tensor.detach().reshape(-1)
    if size % 4 == 0 and flat.storage_offset() * flat.element_size() % 4:
        flat = flat.clone()  # PyTorch takes only aligned storage for larger numbers
    words = flat.view(torch.int32 if size % 4 == 0 else _BITS[flat.element_size()])
    split = words.tensor_split(PARTS) if len(words) >= _SMALL else (words,) * PARTS
    keys = _keys(words.device)
    products = torch.empty(min(len(split[0]), _BLOCK), dtype=torch.int64, device=words.device)

    def checksum(block: Tensor) -> Tensor:
        return products[: len(block)].copy_(block).mul_(keys[: len(block)]).sum()

    return [[checksum(block) for block in split[part].split(_BLOCK)] for part in parts]


@cache
def _keys(device: torch.device) -> Tensor:
    """Odd random numbers, (words of a block,), the same wherever and whenever they are made."""
    numbers = bytearray(hashlib.shake_128(b"eua").digest(8 * _BLOCK))
    return torch.frombuffer(numbers, dtype=torch.int64).bitwise_or(1).to(device)


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
