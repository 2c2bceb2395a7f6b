"""Matrix products over a number of tokens that only the device knows.

The probabilities and gradients that they read are padded to whole tiles, with zeros past the vocabulary: the columns of a tile
of logits must be a multiple of the product's rows and of its depth.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_energy.triton.launch import Problem
from fused_energy.triton.tiles import grouped_tile


@triton.jit
def _tokens_by_head_kernel(
    left,  # (slots, stretch): probabilities
    right,  # (stretch, H): rows of the head
    sums,  # (slots, H), float32
    count,
    first_slot,
    slots,
    stretch,  # number of columns of ``left`` that belong to the vocabulary
    left_stride,
    hidden_size,
    right_stride,
    right_step,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``sums += left @ right`` for the slots that hold a token."""
    row_tile, column_tile = grouped_tile(tl.program_id(0), tl.cdiv(slots, ROWS), tl.cdiv(hidden_size, COLUMNS), GROUP)
    if first_slot + row_tile * ROWS >= tl.load(count):
        return
    rows = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    inside = columns < hidden_size
    a = left + rows[:, None] * left_stride + depth[None, :]
    b = right + depth.to(tl.int64)[:, None] * right_stride + columns.to(tl.int64)[None, :] * right_step
    advance = tl.full((), DEPTH, tl.int64) * right_stride

    sums += row_tile.to(tl.int64) * ROWS * hidden_size
    places = tl.arange(0, ROWS)[:, None] * hidden_size + columns[None, :]
    mask = (first_slot + rows < tl.load(count))[:, None] & inside[None, :]
    product = tl.load(sums + places, mask=mask, other=0.0)
    for start in range(0, stretch, DEPTH):
        p = tl.load(a)  # zero past the vocabulary
        w = tl.load(b, mask=((start + depth) < stretch)[:, None] & inside[None, :], other=0.0)
        if UPCAST:
            p = p.to(tl.float32)
            w = w.to(tl.float32)
        product = tl.dot(p, w, product, input_precision=PRECISION)
        a += DEPTH
        b += advance
    tl.store(sums + places, product, mask=mask)


@triton.jit
def _head_by_tokens_kernel(
    gradient,  # (slots, stretch)
    hidden,  # (N, H)
    order,
    count,
    out,  # (stretch, H): rows of the head's gradient, or their float32 sum so far
    first_slot,
    slots,
    stretch,  # number of columns of ``gradient`` that belong to the vocabulary
    gradient_stride,
    hidden_size,
    hidden_stride,
    hidden_step,
    ADD: tl.constexpr,  # whether to add to what ``out`` holds
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``out = gradientᵀ @ hidden`` over the slots that hold a token."""
    row_tile, column_tile = grouped_tile(tl.program_id(0), tl.cdiv(stretch, ROWS), tl.cdiv(hidden_size, COLUMNS), GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    own = tl.minimum(tl.load(count) - first_slot, slots)
    inside = columns < hidden_size
    steps = columns.to(tl.int64) * hidden_step
    a = gradient + depth.to(tl.int64)[None, :] * gradient_stride + rows[:, None]
    advance = tl.full((), DEPTH, tl.int64) * gradient_stride

    out += row_tile.to(tl.int64) * ROWS * hidden_size
    places = tl.arange(0, ROWS)[:, None] * hidden_size + columns[None, :]
    mask = (rows < stretch)[:, None] & inside[None, :]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    if ADD:
        product = tl.load(out + places, mask=mask, other=0.0)
    for start in range(0, own, DEPTH):
        here = start + depth < own
        tokens = tl.load(order + first_slot + start + depth, mask=here, other=0).to(tl.int64)
        g = tl.load(a, mask=here[None, :], other=0.0)
        h = tl.load(hidden + tokens[:, None] * hidden_stride + steps[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        if UPCAST:
            g = g.to(tl.float32)
            h = h.to(tl.float32)
        product = tl.dot(g, h, product, input_precision=PRECISION)
        a += advance
    tl.store(out + places, product.to(out.dtype.element_ty), mask=mask)


def add_tokens_by_head(problem: Problem, left: Tensor, columns: slice, left_stride: int, block: slice, sums: Tensor) -> None:
    """``sums`` (slots, H) += ``left`` (slots, stretch) @ the head's rows ``columns``, for the slots of ``block``."""
    tile, slots = problem.configs.by_head, block.stop - block.start
    _tokens_by_head_kernel[(triton.cdiv(slots, tile.rows) * triton.cdiv(problem.hidden_size, tile.columns),)](
        left,
        problem.weight[columns],
        sums,
        problem.count,
        block.start,
        slots,
        columns.stop - columns.start,
        left_stride,
        problem.hidden_size,
        *problem.weight.stride(),
        **problem.tile_constants(tile),
    )


def head_by_tokens(problem: Problem, gradient: Tensor, gradient_stride: int, block: slice, out: Tensor) -> None:
    """``out`` (stretch, H) = ``gradient``ᵀ (stretch, slots) @ the hidden states of the slots of ``block``.

    The first block overwrites ``out``, the others add to it.
    """
    tile = problem.configs.by_tokens
    _head_by_tokens_kernel[(triton.cdiv(out.shape[0], tile.rows) * triton.cdiv(problem.hidden_size, tile.columns),)](
        gradient,
        problem.hidden,
        problem.order,
        problem.count,
        out,
        block.start,
        block.stop - block.start,
        out.shape[0],
        gradient_stride,
        problem.hidden_size,
        *problem.hidden.stride(),
        ADD=block.start > 0,
        **problem.tile_constants(tile),
    )
