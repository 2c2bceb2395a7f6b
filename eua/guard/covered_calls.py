"""Which calls of ``generate`` a guard covers. Any other call raises an error, so that no unguarded answer looks guarded."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from eua.errors import EUAError
from eua.model.energy_recorder import end_ids

if TYPE_CHECKING:
    from eua.guard.guard import EnergyGuard

GUARDED_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)


def check_call(model: PreTrainedModel, guard: EnergyGuard, kwargs: Mapping[str, Any]) -> GenerationConfig:
    """Check a call, and return the settings that ``generate`` will use.

    Raises:
        EUAError: when the guard would not see or not control what the call generates.
    """
    config = copy.deepcopy(kwargs.get("generation_config") or GenerationConfig())
    config.update(**model.generation_config.to_dict(), defaults_only=True)  # the model decides what the caller leaves open
    config.update(**{key: value for key, value in kwargs.items() if hasattr(config, key)})
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in GUARDED_MODES or kwargs.get("custom_generate") is not None:
        name = "custom_generate" if mode in GUARDED_MODES else mode.value
        raise EUAError(
            f"The guard does not cover generation by {name}: use greedy search, sampling, beams or assisted decoding."
        )
    if mode == GenerationMode.ASSISTED_GENERATION:
        _check_drafts(model, guard, config, kwargs)
    if config.guidance_scale not in (None, 1, 1.0):
        raise EUAError("guidance_scale runs prompts that the guard does not score: leave it out, or detach the guard.")
    if model.training:
        raise EUAError("The model is in training mode, where dropout changes energies: call model.eval() first.")
    if kwargs.get("adapter_names") is not None:
        raise EUAError("adapter_names chooses an adapter per row, but the guard is calibrated for one choice: use set_adapter.")
    if guard.turns is not None and kwargs.get("inputs_embeds") is not None:
        raise EUAError("With inputs_embeds the guard cannot find the user's last turn: pass input_ids, or detach the guard.")
    mask = prompt_mask(kwargs, config)
    if mask is not None and not mask[:, -1].all():
        raise EUAError(
            "The prompts are padded on the right, so their last token is not where the answer starts: "
            'set tokenizer.padding_side = "left".'
        )
    _check_output(guard, config)
    if (guard.first_tokens or guard.probe_window) and (config.num_beams or 1) > 1:
        raise EUAError(
            "The guard reads the energies of generated tokens, and beam search moves tokens between beams: use greedy search "
            "or sampling, or calibrate with first_tokens = 0 and without a probe."
        )
    return config


def _check_drafts(model: PreTrainedModel, guard: EnergyGuard, config: GenerationConfig, kwargs: Mapping[str, Any]) -> None:
    """Raise for kinds of drafts that the guard would confuse with the model's own tokens, or that would survive a refusal."""
    others = ("assistant_early_exit", "use_mtp", "speculation_type", "assistant_ensemble_weight")
    found = [name for name in others if getattr(config, name, None)]
    found += [name for name in ("assistant_tokenizer",) if kwargs.get(name) is not None]
    if found:
        raise EUAError(
            f"The guard does not cover assisted decoding with {' and '.join(found)}: use an assistant_model that shares the "
            "tokenizer, or prompt_lookup_num_tokens."
        )
    if guard.first_tokens or guard.probe_window:
        raise EUAError(
            "The guard reads the energies of generated tokens, and assisted decoding also generates tokens that it drops: "
            "calibrate with first_tokens = 0 and without a probe, or generate without an assistant."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        raise EUAError(
            f"{type(model).__name__} computes logits of whole prompts, in which the guard cannot find the last token during "
            "assisted decoding: generate without an assistant."
        )


def _check_output(guard: EnergyGuard, config: GenerationConfig) -> None:
    """Raise if the output would contain what the model was about to say in a refused row.

    Logits and hidden states are the model's own at every step. Scores are those after the refusal was forced, unless the guard
    decides later.
    """
    revealing = ["output_logits", "output_hidden_states"]
    if guard.first_tokens:
        revealing += ["output_scores", "output_attentions"]
    requested = [name for name in revealing if getattr(config, name, None)]
    if requested and config.return_dict_in_generate:
        later = f", whose score includes the first {guard.first_tokens} generated tokens" if guard.first_tokens else ""
        raise EUAError(
            f"{' and '.join(requested)} would reveal how a refused row began without the guard{later}: leave it out, or detach "
            "the guard."
        )


def given_ids(arguments: Mapping[str, Any]) -> Tensor | None:
    """The token ids that a ``generate`` call is given."""
    return arguments.get("inputs") if arguments.get("input_ids") is None else arguments.get("input_ids")


def prompt_mask(arguments: Mapping[str, Any], config: GenerationConfig) -> Tensor | None:
    """Which positions of the prompts contain tokens, as ``generate`` sees them: (B, S) bool; None if there is no prompt."""
    mask, ids, pad = arguments.get("attention_mask"), given_ids(arguments), config.pad_token_id
    if mask is not None and mask.ndim == 2:
        return mask.bool()
    if ids is None:
        return None
    is_marked = pad is not None and pad not in end_ids(config.eos_token_id)
    return ids != pad if is_marked else torch.ones_like(ids, dtype=torch.bool)
