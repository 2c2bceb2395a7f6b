"""What a model was trained to forget: digests of the prompts, kept with the model, so that no guard is calibrated on them.

The digests contain no text, but they confirm a guess: whoever knows a prompt can find out whether it is among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from eua.errors import EUAError
from eua.files import write_json
from eua.model.head import unwrap

FORGOTTEN_FILE = "forgotten_prompts.json"
_ATTRIBUTE = "forgotten_prompts"


def prompt_digest(ids: Sequence[int]) -> str:
    """SHA-256 of a prompt's token ids, of a tokenizer :func:`eua.data.dates.at_same_date`."""
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()


def forgotten_prompts(model: nn.Module) -> frozenset[str]:
    """The digests of the prompts that a model has forgotten, as far as is known.

    They are known of a model that was trained in this process, or that was loaded from the folder of one. transformers does not
    say from which folder it loaded an adapter; :func:`eua.model.loading.load_model` does.
    """
    model = unwrap(model)
    known: frozenset[str] | None = getattr(model, _ATTRIBUTE, None)
    if known is None:
        known = read_forgotten(getattr(getattr(model, "config", None), "name_or_path", None) or "")
    return known


def set_forgotten(model: nn.Module, digests: Iterable[str]) -> None:
    setattr(unwrap(model), _ATTRIBUTE, frozenset(digests))


def write_forgotten(folder: Path, digests: Iterable[str]) -> None:
    write_json(folder / FORGOTTEN_FILE, {"sha256": sorted(digests)})


def read_forgotten(folder: str) -> frozenset[str]:
    """The digests in a model's folder; none if there is no such folder or file.

    Raises:
        EUAError: if the file is not one that :func:`write_forgotten` wrote.
    """
    path = Path(folder) / FORGOTTEN_FILE
    if not folder or not path.is_file():
        return frozenset()
    try:
        return frozenset(map(str, json.loads(path.read_text(encoding="utf-8"))["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EUAError(
            f"{path} does not contain digests of forgotten prompts ({error!r}): put the file of the unlearned model back, or "
            "delete it, and pass the rows to forget as seen= to calibration."
        ) from error
