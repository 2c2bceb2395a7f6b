"""The gradient of the head, one stretch of the vocabulary at a time, for tokens with a nonzero upstream gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_energy import common as shared
from fused_energy.common import HeadOptions
from fused_energy.triton import launch
from fused_energy.triton.launch import Problem, add_product, chosen_tokens, product, whole_steps
from fused_energy.triton.rows import gradients_kernel


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
    """Compute each chunk of logits again and turn it into its gradient; a product with the hidden states sums over tokens."""
    tokens, hidden = chosen_tokens(shared.active_tokens(targets, grad_energy, grad_target), hidden)
    if tokens is not None:
        energy, grad_energy = energy[:, tokens], grad_energy[:, tokens]
        if targets is not None:
            targets, grad_target = targets[tokens], grad_target[tokens]
    make = torch.zeros if hidden.shape[0] == 0 else torch.empty
    grad_weight = make(weight.shape, dtype=weight.dtype, device=weight.device) if needs[0] else None
    grad_bias = make(weight.shape[0], dtype=weight.dtype, device=weight.device) if needs[1] else None
    if hidden.shape[0]:
        with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
            problem = Problem(hidden, weight, bias, targets, options)
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
    hidden, weight, n = problem.hidden, problem.weight, problem.tokens
    held = min(n, launch.TOKENS_AT_ONCE)
    stretch = min(
        launch.SCRATCH_BYTES // (hidden.element_size() * held), launch.SCRATCH_BYTES // (4 * min(n, launch.FEWEST_ROWS))
    )
    stretch = whole_steps(stretch, problem.vocabulary)
    rows = whole_steps(launch.SCRATCH_BYTES // (4 * stretch), n)
    products = energy.new_empty(rows, stretch)
    gradient = hidden.new_empty(held, stretch)
    for columns in shared.blocks(problem.vocabulary, stretch):
        width = columns.stop - columns.start
        sums = None
        if grad_weight is not None and held < n:
            sums = energy.new_zeros(width, problem.hidden_size)
        sum_bias = energy.new_zeros(width)
        for block in shared.blocks(n, held):
            for start in range(block.start, block.stop, rows):
                part = slice(start, min(start + rows, block.stop))
                z = products[: part.stop - start, :width]
                product(hidden[part], weight[columns].T, z)
                gradients_kernel[(len(z),)](
                    z,
                    problem.bias[columns] if problem.has_bias else problem.bias,
                    problem.targets[part],
                    energy[0, part],
                    energy[-1, part],
                    grad_energy[0, part],
                    grad_energy[-1, part],
                    grad_target[part] if problem.has_targets else grad_energy,
                    gradient[start - block.start :],
                    columns.start,
                    width,
                    z.stride(0),
                    gradient.stride(0),
                    *problem.options_of_logits(),
                    1.0 / problem.options.temperature,
                    **problem.flags(),
                    AND_AT_ONE=problem.and_at_one,
                    NEEDS_BIAS=grad_bias is not None,
                    **problem.block(width),
                )
                if grad_bias is not None:
                    sum_bias += z.sum(dim=0)
            if grad_weight is not None:
                of_block = gradient[: block.stop - block.start, :width].T
                if sums is None:
                    product(of_block, hidden, grad_weight[columns])
                else:
                    add_product(sums, of_block, hidden[block])
        if grad_weight is not None and sums is not None:
            grad_weight[columns] = sums
        if grad_bias is not None:
            grad_bias[columns] = sum_bias
