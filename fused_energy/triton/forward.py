"""One pass over the vocabulary: the energies alone, or together with what the gradient of the hidden states needs.

For energies alone, no logit leaves the chip: one kernel projects, and folds each tile of logits into a maximum and a sum. A
gradient needs products with probabilities, which the matrix library makes faster than a kernel of ours: chunks of logits go
through memory, but they are small, so that most of them stay in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_energy import common as shared
from fused_energy.common import LEFT_OUT, HeadOptions, Pass
from fused_energy.triton import configs, launch
from fused_energy.triton.launch import Problem, add_product, chosen_tokens, product, program_of_row, whole_steps
from fused_energy.triton.rows import probabilities_kernel
from fused_energy.triton.tiles import FINITE_MAX, capped, grouped_tile, products_tile

LOG2E = 1.4426950408889634


@triton.jit
def _logsumexp_kernel(
    hidden,  # (N, H): a pointer, or with TMA a descriptor
    weight,  # (V, H), likewise
    bias,
    maxima,  # (splits, N)
    sums,  # (splits, N): Σ exp((z − maximum)/T)
    sums_at_one,  # (splits, N): the same at temperature 1
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
    exponent_scale,  # log2(e) / T
    log2e,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    AND_AT_ONE: tl.constexpr,  # whether the sum at temperature 1 is needed in addition
    TMA: tl.constexpr,
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
    maximum = tl.full((ROWS,), -FINITE_MAX, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    total_at_one = tl.zeros((ROWS,), tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocabulary, COLUMNS))
    for tile in range(split * tiles_per_split, last):
        z = products_tile(
            hidden, weight, row_tile * ROWS, tile * COLUMNS, tokens, vocabulary, hidden_size, hidden_stride, hidden_step,
            weight_stride, weight_step, TMA, WHOLE_DEPTH, ROWS, COLUMNS, DEPTH, PRECISION, UPCAST,
        )  # fmt: skip
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        if HAS_SCALE:
            z *= logit_scale
        if HAS_BIAS:
            z += tl.load(bias + tl.minimum(columns, vocabulary - 1)).to(tl.float32)[None, :]
        if HAS_SOFTCAP:
            z = capped(z, softcap)
        z = tl.where((columns < vocabulary)[None, :], z, float("-inf"))
        risen = tl.minimum(tl.maximum(maximum, tl.max(z, 1)), FINITE_MAX)
        z -= risen[:, None]
        total = total * tl.exp2((maximum - risen) * exponent_scale) + tl.sum(tl.exp2(z * exponent_scale), 1)
        if AND_AT_ONE:
            total_at_one = total_at_one * tl.exp2((maximum - risen) * log2e) + tl.sum(tl.exp2(z * log2e), 1)
        maximum = risen
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    held = rows < tokens
    partial = split.to(tl.int64) * tokens + rows
    tl.store(maxima + partial, maximum, mask=held)
    tl.store(sums + partial, total, mask=held)
    if AND_AT_ONE:
        tl.store(sums_at_one + partial, total_at_one, mask=held)


@triton.jit
def _target_logit_kernel(
    hidden, weight, bias, targets, target_logit, vocabulary, hidden_size, hidden_stride, hidden_step, weight_stride,
    weight_step, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The logit of one token's target. To look for it in every tile of logits would cost more than to compute it again."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if (target >= 0) & (target < vocabulary):
        terms = tl.zeros((DEPTH,), tl.float32)
        for start in range(0, hidden_size, DEPTH):
            places = (start + tl.arange(0, DEPTH)).to(tl.int64)
            inside = places < hidden_size
            h = tl.load(hidden + row * hidden_stride + places * hidden_step, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight + target * weight_stride + places * weight_step, mask=inside, other=0.0).to(tl.float32)
            terms += h * w
        z = tl.sum(terms, 0) * logit_scale
        if HAS_BIAS:
            z += tl.load(bias + target).to(tl.float32)
        if HAS_SOFTCAP:
            z = capped(z, softcap)
        tl.store(target_logit + row, z)


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
    chosen = None if targets is None else targets != LEFT_OUT
    tokens, hidden = chosen_tokens(chosen, hidden)
    if tokens is not None and targets is not None:
        targets = targets[tokens]
    if hidden.shape[0] == 0:
        return done
    own = done if tokens is None else shared.empty_pass(hidden, targets, options, store)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
        problem = Problem(hidden, weight, bias, targets, options)
        if store:
            _energy_and_weighted(problem, own)
        else:
            _energy(problem, own)
    if tokens is not None:
        done.energy[:, tokens], done.target_logit[tokens] = own.energy, own.target_logit
        if store:
            done.weighted[:, tokens] = own.weighted
    elif chosen is not None:
        done.energy.masked_fill_(~chosen, 0.0)
    return done


def _energy(problem: Problem, done: Pass) -> None:
    hidden, weight, tile = problem.hidden, problem.weight, configs.choose(problem)
    temperatures = problem.options.temperatures(problem.has_targets)
    row_tiles, column_tiles = triton.cdiv(problem.tokens, tile.rows), triton.cdiv(problem.vocabulary, tile.columns)
    wanted = max(1, min(column_tiles, launch.PROGRAMS // row_tiles, launch.SPLIT_BYTES // (4 * problem.tokens)))
    tiles_per_split = triton.cdiv(column_tiles, wanted)
    splits = triton.cdiv(column_tiles, tiles_per_split)
    maxima = done.energy.new_empty(splits, problem.tokens)
    sums = done.energy.new_empty(len(temperatures), splits, problem.tokens)
    tma = configs.takes_descriptors(hidden) and configs.takes_descriptors(weight)
    _logsumexp_kernel[(row_tiles * splits,)](
        configs.descriptor(hidden, tile.rows, tile.depth) if tma else hidden,
        configs.descriptor(weight, tile.columns, tile.depth) if tma else weight,
        problem.bias,
        maxima,
        sums[0],
        sums[-1],
        problem.tokens,
        splits,
        tiles_per_split,
        problem.hidden_size,
        problem.vocabulary,
        *hidden.stride(),
        *weight.stride(),
        *problem.options_of_logits(),
        LOG2E / problem.options.temperature,
        LOG2E,
        HAS_SCALE=problem.options.logit_scale != 1.0,
        **problem.flags(),
        AND_AT_ONE=problem.and_at_one,
        TMA=tma,
        WHOLE_DEPTH=problem.hidden_size % tile.depth == 0,
        **configs.constants(tile, hidden.device),
    )
    if problem.has_targets:
        _target_logit_kernel[(problem.tokens,)](
            hidden,
            weight,
            problem.bias,
            problem.targets,
            done.target_logit,
            problem.vocabulary,
            problem.hidden_size,
            *hidden.stride(),
            *weight.stride(),
            *problem.options_of_logits(),
            **problem.flags(),
            DEPTH=min(1024, triton.next_power_of_2(problem.hidden_size)),
        )
    maximum = maxima.amax(dim=0)
    for k, temperature in enumerate(temperatures):
        total = (sums[k] * torch.exp((maxima - maximum) / temperature)).sum(dim=0)
        done.energy[k] = -maximum - temperature * total.log()


def _energy_and_weighted(problem: Problem, done: Pass) -> None:
    """For each block of tokens, turn one chunk of logits after the other into probabilities and multiply by W."""
    hidden, weight = problem.hidden, problem.weight
    temperatures = problem.options.temperatures(problem.has_targets)
    kinds = len(temperatures)
    rows = whole_steps(launch.FORWARD_BYTES // (12 * kinds * problem.hidden_size), problem.tokens)
    products, results = problem.chunk(rows, launch.FORWARD_BYTES)
    depth = min(1024, triton.next_power_of_2(problem.hidden_size))
    constants = problem.flags() | {"HAS_TARGETS": problem.has_targets, "DEPTH": depth}
    for block in shared.blocks(problem.tokens, rows):
        own_hidden, targets, target_logit = hidden[block], problem.targets[block], done.target_logit[block]
        slots = len(own_hidden)
        reference = done.energy.new_full((kinds, slots), -FINITE_MAX.value)
        total = done.energy.new_zeros(kinds, slots)
        weighted = done.energy.new_zeros(kinds, slots, problem.hidden_size)
        for columns in shared.blocks(problem.vocabulary, products.shape[1]):
            own_weight = weight[columns]
            width = len(own_weight)
            z, p = products[:slots, :width], results[:slots, :width]
            for k, temperature in enumerate(temperatures):
                product(own_hidden, own_weight.T, z)  # the probabilities of another temperature have taken its place
                probabilities_kernel[(slots,)](
                    z,
                    p,
                    problem.bias[columns] if problem.has_bias else problem.bias,
                    targets,
                    target_logit,
                    reference[k],
                    total[k],
                    weighted[k],
                    columns.start,
                    width,
                    products.stride(0),
                    results.stride(0),
                    problem.hidden_size,
                    *problem.options_of_logits(),
                    1.0 / temperature,
                    **constants,
                    **program_of_row(width),
                )
                add_product(weighted[k], p, own_weight)
        for k, temperature in enumerate(temperatures):
            done.energy[k, block] = -reference[k] - temperature * total[k].log()
            done.weighted[k, block] = weighted[k].div_(total[k, :, None]).to(done.weighted.dtype)
