"""The gradient of the head, one stretch of the vocabulary at a time, for tokens with a nonzero upstream gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_energy import common as shared
from fused_energy.common import HeadOptions
from fused_energy.triton import launch
from fused_energy.triton.launch import Problem, add_product, chosen_tokens, product, program_of_row
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
    hidden, weight = problem.hidden, problem.weight
    held = min(problem.tokens, launch.TOKENS_AT_ONCE)
    products, results = problem.chunk(held, launch.BACKWARD_BYTES)
    constants = problem.flags() | {"AND_AT_ONE": problem.and_at_one}
    for columns in shared.blocks(problem.vocabulary, products.shape[1]):
        own_weight = weight[columns]
        width = len(own_weight)
        sums = energy.new_zeros(width, problem.hidden_size) if grad_weight is not None and held < problem.tokens else None
        sum_bias = energy.new_zeros(1, width)
        for block in shared.blocks(problem.tokens, held):
            own_hidden = hidden[block]
            z, gradient = (x[: len(own_hidden), :width] for x in (products, results))
            product(own_hidden, own_weight.T, z)
            gradients_kernel[(len(own_hidden),)](
                z,
                gradient,
                problem.bias[columns] if problem.has_bias else problem.bias,
                problem.targets[block],
                energy[0, block],
                energy[-1, block],
                grad_energy[0, block],
                grad_energy[-1, block],
                grad_target[block],
                columns.start,
                width,
                products.stride(0),
                results.stride(0),
                *problem.options_of_logits(),
                1.0 / problem.options.temperature,
                **constants,
                **program_of_row(width),
            )
            if grad_bias is not None:
                add_product(sum_bias, gradient.new_ones(1, len(own_hidden)), gradient)
            if sums is not None:
                add_product(sums, gradient.T, own_hidden)
            elif grad_weight is not None:
                product(gradient.T, own_hidden, grad_weight[columns], problem.options.logit_scale)
        if grad_weight is not None and sums is not None:
            grad_weight[columns] = sums.mul_(problem.options.logit_scale)
        if grad_bias is not None:
            grad_bias[columns] = sum_bias[0]
