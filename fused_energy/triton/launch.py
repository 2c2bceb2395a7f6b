"""The arguments of every launch: tensors, strides, options, launch settings, and which tokens to compute."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fused_energy.common import HeadOptions
from fused_energy.triton import configs
from fused_energy.triton.configs import Config

SCRATCH_BYTES = 24 * 2**20  # of a stretch of probabilities or gradients, and as much for sums made from it, whatever N and V
SPLIT_BYTES = 2**20  # of partial maxima, and as much for each partial sum
PROGRAMS = 2048  # enough to fill any GPU several times over; fewer, longer programs fold more of the vocabulary on the chip
LONGEST_STRETCH = 65536  # columns; with few tokens, more columns gain nothing


class Problem:
    """Tokens (N, H), a head (V, H), and the tokens to compute: the first ``count`` of ``order``."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor | None,
        options: HeadOptions,
        chosen: Tensor | None,  # (N,) bool; None for all
    ) -> None:
        self.hidden, self.weight, self.options = hidden, weight, options
        self.tokens, self.hidden_size = hidden.shape
        self.vocabulary = weight.shape[0]
        self.has_bias, self.has_targets = bias is not None, targets is not None
        self.and_at_one = targets is not None and options.temperature != 1.0
        # Kernels take a pointer for everything; a pointer that stands for None is never read.
        self.bias = hidden if bias is None else bias.contiguous()
        self.targets = hidden if targets is None else targets
        if chosen is None:
            self.order = torch.arange(self.tokens, device=hidden.device)
            self.count = self.order.new_full((1,), self.tokens)
        else:
            self.order = torch.argsort(~chosen, stable=True)
            self.count = chosen.sum().view(1)
        self.configs = configs.choose(hidden, weight)
        more_registers = self.and_at_one or options.softcap is not None
        self.logits_config = self.configs.logits_with_softcap if more_registers else self.configs.logits

    def head_arguments(self) -> tuple[Any, ...]:
        """The arguments from ``hidden_size`` to ``inverse_temperature`` of all kernels that compute logits."""
        options = self.options
        return (
            self.hidden_size,
            self.vocabulary,
            *self.hidden.stride(),
            *self.weight.stride(),
            float(options.logit_scale),
            float(options.softcap or 0.0),
            1.0 / options.temperature,
        )

    def head_constants(self) -> dict[str, Any]:
        """The compile-time arguments of the kernels that compute logits."""
        return self.tile_constants(self.logits_config) | {
            "HAS_BIAS": self.has_bias,
            "HAS_SOFTCAP": self.options.softcap is not None,
            "HAS_TARGETS": self.has_targets,
            "AND_AT_ONE": self.and_at_one,
            "WHOLE_DEPTH": self.hidden_size % self.logits_config.depth == 0,
        }

    def tile_constants(self, config: Config) -> dict[str, Any]:
        """Sizes, and the precision of float32 products: PyTorch's setting, which by default is full precision."""
        interpreted = self.hidden.device.type == "cpu"
        return {
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "DEPTH": config.depth,
            "GROUP": config.group,
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            "UPCAST": interpreted,  # the interpreter computes wrong products of bfloat16
            "num_warps": config.warps,
            "num_stages": config.stages,
        }

    def splits(self) -> tuple[int, int]:
        """The number of stretches the vocabulary is split into, each folded by one program, and the number of tiles in each."""
        tile = self.logits_config
        row_tiles, column_tiles = triton.cdiv(self.tokens, tile.rows), triton.cdiv(self.vocabulary, tile.columns)
        wanted = max(1, min(column_tiles, PROGRAMS // row_tiles, SPLIT_BYTES // (4 * self.tokens)))
        tiles_per_split = triton.cdiv(column_tiles, wanted)
        return triton.cdiv(column_tiles, tiles_per_split), tiles_per_split

    def rows_and_stretch(self, copies: int, bytes_per_row: int) -> tuple[int, int]:
        """How many tokens, and how many columns of the vocabulary, to handle at a time so that scratch memory stays bounded.

        ``copies`` tiles of (rows, stretch) in the dtype of ``hidden`` must fit, and ``bytes_per_row`` for every token.
        """
        tile = self.logits_config
        rows = min(self.tokens, max(tile.rows, SCRATCH_BYTES // bytes_per_row // tile.rows * tile.rows))
        bytes_per_column = copies * self.padded(rows) * self.hidden.element_size()
        columns = min(self.vocabulary, LONGEST_STRETCH, SCRATCH_BYTES // bytes_per_column)
        return rows, max(tile.columns, triton.cdiv(columns, tile.columns) * tile.columns)

    def padded(self, rows: int) -> int:
        """``rows`` of scratch, rounded up to whole tiles of every kernel that reads or writes them."""
        largest = max(self.logits_config.rows, self.configs.by_head.rows)
        return triton.cdiv(rows, largest) * largest
