"""The output head of a model: finds its tensors, and computes energies with them.

What a model does to its logits after the head is read from its config; :func:`eua.model.forward.check_head` compares the result
with the model's own logits, and rejects a model that does anything else.

The vocabulary is that of the model's logits: rows of the head beyond the tokenizer's length (a padded vocabulary) count, as
they do in the model's own softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from eua.distributed import full_shape, full_tensor, is_partitioned
from eua.errors import EUAError
from fused_energy import EnergyNLL, linear_energy, tail_energy

Side = Literal["top", "bottom"]
Fill = Literal["zero", "none"]

# The names under which configs state what happens to the logits after the head. A name may mean something else in another
# architecture, so check_head compares the result with the model.
_DIVISORS = ("logits_scaling",)  # Granite
_FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
_HEAD_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)  # float8 weights need scales that are stored separately


_BLOCK_BYTES = 64 * 2**20  # of logits in memory during the search for the most likely tokens


@dataclass(frozen=True)
class Head:
    """A language-model head: ``z = softcap(logit_scale · (h Wᵀ + b))``."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    module: nn.Module | None = None  # during whose call ZeRO-3 gathers weight and bias; None: they are whole
    is_gathered: bool = False  # by FSDP2, which casts weights to its compute dtype when it gathers them

    @property
    def vocabulary(self) -> int:
        return full_shape(self.weight)[0]

    def energy(self, hidden: Tensor, temperature: float) -> Tensor:
        """(..., H) → (...,), see :func:`fused_energy.linear_energy`."""
        return self._with_weight(lambda h, w, **options: linear_energy(h, w, temperature=temperature, **options), hidden)

    def energy_and_nll(self, hidden: Tensor, targets: Tensor, temperature: float) -> EnergyNLL:
        def both(hidden: Tensor, weight: Tensor, **options: Any) -> EnergyNLL:
            return linear_energy(hidden, weight, targets, temperature=temperature, **options)

        return self._with_weight(both, hidden)

    def tail_energy(self, hidden: Tensor, fraction: float, side: Side, fill: Fill, temperature: float) -> Tensor:
        def tail(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
            return tail_energy(hidden, weight, fraction, side, fill=fill, temperature=temperature, **options)

        return self._with_weight(tail, hidden)

    def energy_of_output(self, output: Tensor, temperature: float) -> Tensor:
        """The output of the head's module, ``h Wᵀ + b`` (..., V) → (...,) float32; for a few positions, as :meth:`logits`."""
        z = output.float()
        if self.logit_scale != 1.0:
            z = self.logit_scale * z
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        if temperature != 1.0:
            z = z / temperature
        return -temperature * torch.logsumexp(z, dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) → (..., V), float32; for a few positions, since its size is not bounded."""
        return self._with_weight(_logits, hidden)

    def logit(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The logits of given tokens, (..., H) and (...,) → (...,), float32; no other logit is computed."""

        def of_ids(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
            z = logit_scale * (hidden.float() * weight[ids].float()).sum(dim=-1)
            z = z if bias is None else z + bias[ids]
            return z if softcap is None else softcap * torch.tanh(z / softcap)

        return self._with_weight(of_ids, hidden)

    def mean_logit(self, hidden: Tensor) -> Tensor:
        """The mean over the vocabulary, (..., H) → (...,), float32: one product with the mean row of the head.

        Raises:
            EUAError: if the model caps its logits, of which the mean would need every one.
        """
        if self.softcap is not None:
            raise EUAError(
                f"The model caps its logits (softcap = {self.softcap}), so their mean is not that of its head's rows, which "
                "this method reads: choose another method, or another model."
            )

        def of_all(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
            z = logit_scale * (hidden.float() @ weight.mean(dim=0, dtype=torch.float32))
            return z if bias is None else z + bias.float().mean()

        return self._with_weight(of_all, hidden)

    def most_likely(self, hidden: Tensor) -> Tensor:
        """The most likely next token at each position: (N, H) → (N,), in blocks of limited size."""
        block = max(1, _BLOCK_BYTES // (4 * self.vocabulary))
        return torch.cat([self.logits(part).argmax(dim=-1) for part in hidden.split(block)])

    def _with_weight(self, function: Callable[..., Any], hidden: Tensor) -> Any:
        """``function(hidden, weight, bias=, logit_scale=, softcap=)``, run as the head module's forward if it must be."""

        def run(hidden: Tensor) -> Any:
            weight, bias = self.weight, self.bias
            if self.is_gathered:
                weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
            if bias is not None and self.logit_scale != 1.0:
                bias = self.logit_scale * bias  # models scale the output of the head, which includes the bias
            return function(hidden, weight, bias=bias, logit_scale=self.logit_scale, softcap=self.softcap)

        if self.module is None:
            return run(hidden)
        self.module.forward = run
        try:
            return self.module(hidden)
        finally:
            del self.module.forward


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    z = logit_scale * nn.functional.linear(hidden, weight).float()
    z = z if bias is None else z + bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def check_present(model: nn.Module) -> None:
    """Raise :class:`EUAError` if a weight is not in memory, as where accelerate offloads it to the CPU or to a disk."""
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise EUAError(
            f"{len(absent)} weights of {type(unwrap(model)).__name__} are offloaded or not loaded (the first is {absent[0]}), "
            "so they cannot be read: load the model without a device_map that offloads, on devices with enough memory, "
            "quantized, or whole on the CPU."
        )


def output_module(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits.

    Raises:
        EUAError: when the model does not generate a text from left to right, when it has no head or one that is offloaded, or
            when its head is more than a matrix and a bias.
    """
    model = unwrap(model)
    module = None
    if isinstance(model, PreTrainedModel):
        _check_generates(model)
        module = model.get_output_embeddings()
    if module is None:
        raise EUAError(
            f"{type(model).__name__} has no output head, so its tokens have no energy: "
            "load it as a causal language model, e.g. with AutoModelForCausalLM."
        )
    weight = getattr(module, "weight", None)
    if isinstance(module, BaseTunerLayer):
        raise EUAError(
            f"An adapter sits on the output head of {type(model).__name__}, and the energy reads the head's plain matrix, so "
            "the adapter would never be trained: leave the head out of target_modules, or train all of it with modules_to_save."
        )
    if not isinstance(weight, Tensor) or len(full_shape(weight)) != 2 or weight.dtype not in _HEAD_DTYPES:
        raise EUAError(
            f"The output head of {type(model).__name__} is a {type(module).__name__} without a plain (V, H) weight matrix, "
            "which the energy needs: leave the head out of quantization and of LoRA's target_modules."
        )
    if weight.is_meta:
        check_present(model)
    return module


def _check_generates(model: PreTrainedModel) -> None:
    """Raise for encoder–decoder models and for models that only fill gaps."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise EUAError(
            f"{type(model).__name__} is an encoder–decoder model, in which one part reads the prompt and another writes the "
            "answer, but energies are defined for one text from left to right: use a causal language model "
            "(AutoModelForCausalLM)."
        )
    if model.get_output_embeddings() is not None and not model.can_generate():
        raise EUAError(
            f"{type(model).__name__} generates no text, so there is neither an answer to forget nor one to refuse: "
            "load a causal language model (AutoModelForCausalLM)."
        )


def output_head(model: nn.Module) -> Head:
    """The head's tensors as the model uses them now, with the scale and softcap that its config states.

    A head of which each process holds a part is gathered, so all processes call this. Adapters that replace the head's
    weight (PEFT's ``modules_to_save`` and ``trainable_token_indices``) are in it, with their gradients; a low-rank adapter on
    the head is refused, see :func:`output_module`.
    """
    module = output_module(model)
    config: Any = getattr(unwrap(model), "config", None)
    config = config.get_text_config()
    scale = 1.0
    for name in _DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    for name in _FACTORS:
        scale *= getattr(config, name, None) or 1.0
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", getattr(module, "bias", None))
    if is_partitioned(weight):
        return Head(weight, bias, scale, softcap, module)
    full_bias = None if bias is None else full_tensor(bias)
    return Head(full_tensor(weight), full_bias, scale, softcap, is_gathered=isinstance(weight, DTensor))


def vocabulary_and_device(model: nn.Module) -> tuple[int, torch.device]:
    """The number of rows of the head, and the device of the model's inputs; gathers nothing."""
    weight = cast(Tensor, output_module(model).weight)
    return full_shape(weight)[0], weight.device


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, torch.compile or PEFT."""
    while True:
        if isinstance(model, PeftModel):
            model = model.get_base_model()
            continue
        children = dict(model.named_children())
        inner = children.get("module", children.get("_orig_mod"))
        if inner is None:
            return model
        model = inner
