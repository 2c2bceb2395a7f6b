"""One pass over the vocabulary: the logsumexp alone, or together with what the gradient of the hidden states needs.

The kernels compute the first ``count`` tokens of ``order``. Both are on the device, and ``count`` is never copied to the host:
programs without a token return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_energy import common as shared
from fused_energy.common import LEFT_OUT, HeadOptions, Pass
from fused_energy.triton.launch import Problem
from fused_energy.triton.product import add_tokens_by_head
from fused_energy.triton.tiles import FINITE_MAX, active_rows, grouped_tile, logits_tile, target_column


@triton.jit
def _logsumexp_kernel(
    hidden,
    weight,
    bias,
    targets,
    order,
    count,
    maxima,  # (splits, N)
    sums,  # (splits, N): Σ exp((z − maximum)/T)
    sums_at_one,  # (splits, N): the same at temperature 1
    target_logit,  # (N,)
    tokens,
    splits,
    tiles_per_split,
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
    AND_AT_ONE: tl.constexpr,  # whether the sum at temperature 1 is needed in addition
    WHOLE_DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Each program folds one stretch of the vocabulary ("split") for one tile of tokens into a maximum and a sum."""
    row_tile, split = grouped_tile(tl.program_id(0), tl.cdiv(tokens, ROWS), splits, GROUP)
    if row_tile * ROWS >= tl.load(count):
        return
    rows, held = active_rows(order, count, row_tile * ROWS + tl.arange(0, ROWS))
    maximum = tl.full((ROWS,), -FINITE_MAX, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    total_at_one = tl.zeros((ROWS,), tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocabulary, COLUMNS))
    for tile in range(split * tiles_per_split, last):
        columns = tl.arange(0, COLUMNS).to(tl.int64) + tile * COLUMNS
        z = logits_tile(
            hidden, weight, bias, rows, columns, hidden_size, vocabulary, hidden_stride, hidden_step, weight_stride,
            weight_step, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, WHOLE_DEPTH, ROWS, COLUMNS, DEPTH, PRECISION, UPCAST,
        )  # fmt: skip
        if HAS_TARGETS:
            target = target_column(targets, rows, tile * COLUMNS, vocabulary, COLUMNS)
            is_target = tl.arange(0, COLUMNS)[None, :] == target[:, None]
            tl.store(target_logit + rows, tl.sum(tl.where(is_target, z, 0.0), 1), mask=held & (target >= 0))
        risen = tl.minimum(tl.maximum(maximum, tl.max(z, 1)), FINITE_MAX)
        z -= risen[:, None]
        total = total * tl.exp((maximum - risen) * inverse_temperature) + tl.sum(tl.exp(z * inverse_temperature), 1)
        if AND_AT_ONE:
            total_at_one = total_at_one * tl.exp(maximum - risen) + tl.sum(tl.exp(z), 1)
        maximum = risen
    partial = split.to(tl.int64) * tokens + rows
    tl.store(maxima + partial, maximum, mask=held)
    tl.store(sums + partial, total, mask=held)
    if AND_AT_ONE:
        tl.store(sums_at_one + partial, total_at_one, mask=held)


@triton.jit
def _probabilities_kernel(
    hidden,
    weight,
    bias,
    targets,
    order,
    count,
    probabilities,  # (slots, stretch): exp((z − maximum)/T) · slope, with the maximum of each tile
    probabilities_at_one,
    maxima,  # (slots, tiles)
    sums,  # (slots, tiles)
    sums_at_one,
    target_logit,  # (N,)
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
    WHOLE_DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Stores unnormalized probabilities of one tile of tokens by one tile of a stretch of the vocabulary."""
    row_tile, column_tile = grouped_tile(tl.program_id(0), tl.cdiv(slots, ROWS), column_tiles, GROUP)
    local = row_tile * ROWS + tl.arange(0, ROWS)
    if first_slot + row_tile * ROWS >= tl.load(count):
        return
    rows, held = active_rows(order, count, first_slot + local)
    start = first_column + column_tile * COLUMNS
    columns = tl.arange(0, COLUMNS).to(tl.int64) + start
    z = logits_tile(
        hidden, weight, bias, rows, columns, hidden_size, vocabulary, hidden_stride, hidden_step, weight_stride,
        weight_step, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, WHOLE_DEPTH, ROWS, COLUMNS, DEPTH, PRECISION, UPCAST,
    )  # fmt: skip
    if HAS_TARGETS:
        target = target_column(targets, rows, start, vocabulary, COLUMNS)
        is_target = tl.arange(0, COLUMNS)[None, :] == target[:, None]
        tl.store(target_logit + rows, tl.sum(tl.where(is_target, z, 0.0), 1), mask=held & (target >= 0))
    maximum = tl.minimum(tl.maximum(tl.max(z, 1), -FINITE_MAX), FINITE_MAX)
    statistic = local.to(tl.int64) * column_tiles + column_tile
    stretch = column_tiles * COLUMNS
    first = row_tile.to(tl.int64) * ROWS * stretch + column_tile * COLUMNS
    within = tl.arange(0, ROWS)[:, None] * stretch + tl.arange(0, COLUMNS)[None, :]
    tl.store(maxima + statistic, maximum)

    p = tl.exp((z - maximum[:, None]) * inverse_temperature)
    tl.store(sums + statistic, tl.sum(p, 1))
    if HAS_SOFTCAP:
        p = tl.where(p == 0.0, 0.0, p * (1 - (z / softcap) * (z / softcap)))  # past the vocabulary z is −∞
    if HAS_TARGETS:
        p = tl.where(is_target, 0.0, p)  # backward adds its exact contribution
    tl.store(probabilities + first + within, p.to(probabilities.dtype.element_ty))
    if AND_AT_ONE:
        p = tl.exp(z - maximum[:, None])
        tl.store(sums_at_one + statistic, tl.sum(p, 1))
        if HAS_SOFTCAP:
            p = tl.where(p == 0.0, 0.0, p * (1 - (z / softcap) * (z / softcap)))
        p = tl.where(is_target, 0.0, p)
        tl.store(probabilities_at_one + first + within, p.to(probabilities.dtype.element_ty))


@triton.jit
def _fold_kernel(
    count,
    probabilities,  # (slots, stretch), of one temperature
    tile_maxima,  # (slots, tiles)
    tile_sums,  # (slots, tiles)
    maximum,  # (slots,): running
    total,  # (slots,): running Σ exp((z − maximum)/T)
    weighted,  # (slots, H): running Σ exp((z − maximum)/T)·slope·W
    first_slot,
    column_tiles,
    hidden_size,
    inverse_temperature,
    SETS_MAXIMUM: tl.constexpr,  # the last temperature to be folded updates the running maximum that all share
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,  # at least column_tiles
    DEPTH: tl.constexpr,
):
    """Brings the new probabilities and the running sums of one token to a common maximum."""
    slot = tl.program_id(0).to(tl.int64)
    if first_slot + slot >= tl.load(count):
        return
    tiles = tl.arange(0, TILES)
    there = tiles < column_tiles
    maxima = tl.load(tile_maxima + slot * column_tiles + tiles, mask=there, other=-FINITE_MAX)
    sums = tl.load(tile_sums + slot * column_tiles + tiles, mask=there, other=0.0)
    old = tl.load(maximum + slot)
    new = tl.maximum(old, tl.max(maxima, 0))
    rescale = tl.exp((old - new) * inverse_temperature)
    added = tl.sum(sums * tl.exp((maxima - new) * inverse_temperature), 0)
    tl.debug_barrier()  # every warp has read the old maximum before one of them stores the new one
    tl.store(total + slot, tl.load(total + slot) * rescale + added)
    if old != new:
        for start in range(0, hidden_size, DEPTH):
            places = slot * hidden_size + start + tl.arange(0, DEPTH)
            inside = start + tl.arange(0, DEPTH) < hidden_size
            tl.store(weighted + places, tl.load(weighted + places, mask=inside, other=0.0) * rescale, mask=inside)
        if SETS_MAXIMUM:
            tl.store(maximum + slot, new)
    for tile in range(0, column_tiles):
        own = tl.load(tile_maxima + slot * column_tiles + tile)
        if own != new:
            places = (slot * column_tiles + tile) * COLUMNS + tl.arange(0, COLUMNS)
            p = tl.load(probabilities + places).to(tl.float32) * tl.exp((own - new) * inverse_temperature)
            tl.store(probabilities + places, p.to(probabilities.dtype.element_ty))


def forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor | None,  # (N,), shared.LEFT_OUT for ignored tokens
    options: HeadOptions,
    store: bool,  # whether the hidden states need a gradient
) -> Pass:
    """One pass over the vocabulary, see :class:`fused_energy.common.Pass`."""
    done = shared.empty_pass(hidden, targets, options, store)
    if hidden.shape[0] == 0:
        return done
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
        problem = Problem(hidden, weight, bias, targets, options, None if targets is None else targets != LEFT_OUT)
        if store:
            _logsumexp_and_weighted(problem, done)
        else:
            _logsumexp(problem, done)
    return done


def _logsumexp(problem: Problem, done: Pass) -> None:
    row_tiles = triton.cdiv(problem.tokens, problem.logits_config.rows)
    splits, tiles_per_split = problem.splits()
    temperatures = problem.options.temperatures(problem.has_targets)
    maxima = done.energy.new_empty(splits, problem.tokens)
    sums = done.energy.new_empty(len(temperatures), splits, problem.tokens)
    _logsumexp_kernel[(row_tiles * splits,)](
        problem.hidden,
        problem.weight,
        problem.bias,
        problem.targets,
        problem.order,
        problem.count,
        maxima,
        sums[0],
        sums[-1],
        done.target_logit,
        problem.tokens,
        splits,
        tiles_per_split,
        *problem.head_arguments(),
        **problem.head_constants(),
    )
    maximum = maxima.amax(dim=0)
    chosen = torch.zeros_like(problem.order, dtype=torch.bool)
    chosen[problem.order] = torch.arange(problem.tokens, device=maxima.device) < problem.count
    for k, temperature in enumerate(temperatures):
        total = (sums[k] * torch.exp((maxima - maximum) / temperature)).sum(dim=0)
        done.energy[k] = torch.where(chosen, -maximum - temperature * total.log(), 0.0)


def _logsumexp_and_weighted(problem: Problem, done: Pass) -> None:
    """For each block of tokens, turn one stretch of the vocabulary after the other into probabilities and multiply by W."""
    tile = problem.logits_config
    temperatures = problem.options.temperatures(problem.has_targets)
    kinds = len(temperatures)
    rows, stretch = problem.rows_and_stretch(kinds, 4 * kinds * problem.hidden_size)
    probabilities = problem.hidden.new_empty(kinds, problem.padded(rows), stretch)
    maxima = done.energy.new_empty(problem.padded(rows), stretch // tile.columns)
    sums = done.energy.new_empty(kinds, *maxima.shape)
    for block in shared.blocks(problem.tokens, rows):
        slots = block.stop - block.start
        maximum = done.energy.new_full((slots,), -FINITE_MAX.value)
        total = done.energy.new_zeros(kinds, slots)
        weighted = done.energy.new_zeros(kinds, slots, problem.hidden_size)
        for columns in shared.blocks(problem.vocabulary, stretch):
            column_tiles = triton.cdiv(columns.stop - columns.start, tile.columns)
            _probabilities_kernel[(triton.cdiv(slots, tile.rows) * column_tiles,)](
                problem.hidden,
                problem.weight,
                problem.bias,
                problem.targets,
                problem.order,
                problem.count,
                probabilities[0],
                probabilities[-1],
                maxima,
                sums[0],
                sums[-1],
                done.target_logit,
                block.start,
                slots,
                columns.start,
                column_tiles,
                *problem.head_arguments(),
                **problem.head_constants(),
            )
            for k, temperature in enumerate(temperatures):
                _fold_kernel[(slots,)](
                    problem.count,
                    probabilities[k],
                    maxima,
                    sums[k],
                    maximum,
                    total[k],
                    weighted[k],
                    block.start,
                    column_tiles,
                    problem.hidden_size,
                    1.0 / temperature,
                    SETS_MAXIMUM=k + 1 == kinds,
                    COLUMNS=tile.columns,
                    TILES=triton.next_power_of_2(column_tiles),
                    DEPTH=min(1024, triton.next_power_of_2(problem.hidden_size)),
                )
                add_tokens_by_head(problem, probabilities[k], columns, column_tiles * tile.columns, block, weighted[k])
        tokens = problem.order[block]
        held = torch.arange(block.start, block.stop, device=tokens.device) < problem.count
        for k, temperature in enumerate(temperatures):
            done.energy[k, tokens] = torch.where(held, -maximum - temperature * total[k].log(), 0.0)
            mean = weighted[k].div_(total[k, :, None]).masked_fill_(~held[:, None], 0.0)
            done.weighted[k, tokens] = mean.to(done.weighted.dtype)
