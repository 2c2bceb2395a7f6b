"""Loads a model and its tokenizer by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from eua.errors import EUAError
from eua.model.forgotten import read_forgotten, set_forgotten

_FILES = (
    "*config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "*.index.json",
    "*.safetensors",
)  # of model and tokenizer
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def load_model(name: str, dtype: Any = "auto", *, place: bool = True) -> tuple[Any, Any]:
    """The model and tokenizer of a folder or hub name, in eval mode and, with ``place``, on the fastest device.

    The tokenizer is loaded first: it is small, so a wrong name fails at once. Weights are read from safetensors only, since
    other formats can be pickles.

    Raises:
        EUAError: if nothing of that name can be loaded as a causal language model, or if it lacks weights.
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
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,  # no pickles
            ignore_mismatched_sizes=True,  # _check_whole refuses them, and names one
            output_loading_info=True,
        )
        settings = Path(name) / GENERATION_CONFIG_NAME
        if settings.is_file() and (damage := _damage(settings)):  # transformers would take its defaults
            raise ValueError(damage)
    _check_whole(name, found)
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


def _check_whole(name: str, found: dict[str, Any]) -> None:
    """Raise if weights are missing or have other shapes: transformers draws random ones. Tied weights are not missing."""
    if missing := sorted(found["missing_keys"]):
        raise EUAError(
            f"{name!r} lacks {len(missing)} of the model's weights (the first is {missing[0]}), which would be random numbers: "
            "download or save the model again, or correct its config.json."
        )
    if mismatched := sorted(found["mismatched_keys"]):
        weight, stored, wanted = mismatched[0]
        raise EUAError(
            f"{name!r} has {len(mismatched)} weights of other shapes than its config.json says (the first is {weight}, "
            f"{tuple(stored)} in place of {tuple(wanted)}): download or save the model again, or correct its config.json."
        )


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model, or if it carries an adapter its base with the adapter's weights added to its own; both say the same."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # from transformers, tokenizers, safetensors and the hub, without another common base class
        files = sorted(file for pattern in _FILES for file in Path(name).glob(pattern))
        reasons = (*filter(None, map(_damage, files)), str(error).strip(), type(error).__name__)
        reason = next(filter(None, reasons)).splitlines()[0]
        raise EUAError(
            f"{name!r} cannot be loaded as a causal language model ({reason}): check the path or name, and that its files are "
            "complete. Its weights must be safetensors."
        ) from error


def _damage(path: Path) -> str | None:
    """How a JSON or safetensors file is damaged; None if it is not."""
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            return f"{path.name} is a pointer of Git LFS, not the file: run `git lfs pull`"
        try:
            if path.suffix == ".json":
                json.loads(start + file.read())
                return None
            file.seek(0)
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            data = max((tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"), default=0)
            is_whole = file.tell() + data == path.stat().st_size
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
            is_whole = False
    return None if is_whole else f"{path.name} is damaged"
