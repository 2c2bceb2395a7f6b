"""Launch settings as plain data, by kind of GPU.

Each tile must fit the shared memory of its GPU without spilling registers; the tests compile every kernel with every setting
for its GPU and check both. Which of the fitting settings is fastest can only be measured on that GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from fused_energy.triton.launch import Problem


class Config(NamedTuple):
    """Tile of one program: ``rows × columns`` of its output, summed in steps of ``depth``. ``group`` row tiles walk through the
    columns together, so that what they load stays in the L2 cache."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 16


GENERAL = Config(64, 64, 32, 8, 2)  # for float32, and for strides that do not allow wide loads
TINY = Config(16, 32, 16, 1, 1, 2)  # for the interpreter: every test crosses several tiles
HALF_PRECISION = {
    "sm80": Config(128, 128, 32, 8, 4),
    "sm90": Config(128, 256, 64, 8, 4, 8),
    "sm100": Config(128, 128, 64, 8, 3),
    "hip": Config(128, 128, 32, 8, 2),
}
# With a softcap or two temperatures, which need more registers.
HALF_PRECISION_WITH_MORE = HALF_PRECISION | {"sm80": Config(64, 128, 32, 8, 4), "sm90": Config(128, 256, 64, 8, 3, 8)}


def kind(device: torch.device) -> str:
    """The key of the table for a GPU. GPUs of compute capability 8.x and 12.x, whose shared memory can be as small as 99 KiB,
    use the settings of 8.0, which fit."""
    if torch.version.hip is not None:
        return "hip"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


def interpreted(device: torch.device) -> bool:
    return device.type == "cpu"


def choose(problem: Problem) -> Config:
    """The settings for these inputs."""
    hidden, weight = problem.hidden, problem.weight
    if interpreted(hidden.device):
        return TINY
    if hidden.element_size() != 2 or any(x.stride(1) != 1 or x.stride(0) % 16 for x in (hidden, weight)):
        return GENERAL
    more = problem.and_at_one or problem.options.softcap is not None
    return (HALF_PRECISION_WITH_MORE if more else HALF_PRECISION)[kind(hidden.device)]


def takes_descriptors(x: Tensor) -> bool:
    """Whether Hopper's tensor memory accelerator can load blocks of ``x`` (rows, H)."""
    fits = x.element_size() == 2 and x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    return fits and not interpreted(x.device) and kind(x.device) == "sm90"


def descriptor(x: Tensor, rows: int, depth: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, depth])


def constants(tile: Config, device: torch.device) -> dict[str, Any]:
    """Sizes, and the precision of float32 products: PyTorch's setting, which by default is full precision."""
    return {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": tile.group,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "UPCAST": interpreted(device),  # the interpreter computes wrong products of bfloat16
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
