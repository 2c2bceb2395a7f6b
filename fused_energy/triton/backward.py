"""The gradients of logits and head, one stretch of the vocabulary at a time, for tokens with a nonzero upstream gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_energy import common as shared
from fused_energy.common import HeadOptions
from fused_energy.triton.launch import Problem
from fused_energy.triton.product import head_by_tokens
from fused_energy.triton.tiles import active_rows, grouped_tile, logits_tile, target_column


@triton.jit
def _logit_gradient_kernel(
    hidden,
    weight,
    bias,
    targets,
    order,
    count,
    energy,  # (N,), at the temperature
    energy_at_one,
    grad_energy,  # (N,)
    grad_energy_at_one,
    grad_target,  # (N,)
    gradient,  # (slots, stretch): logit_scale · dL/dx, with x the logits before the softcap
    bias_sums,  # (row tiles, stretch): dL/dx summed over the tokens of a tile
    first_slot,
    slots,
    first_column,
    column_tiles,
    hidden_size,
    vocabulary,
    hidden_stride,
    hidden_step,
    weight_stride,
    weight_step,
    logit_scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    AND_AT_ONE: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    WHOLE_DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``dL/dx = (g_y · onehot − Σ_k g_k · softmax(z/T_k)) · slope``, one tile of it."""
    row_tile, column_tile = grouped_tile(tl.program_id(0), tl.cdiv(slots, ROWS), column_tiles, GROUP)
    local = row_tile * ROWS + tl.arange(0, ROWS)
    offsets = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    stretch = column_tiles * COLUMNS
    if first_slot + row_tile * ROWS >= tl.load(count):
        if NEEDS_BIAS:
            tl.store(bias_sums + row_tile.to(tl.int64) * stretch + offsets, tl.zeros((COLUMNS,), tl.float32))
        return
    rows, held = active_rows(order, count, first_slot + local)
    columns = offsets.to(tl.int64) + first_column
    z = logits_tile(
        hidden, weight, bias, rows, columns, hidden_size, vocabulary, hidden_stride, hidden_step, weight_stride,
        weight_step, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, WHOLE_DEPTH, ROWS, COLUMNS, DEPTH, PRECISION, UPCAST,
    )  # fmt: skip
    g = tl.load(grad_energy + rows, mask=held, other=0.0)
    # The sum before the product: exp(z/T − lse) would carry the rounding of lse, which a small T makes large.
    dz = -g[:, None] * tl.exp((z + tl.load(energy + rows)[:, None]) * inverse_temperature)
    if AND_AT_ONE:
        g = tl.load(grad_energy_at_one + rows, mask=held, other=0.0)
        dz -= g[:, None] * tl.exp(z + tl.load(energy_at_one + rows)[:, None])
    if HAS_TARGETS:
        g = tl.load(grad_target + rows, mask=held, other=0.0)
        target = target_column(targets, rows, first_column + column_tile * COLUMNS, vocabulary, COLUMNS)
        dz += tl.where(tl.arange(0, COLUMNS)[None, :] == target[:, None], g[:, None], 0.0)
    if HAS_SOFTCAP:
        dz *= 1 - (z / softcap) * (z / softcap)
    # An empty slot points at an arbitrary token, whose hidden state may hold anything: the NaN of 0 · inf must not be stored.
    dz = tl.where(held[:, None] & (columns < vocabulary)[None, :], dz, 0.0)
    if NEEDS_BIAS:
        tl.store(bias_sums + row_tile.to(tl.int64) * stretch + offsets, tl.sum(dz, 0))
    first = row_tile.to(tl.int64) * ROWS * stretch + column_tile * COLUMNS
    within = tl.arange(0, ROWS)[:, None] * stretch + tl.arange(0, COLUMNS)[None, :]
    tl.store(gradient + first + within, (dz * logit_scale).to(gradient.dtype.element_ty))


def head_gradient(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor | None,  # (N,)
    options: HeadOptions,
    energy: Tensor,  # (K, N)
    grad_energy: Tensor,  # (K, N)
    grad_target: Tensor,  # (N,), ignored without targets
    needs: tuple[bool, bool],  # of weight, of bias
) -> tuple[Tensor | None, Tensor | None]:
    """Handle one stretch of the vocabulary after the other; each is summed over all tokens in float32 before it is written."""
    make = torch.zeros if hidden.shape[0] == 0 else torch.empty
    grad_weight = make(weight.shape, dtype=weight.dtype, device=weight.device) if needs[0] else None
    grad_bias = make(weight.shape[0], dtype=weight.dtype, device=weight.device) if needs[1] else None
    active = shared.active_tokens(targets, grad_energy, grad_target)
    if hidden.shape[0]:
        with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
            problem = Problem(hidden, weight, bias, targets, options, active)
            _fill(problem, energy, grad_energy.contiguous(), grad_target.contiguous(), grad_weight, grad_bias)
    return grad_weight, grad_bias


def _fill(
    problem: Problem,
    energy: Tensor,  # (K, N)
    grad_energy: Tensor,  # (K, N)
    grad_target: Tensor,  # (N,)
    grad_weight: Tensor | None,  # (V, H), written
    grad_bias: Tensor | None,  # (V,), written
) -> None:
    tile = problem.logits_config
    rows, stretch = problem.rows_and_stretch(1, tile.columns * problem.hidden.element_size())
    gradient = problem.hidden.new_empty(problem.padded(rows), stretch)
    for columns in shared.blocks(problem.vocabulary, stretch):
        column_tiles = triton.cdiv(columns.stop - columns.start, tile.columns)
        width = column_tiles * tile.columns
        sums = None
        if grad_weight is not None and rows < problem.tokens:
            sums = energy.new_empty(columns.stop - columns.start, problem.hidden_size)
        sum_bias = energy.new_zeros(width)
        for block in shared.blocks(problem.tokens, rows):
            slots = block.stop - block.start
            bias_sums = energy.new_empty(triton.cdiv(slots, tile.rows) if grad_bias is not None else 0, width)
            _logit_gradient_kernel[(triton.cdiv(slots, tile.rows) * column_tiles,)](
                problem.hidden,
                problem.weight,
                problem.bias,
                problem.targets,
                problem.order,
                problem.count,
                energy[0],
                energy[-1],
                grad_energy[0],
                grad_energy[-1],
                grad_target,
                gradient,
                bias_sums,
                block.start,
                slots,
                columns.start,
                column_tiles,
                *problem.head_arguments(),
                **problem.head_constants(),
                NEEDS_BIAS=grad_bias is not None,
            )
            if grad_weight is not None:
                head_by_tokens(problem, gradient, width, block, grad_weight[columns] if sums is None else sums)
            if grad_bias is not None:
                sum_bias += bias_sums.sum(dim=0)
        if grad_weight is not None and sums is not None:
            grad_weight[columns] = sums
        if grad_bias is not None:
            grad_bias[columns] = sum_bias[: columns.stop - columns.start]
