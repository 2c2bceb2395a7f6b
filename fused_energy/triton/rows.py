"""What happens to one row of a chunk of logits between two matrix products: it becomes probabilities, or a gradient.

The chunk holds the raw products ``h Wᵀ`` in float32; scale, bias and softcap are applied as it is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_energy.triton.tiles import FINITE_MAX, capped

# A row's reference logit rises only for logits that lie this many temperatures above it, so its sums are rarely rescaled. The
# largest probability is exp(RISE), which float16 must hold.
RISE = tl.constexpr(8.0)


@triton.jit
def _logits(products, bias, columns, width, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Logits of one row in ``columns`` of a chunk; −∞ past its ``width``."""
    inside = columns < width
    z = tl.load(products + columns, mask=inside, other=0.0) * logit_scale
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        z = capped(z, softcap)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def probabilities_kernel(
    products,  # (rows, stride)
    bias,  # (width,)
    targets,  # (rows,), counted over the whole vocabulary
    target_logit,  # (rows,)
    probabilities,  # (rows, stride): exp((z − reference)/T) · slope, 0 for the target
    reference,  # (rows,): running
    total,  # (rows,): running Σ exp((z − reference)/T)
    weighted,  # (rows, H): running Σ exp((z − reference)/T) · slope · W, without the target
    first_column,
    width,
    stride,
    hidden_size,
    logit_scale,
    softcap,
    temperature,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn the row of one token into probabilities, relative to a reference logit that fits the whole row so far."""
    row = tl.program_id(0).to(tl.int64)
    products += row * stride
    probabilities += row * stride
    target = -1
    if HAS_TARGETS:
        target = tl.load(targets + row) - first_column
        if (target >= 0) & (target < width):
            z = _logits(products, bias, target + tl.arange(0, 1), width, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            tl.store(target_logit + row + tl.arange(0, 1), z)
    old = tl.load(reference + row)
    highest = tl.full((BLOCK,), -FINITE_MAX, tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        highest = tl.maximum(highest, _logits(products, bias, columns, width, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP))
    top = tl.minimum(tl.max(highest, 0), FINITE_MAX)
    new = tl.where(top > old + RISE * temperature, top, old)
    added = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _logits(products, bias, columns, width, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        p = tl.exp((z - new) * inverse_temperature)
        added += p
        if HAS_SOFTCAP:
            p = tl.where(p == 0.0, 0.0, p * (1 - (z / softcap) * (z / softcap)))  # past the width z is −∞
        if HAS_TARGETS:
            p = tl.where(columns == target, 0.0, p)  # the backward adds its exact contribution
        tl.store(probabilities + columns, p.to(probabilities.dtype.element_ty), mask=columns < width)
    rescale = tl.exp((old - new) * inverse_temperature)
    sum_so_far = tl.load(total + row) * rescale + tl.sum(added, 0)
    tl.debug_barrier()  # every warp has read the old reference and sum before one of them stores the new ones
    tl.store(total + row, sum_so_far)
    if new != old:
        tl.store(reference + row, new)
        weighted += row * hidden_size
        for start in range(0, hidden_size, BLOCK):
            places = start + tl.arange(0, BLOCK)
            inside = places < hidden_size
            tl.store(weighted + places, tl.load(weighted + places, mask=inside, other=0.0) * rescale, mask=inside)


@triton.jit
def gradients_kernel(
    products,  # (rows, products_stride); becomes dL/dx with x the logits before the softcap, if the bias needs a gradient
    bias,  # (width,)
    targets,  # (rows,), counted over the whole vocabulary
    energy,  # (rows,), at the temperature
    energy_at_one,
    grad_energy,  # (rows,)
    grad_energy_at_one,
    grad_target,  # (rows,)
    gradient,  # (rows, stride): logit_scale · dL/dx
    first_column,
    width,
    products_stride,
    stride,
    logit_scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    AND_AT_ONE: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dL/dx = (g_y · onehot − Σ_k g_k · softmax(z/T_k)) · slope`` of the row of one token."""
    row = tl.program_id(0).to(tl.int64)
    products += row * products_stride
    gradient += row * stride
    own, g = tl.load(energy + row), tl.load(grad_energy + row)
    if AND_AT_ONE:
        own_at_one, g_at_one = tl.load(energy_at_one + row), tl.load(grad_energy_at_one + row)
    if HAS_TARGETS:
        target, g_target = tl.load(targets + row) - first_column, tl.load(grad_target + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _logits(products, bias, columns, width, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        # The sum before the product: exp(z/T − lse) would carry the rounding of lse, which a small T makes large.
        dx = -g * tl.exp((z + own) * inverse_temperature)
        if AND_AT_ONE:
            dx -= g_at_one * tl.exp(z + own_at_one)
        if HAS_TARGETS:
            dx += tl.where(columns == target, g_target, 0.0)
        if HAS_SOFTCAP:
            dx *= 1 - (z / softcap) * (z / softcap)
        inside = columns < width
        tl.store(gradient + columns, (dx * logit_scale).to(gradient.dtype.element_ty), mask=inside)
        if NEEDS_BIAS:
            tl.store(products + columns, dx, mask=inside)
