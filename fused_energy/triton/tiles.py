"""What the kernels share: one tile of products, computed on the chip, and the softcap."""

from __future__ import annotations

import triton
import triton.language as tl

FINITE_MAX = tl.constexpr(3.0e38)  # a running maximum is held within ±this: an infinite one would be subtracted from itself


@triton.jit
def grouped_tile(program, row_tiles, column_tiles, group: tl.constexpr):
    """(row tile, column tile) of a program; ``group`` row tiles walk through the columns together, to reuse the L2 cache."""
    first = program // (group * column_tiles) * group
    size = tl.minimum(row_tiles - first, group)
    within = program % (group * column_tiles)
    return first + within % size, within // size


@triton.jit
def products_tile(
    hidden,  # (N, H): a pointer, or with TMA a descriptor of blocks (ROWS, DEPTH)
    weight,  # (V, H): a pointer, or with TMA a descriptor of blocks (COLUMNS, DEPTH)
    first_row,
    first_column,
    tokens,
    vocabulary,
    hidden_size,
    hidden_stride,
    hidden_step,
    weight_stride,
    weight_step,
    TMA: tl.constexpr,  # whether Hopper's tensor memory accelerator loads the operands
    WHOLE_DEPTH: tl.constexpr,  # whether DEPTH divides the hidden size
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``h Wᵀ``, (ROWS, COLUMNS) float32. Rows past the tokens and columns past the vocabulary hold anything."""
    tl.assume(hidden_size > 0)  # without it, triton 3.6 may serialize the tensor cores' products (warning C7515)
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    if TMA:
        for start in range(0, hidden_size, DEPTH):
            z = tl.dot(hidden.load([first_row, start]), weight.load([first_column, start]).T, z, input_precision=PRECISION)
    else:
        # What lies past the end reads the last row instead, so that no load needs a mask over tokens or vocabulary.
        rows = tl.minimum(first_row + tl.arange(0, ROWS), tokens - 1).to(tl.int64)
        columns = tl.minimum(first_column + tl.arange(0, COLUMNS), vocabulary - 1).to(tl.int64)
        depth = tl.arange(0, DEPTH)
        left = rows[:, None] * hidden_stride + depth[None, :] * hidden_step
        right = columns[None, :] * weight_stride + depth[:, None] * weight_step
        for start in range(0, hidden_size, DEPTH):
            if WHOLE_DEPTH:
                h = tl.load(hidden + left)
                w = tl.load(weight + right)
            else:
                h = tl.load(hidden + left, mask=(start + depth)[None, :] < hidden_size, other=0.0)
                w = tl.load(weight + right, mask=(start + depth)[:, None] < hidden_size, other=0.0)
            if UPCAST:
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(h, w, z, input_precision=PRECISION)
            hidden += DEPTH * hidden_step
            weight += DEPTH * weight_step
    return z


@triton.jit
def capped(z, softcap):
    """``c · tanh(z/c)``."""
    return softcap * tanh(z / softcap)


@triton.jit
def tanh(x):
    """tanh that keeps its relative accuracy near 0, where ``2σ(2x) − 1`` alone suffers from cancellation."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.09, series, 2 * tl.sigmoid(2 * x) - 1)
