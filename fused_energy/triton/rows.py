"""What happens to one row of a chunk of logits between two matrix products: it becomes probabilities, or a gradient.

The chunk holds the raw products ``h Wᵀ`` in float32; scale, bias and softcap are applied as it is read. One program reads a
whole row, and writes its result, in the dtype of the head, over the beginning of the row.
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
    products,  # (rows, stride) float32
    probabilities,  # the same memory in the dtype of the head: exp((z − reference)/T) · slope, 0 for the target
    bias,  # (width,)
    targets,  # (rows,), counted over the whole vocabulary
    target_logit,  # (rows,)
    reference,  # (rows,): running
    total,  # (rows,): running Σ exp((z − reference)/T)
    weighted,  # (rows, H): running Σ exp((z − reference)/T) · slope · W, without the target
    first_column,
    width,
    stride,
    result_stride,
    hidden_size,
    logit_scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least width
    DEPTH: tl.constexpr,
):
    """Turn the row of one token into probabilities, relative to a reference logit that fits the whole row so far."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    z = _logits(products + row * stride, bias, columns, width, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    old = tl.load(reference + row)
    so_far = tl.load(total + row)
    top = tl.minimum(tl.maximum(tl.max(z, 0), -FINITE_MAX), FINITE_MAX)
    new = tl.where((top - old) * inverse_temperature > RISE, top, old)
    rescale = tl.exp((old - new) * inverse_temperature)
    p = tl.exp((z - new) * inverse_temperature)
    added = tl.sum(p, 0)
    if HAS_SOFTCAP:
        p = tl.where(p == 0.0, 0.0, p * (1 - (z / softcap) * (z / softcap)))  # past the width z is −∞
    if HAS_TARGETS:
        target = tl.load(targets + row) - first_column
        here = (target >= 0) & (target < width)
        is_target = columns == tl.where(here, target, -1).to(tl.int32)
        p = tl.where(is_target, 0.0, p)  # the backward adds its exact contribution
        if here:
            tl.store(target_logit + row, tl.sum(tl.where(is_target, z, 0.0), 0))
    tl.debug_barrier()  # every warp has read its part of the row, and the old reference and sum
    tl.store(probabilities + row * result_stride + columns, p.to(probabilities.dtype.element_ty), mask=inside)
    tl.store(total + row, so_far * rescale + added)
    if new != old:
        tl.store(reference + row, new)
        weighted += row * hidden_size
        for start in range(0, hidden_size, DEPTH):
            places = start + tl.arange(0, DEPTH)
            held = places < hidden_size
            tl.store(weighted + places, tl.load(weighted + places, mask=held, other=0.0) * rescale, mask=held)


@triton.jit
def gradients_kernel(
    products,  # (rows, stride) float32
    gradient,  # the same memory in the dtype of the head: dL/dx with x the logits before the softcap
    bias,  # (width,)
    targets,  # (rows,), counted over the whole vocabulary
    energy,  # (rows,), at the temperature
    energy_at_one,
    grad_energy,  # (rows,)
    grad_energy_at_one,
    grad_target,  # (rows,)
    first_column,
    width,
    stride,
    result_stride,
    logit_scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    AND_AT_ONE: tl.constexpr,
    BLOCK: tl.constexpr,  # at least width
):
    """``dL/dx = (g_y · onehot − Σ_k g_k · softmax(z/T_k)) · slope`` of the row of one token."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    z = _logits(products + row * stride, bias, columns, width, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    # The sum before the product: exp(z/T − lse) would carry the rounding of lse, which a small T makes large. A token without
    # upstream gradient may have any energy, and 0 · inf is NaN.
    g = tl.load(grad_energy + row)
    dx = tl.where(g == 0.0, 0.0, -g * tl.exp((z + tl.load(energy + row)) * inverse_temperature))
    if AND_AT_ONE:
        g = tl.load(grad_energy_at_one + row)
        dx -= tl.where(g == 0.0, 0.0, g * tl.exp(z + tl.load(energy_at_one + row)))
    if HAS_TARGETS:
        target = tl.load(targets + row) - first_column
        here = (target >= 0) & (target < width)
        is_target = columns == tl.where(here, target, -1).to(tl.int32)
        dx += tl.where(is_target, tl.load(grad_target + row), 0.0)
    if HAS_SOFTCAP:
        dx *= 1 - (z / softcap) * (z / softcap)
    tl.debug_barrier()  # every warp has read its part of the row
    tl.store(gradient + row * result_stride + columns, dx.to(gradient.dtype.element_ty), mask=columns < width)
