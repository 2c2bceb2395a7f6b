"""What the kernels share: one tile of logits, computed on the chip."""

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
def active_rows(order, count, slots):
    """The tokens in these slots, int64, and which of the slots hold one. An empty slot points at an arbitrary token."""
    held = slots < tl.load(count)
    return tl.load(order + slots, mask=held, other=0).to(tl.int64), held


@triton.jit
def target_column(targets, rows, start, vocabulary, COLUMNS: tl.constexpr):
    """The column of each token's target in the tile of the vocabulary that begins at ``start``; −1 if it is not in the tile.

    Columns have 32 bits, like the logits: a tile of 64-bit comparisons would not fit into the registers next to the logits.
    """
    target = tl.load(targets + rows)
    here = (target >= start) & (target < tl.minimum(start + COLUMNS, vocabulary))
    return tl.where(here, target - start, -1).to(tl.int32)


@triton.jit
def logits_tile(
    hidden,  # pointer to (N, H)
    weight,  # pointer to (V, H)
    bias,  # pointer to (V,)
    rows,  # (rows of the tile,) int64, all of them valid tokens
    columns,  # (columns of the tile,) int64, may exceed V
    hidden_size,
    vocabulary,
    hidden_stride,
    hidden_step,
    weight_stride,
    weight_step,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WHOLE_DEPTH: tl.constexpr,  # whether DEPTH divides the hidden size
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``softcap(logit_scale · (h Wᵀ) + b)``, (ROWS, COLUMNS) float32; −∞ in columns past the vocabulary."""
    tl.assume(hidden_size > 0)  # without it, triton 3.6 may serialize the tensor cores' products (warning C7515)
    depth = tl.arange(0, DEPTH)
    inside = columns < vocabulary
    # Columns past the end read the last row of the head, so that no load needs a mask over the vocabulary.
    readable = tl.minimum(columns, vocabulary - 1)
    left = hidden + rows[:, None] * hidden_stride + depth[None, :] * hidden_step
    right = weight + readable[None, :] * weight_stride + depth[:, None] * weight_step
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, hidden_size, DEPTH):
        if WHOLE_DEPTH:
            h = tl.load(left)
            w = tl.load(right)
        else:
            h = tl.load(left, mask=(start + depth)[None, :] < hidden_size, other=0.0)
            w = tl.load(right, mask=(start + depth)[:, None] < hidden_size, other=0.0)
        if UPCAST:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        z = tl.dot(h, w, z, input_precision=PRECISION)
        left += DEPTH * hidden_step
        right += DEPTH * weight_step
    z *= logit_scale
    if HAS_BIAS:
        z += tl.load(bias + readable).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return tl.where(inside[None, :], z, float("-inf"))


@triton.jit
def tanh(x):
    """tanh that keeps its relative accuracy near 0, where ``2σ(2x) − 1`` alone suffers from cancellation."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.09, series, 2 * tl.sigmoid(2 * x) - 1)
