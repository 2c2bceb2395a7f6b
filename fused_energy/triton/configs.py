"""Launch settings as plain data, by kind of GPU.

Each tile must fit the shared memory of its GPU without spilling registers; the tests compile every kernel with every setting
for its GPU and check both. Which of the fitting settings is fastest can only be measured on that GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Config(NamedTuple):
    """Tile of one program: ``rows × columns`` of its output, summed in steps of ``depth``. ``group`` row tiles walk through the
    columns together, so that what they load stays in the L2 cache."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 16


class Configs(NamedTuple):
    """The columns of ``logits`` and ``logits_with_softcap`` are multiples of the products' rows and depth, see product.py."""

    logits: Config  # kernels that compute logits: output tokens × vocabulary
    logits_with_softcap: Config  # also for two temperatures: both need more registers
    by_head: Config  # probabilities times rows of the head: output tokens × hidden size
    by_tokens: Config  # gradients of logits times hidden states: output vocabulary × hidden size


_GENERAL = Config(64, 64, 32, 8, 2)
GENERAL = Configs(_GENERAL, _GENERAL, _GENERAL, _GENERAL)  # for float32, and for strides that do not allow wide loads

HALF_PRECISION: dict[str, Configs] = {
    "sm80": Configs(
        logits=Config(128, 128, 32, 8, 4),
        logits_with_softcap=Config(64, 128, 32, 8, 4),
        by_head=Config(128, 128, 32, 8, 4),
        by_tokens=Config(128, 128, 32, 8, 4),
    ),
    "sm90": Configs(
        logits=Config(128, 256, 64, 8, 3),
        logits_with_softcap=Config(128, 128, 64, 8, 3),
        by_head=Config(128, 256, 64, 8, 3),
        by_tokens=Config(128, 256, 64, 8, 4),
    ),
    "sm100": Configs(
        logits=Config(128, 128, 64, 8, 3),
        logits_with_softcap=Config(128, 128, 64, 8, 3),
        by_head=Config(128, 128, 64, 8, 3),
        by_tokens=Config(128, 128, 64, 8, 3),
    ),
    "hip": Configs(
        logits=Config(128, 128, 32, 8, 2),
        logits_with_softcap=Config(128, 128, 32, 8, 2),
        by_head=Config(128, 128, 32, 8, 2),
        by_tokens=Config(128, 128, 32, 8, 2),
    ),
}

_TINY = Config(16, 16, 16, 1, 1, 2)
TINY = Configs(_TINY._replace(columns=32), _TINY._replace(columns=32), _TINY, _TINY)  # every test crosses several tiles


def kind(device: torch.device) -> str:
    """The key of the table for a GPU. GPUs of compute capability 8.x and 12.x, whose shared memory can be as small as 99 KiB,
    use the settings of 8.0, which fit."""
    if torch.version.hip is not None:
        return "hip"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


def choose(hidden: Tensor, weight: Tensor) -> Configs:
    """The settings for these inputs."""
    if hidden.device.type == "cpu":
        return TINY  # the interpreter
    wide = all(x.stride(1) == 1 and x.stride(0) % 16 == 0 for x in (hidden, weight))
    return HALF_PRECISION[kind(hidden.device)] if hidden.element_size() == 2 and wide else GENERAL
