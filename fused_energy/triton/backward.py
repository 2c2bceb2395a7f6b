"""The gradients of the hidden states, from what the forward stored, and of the head, which needs the logits again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_energy import common as shared
from fused_energy.common import HeadOptions, Pass
from fused_energy.triton import launch
from fused_energy.triton.launch import Problem, add_product, chosen_tokens, product, program_of_row
from fused_energy.triton.rows import gradients_kernel


@triton.jit
def _hidden_gradient_kernel(
    weight,  # (V, H)
    targets,  # (N,)
    weighted,  # (N, H), at the temperature
    weighted_at_one,
    grad_energy,  # (N,)
    grad_energy_at_one,
    of_target,  # (N,): the gradient of the target's logit
    active,  # (N,) bool
    gradient,  # (N, H), written
    vocabulary,
    hidden_size,
    weight_stride,
    weight_step,
    logit_scale,
    HAS_TARGETS: tl.constexpr,
    AND_AT_ONE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The row of one token, see :func:`fused_energy.common.hidden_gradient`."""
    row = tl.program_id(0).to(tl.int64)
    counts = tl.load(active + row)
    g = tl.load(grad_energy + row)
    if AND_AT_ONE:
        g_at_one = tl.load(grad_energy_at_one + row)
    if HAS_TARGETS:
        target = tl.minimum(tl.maximum(tl.load(targets + row), 0), vocabulary - 1)
        g_target = tl.load(of_target + row)
    for start in range(0, hidden_size, DEPTH):
        places = start + tl.arange(0, DEPTH)
        inside = places < hidden_size
        total = -g * tl.load(weighted + row * hidden_size + places, mask=inside, other=0.0).to(tl.float32)
        if AND_AT_ONE:
            total -= g_at_one * tl.load(weighted_at_one + row * hidden_size + places, mask=inside, other=0.0).to(tl.float32)
        if HAS_TARGETS:
            w = tl.load(weight + target * weight_stride + places.to(tl.int64) * weight_step, mask=inside, other=0.0)
            total += g_target * w.to(tl.float32)
        total = tl.where(counts, total * logit_scale, 0.0)
        tl.store(gradient + row * hidden_size + places, total.to(gradient.dtype.element_ty), mask=inside)


def hidden_gradient(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor | None,  # (N,)
    options: HeadOptions,
    done: Pass,
    grad_energy: Tensor,  # (K, N)
    grad_target: Tensor,  # (N,), ignored without targets
) -> Tensor:
    """The same as :func:`fused_energy.common.hidden_gradient` in one launch: on a GPU, each of its operations costs one."""
    n, h = hidden.shape
    gradient = hidden.new_empty(n, h)
    if n == 0:
        return gradient
    active = shared.active_tokens(targets, grad_energy, grad_target)
    grad_energy = grad_energy.contiguous()
    of_target = grad_energy if targets is None else shared.target_coefficient(options, done, grad_energy, grad_target)
    with torch.cuda.device_of(hidden):
        _hidden_gradient_kernel[(n,)](
            weight,
            hidden if targets is None else targets,  # a pointer that is never read
            done.weighted[0],
            done.weighted[-1],
            grad_energy[0],
            grad_energy[-1],
            of_target,
            active,
            gradient,
            weight.shape[0],
            h,
            *weight.stride(),
            float(options.logit_scale),
            HAS_TARGETS=targets is not None,
            AND_AT_ONE=len(grad_energy) == 2,
            DEPTH=min(1024, triton.next_power_of_2(h)),
        )
    return gradient


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
    constants = problem.flags() | {"HAS_TARGETS": problem.has_targets, "AND_AT_ONE": problem.and_at_one}
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
