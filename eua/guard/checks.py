"""What a guard must be, and what it may be calibrated on and used with. Each check says what was passed and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import cast

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from eua.errors import EUAError
from eua.guard.questions import Turns, is_token
from eua.model.forgotten import forgotten_prompts, prompt_digest
from eua.model.head import check_present, unwrap
from eua.statistics import group_list, independent_groups

logger = logging.get_logger(__name__)


def check_unseen(prompts: Sequence[Sequence[int]], seen: Sequence[Sequence[int]]) -> None:
    """Raise if a prompt was trained on: such prompts have lower scores than new ones."""
    trained = {tuple(ids) for ids in seen}
    found = [index for index, ids in enumerate(prompts) if tuple(ids) in trained]
    if found:
        raise EUAError(
            f"{len(found)} of {len(prompts)} calibration prompts (the first is prompt {found[0]}) were trained on, so a "
            "threshold from them would refuse new prompts too often: calibrate on prompts that unlearning has not seen."
        )


def check_not_forgotten(prompts: Sequence[Sequence[int]], model: PreTrainedModel) -> None:
    """Raise if the model was trained to forget a prompt, :func:`at_same_date`: a threshold from them would let them pass."""
    forgotten = forgotten_prompts(model)
    found = [index for index, ids in enumerate(prompts) if forgotten and prompt_digest(ids) in forgotten]
    if found:
        named = ", ".join(f"row {index}" for index in found[:5]) + (", …" if len(found) > 5 else "")
        raise EUAError(
            f"{len(found)} of {len(prompts)} calibration prompts ({named}) are prompts that the model was trained to "
            "forget, and a threshold from them would let them pass: calibrate on prompts that must be answered."
        )


def without_copies(
    prompts: list[list[int]], groups: Iterable[Hashable] | None
) -> tuple[list[list[int]], list[Hashable] | None]:
    """The prompts and groups that count as independent, see :func:`.independent_groups`; a warning says what was found."""
    if groups is None:
        distinct = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]
        if len(distinct) < len(prompts):
            logger.warning(
                f"Only {len(distinct)} of the {len(prompts)} calibration prompts differ in their tokens. A copy adds nothing, "
                "so each counts once."
            )
        return distinct, None
    given = group_list(groups, len(prompts))
    owners = independent_groups(map(tuple, prompts), given)
    if len(set(owners)) < len(set(given)):
        logger.warning(
            f"Some of the {len(set(given))} groups of calibration prompts share a prompt with the same tokens, so they are not "
            f"independent: they are joined, and {len(set(owners))} groups remain."
        )
    return prompts, owners


def check_present_and_precise(model: PreTrainedModel) -> None:
    """Raise if weights are offloaded, or if the model would compute in another dtype than its own."""
    check_present(model)
    if torch.is_autocast_enabled(model.device.type):
        raise EUAError(
            "The guard is used under torch.autocast, which computes energies in another dtype than the model's: leave the "
            "autocast region, and load the model in the dtype that you want."
        )
    if hasattr(unwrap(model), "_original_forward"):
        raise EUAError(
            "The model computes under the autocast of a training (accelerate has wrapped its forward), so its energies are in "
            "another dtype than its weights: save the model and load it, or call "
            "accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30  # neither NaN nor infinity


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 < cast(float, value) < 1


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_tokens(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and all(is_token(token) for token in value)


def _or_none(rule: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or rule(value)


# The fields of a guard, what they must be, and whether a value is that.
FIELDS: tuple[tuple[str, str, Callable[[object], bool]], ...] = (
    ("threshold", "a finite number", _is_number),
    ("refusal_text", "a text with words", _is_text),
    ("refusal_ids", "one or more token ids", _are_tokens),
    ("stop_ids", "one or more token ids", _are_tokens),
    ("tolerance", "a number between 0 and 1", _is_share),
    ("calibration_prompts", "a whole number from 1", _is_count),
    ("calibration_groups", "a whole number from 1, or None", _or_none(_is_count)),
    ("turns", "what Turns.of() reads, or None", _or_none(lambda value: isinstance(value, Turns))),
    ("probe_threshold", "a finite number, or None", _or_none(_is_number)),
    ("confidence", "a number between 0 and 1, or None", _or_none(_is_share)),
    ("model_fingerprint", "a text, or None", _or_none(_is_text)),
    ("tokenizer_fingerprint", "a text, or None", _or_none(_is_text)),
    ("dtype", "a text, or None", _or_none(_is_text)),
)


def check_settings(temperature: float, first_tokens: int, probe_window: int, probe_tokens: int) -> None:
    """Raise unless these settings can be scored with; 0 tokens stand for none."""
    if not _is_number(temperature) or temperature <= 0:
        raise EUAError(
            f"temperature = {temperature!r}, but energies are divided by it: give a Python number above 0, as in training."
        )
    counts = {"first_tokens": first_tokens, "probe_window": probe_window, "probe_tokens": probe_tokens}
    for name, count in counts.items():
        if not _is_count(count) and (isinstance(count, bool) or count != 0):
            raise EUAError(f"{name} = {count!r} cannot be a number of tokens: give a Python int, or 0 for none.")


def check_probe(threshold: float, window: int, tokens: int) -> None:
    """Raise if the answers to the calibration prompts were too short for a probe's threshold."""
    if threshold == -math.inf:
        raise EUAError(
            f"Too few answers to the calibration prompts have {window} tokens within the first {tokens}, so there are too few "
            "means to set the probe's threshold: choose a smaller probe_window."
        )
