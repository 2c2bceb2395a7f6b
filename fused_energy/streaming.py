"""Energy and NLL in bounded memory, in plain PyTorch, on any device.

Logits exist one tile at a time: a block of tokens by a stretch of the vocabulary. Each tile is folded into a running
maximum and a running sum (online logsumexp, Milakov and Gimelshein 2018), and dropped.

Backward has two paths, both exact for any upstream gradient:

- *Frozen head.* ``dE/dh = −softmax(z/T) W`` does not depend on the upstream gradient, so the forward also accumulates
  ``U = softmax(z/T) W`` (N, H), rescaled as the maximum moves. Backward only scales the rows of U: two matmuls in all.
- *Trainable head.* Tiles of logits are computed again, turned into ``dz``, and multiplied into both gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_energy.shared import HeadOptions, accumulation_dtype, tail_energy_of_logits

SCRATCH_BYTES = 16 * 2**20  # of one float32 tile; a few of them are alive at a time, whatever N and V
VOCABULARY_TILE = 8192  # long enough for the matmul, short enough that a tile of some hundred tokens stays in cache


def linear_energy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor | None,  # (N,), every one within the vocabulary
    bias: Tensor | None,  # (V,)
    options: HeadOptions,
) -> tuple[Tensor, Tensor | None]:
    """Per-token energy and, with targets, NLL, each (N,)."""
    energy, nll = _StreamingEnergy.apply(hidden, weight, bias, targets, options)
    return energy, None if targets is None else nll


def tail_energy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    k: int,
    side: str,
    fill: str,
    bias: Tensor | None,
    options: HeadOptions,
) -> Tensor:
    """The energy of the k largest or smallest logits of each token, (N,). A selection needs whole rows of logits."""
    energy = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    for rows in _blocks(hidden.shape[0], _rows_per_tile(weight.shape[0])):
        z = _tile_logits(hidden[rows], weight, bias, options)
        energy[rows] = tail_energy_of_logits(z, k, side, fill, options.temperature)
    return energy


def _blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _rows_per_tile(vocabulary: int) -> int:
    return max(1, SCRATCH_BYTES // (4 * vocabulary))


def _tile_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Tensor:
    """One tile of logits (R, V'), in the accumulation dtype."""
    z = (hidden @ weight.T).to(accumulation_dtype(hidden.dtype))
    if options.logit_scale != 1.0:
        z *= options.logit_scale
    if bias is not None:
        z += bias
    if options.softcap is not None:
        z = z.div_(options.softcap).tanh_().mul_(options.softcap)
    return z


def _softcap_slope(z: Tensor, softcap: float) -> Tensor:
    """d softcap(x) / dx, from the capped value: ``1 − (z/c)²``."""
    return 1 - (z / softcap).square()


class _RunningLogsumexp:
    """logsumexp of rows of logits that arrive in tiles; optionally ``Σ_v softmax(z)_v · slope_v · W_v`` beside it."""

    def __init__(self, rows: int, like: Tensor, hidden_size: int | None) -> None:
        self.maximum = like.new_full((rows, 1), -torch.inf)
        self.total = like.new_zeros((rows, 1))  # Σ exp(z − shift)
        self.weighted = None if hidden_size is None else like.new_zeros((rows, hidden_size))

    @property
    def shift(self) -> Tensor:
        """What exponents are taken relative to. An infinite maximum must not be subtracted from itself."""
        return torch.where(self.maximum.isinf(), 0.0, self.maximum)

    def update(self, z: Tensor, slope: Tensor | None, weight: Tensor) -> None:
        """Fold in a tile of logits (R, V') already divided by the temperature; ``z`` is overwritten."""
        old_shift = self.shift
        self.maximum = torch.maximum(self.maximum, z.amax(dim=-1, keepdim=True))
        shift = self.shift
        rescale = torch.where(self.total == 0, 0.0, torch.exp(old_shift - shift))
        p = z.sub_(shift).exp_()
        self.total = self.total * rescale + p.sum(dim=-1, keepdim=True)
        if self.weighted is not None:
            if slope is not None:
                p *= slope
            self.weighted *= rescale
            _add_product(self.weighted, p, weight)

    def logsumexp(self) -> Tensor:
        return (self.shift + self.total.log())[:, 0]


def _add_product(accumulator: Tensor, left: Tensor, right: Tensor) -> None:
    """``accumulator += left @ right``, multiplied in the dtype of ``right``, summed in that of the accumulator."""
    if accumulator.dtype == right.dtype:
        accumulator.addmm_(left, right)
    else:
        accumulator += left.to(right.dtype) @ right


class _Tokens(NamedTuple):
    """What backward needs of the tokens (or of a block of them) whose gradient is not zero."""

    hidden: Tensor  # (R, H)
    targets: Tensor | None  # (R,)
    lse_energy: Tensor  # this and the following: (R, 1)
    lse_nll: Tensor
    grad_energy: Tensor
    grad_nll: Tensor

    def block(self, rows: slice) -> _Tokens:
        targets = None if self.targets is None else self.targets[rows]
        return _Tokens(self.hidden[rows], targets, *(x[rows] for x in self[2:]))


class _StreamingEnergy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None, options: HeadOptions
    ) -> tuple[Tensor, Tensor]:
        temperature = options.temperature
        needs_hidden, *needs_head = ctx.needs_input_grad[:3]
        # One softmax serves energy and NLL when both are at temperature 1, so one product with W does for both.
        store = needs_hidden and not any(needs_head) and (targets is None or temperature == 1.0)

        n, h = hidden.shape
        v = weight.shape[0]
        scratch = hidden.new_empty(0, dtype=accumulation_dtype(hidden.dtype))
        lse_energy, lse_nll, target_logit = (scratch.new_zeros(n) for _ in range(3))
        weighted = torch.empty_like(hidden) if store else None

        vocabulary_tile = min(v, VOCABULARY_TILE)
        for rows in _blocks(n, _rows_per_tile(vocabulary_tile)):
            count = rows.stop - rows.start
            at_temperature = _RunningLogsumexp(count, scratch, h if store else None)
            at_one = _RunningLogsumexp(count, scratch, None) if targets is not None and temperature != 1.0 else None
            for vocabulary in _blocks(v, vocabulary_tile):
                tile_bias = None if bias is None else bias[vocabulary]
                z = _tile_logits(hidden[rows], weight[vocabulary], tile_bias, options)
                if targets is not None:
                    inside, column = _targets_inside(targets[rows], vocabulary)
                    target_logit[rows][inside] = z[inside, column]
                slope = _softcap_slope(z, options.softcap) if store and options.softcap is not None else None
                if at_one is not None:
                    at_one.update(z.clone(), None, weight[vocabulary])
                if temperature != 1.0:
                    z /= temperature
                at_temperature.update(z, slope, weight[vocabulary])
            lse_energy[rows] = at_temperature.logsumexp()
            lse_nll[rows] = lse_energy[rows] if at_one is None else at_one.logsumexp()
            if weighted is not None and at_temperature.weighted is not None:
                weighted[rows] = (at_temperature.weighted / at_temperature.total).to(hidden.dtype)

        ctx.save_for_backward(hidden, weight, bias, targets, lse_energy, lse_nll, target_logit, weighted)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return -temperature * lse_energy, lse_nll - target_logit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_energy: Tensor | None, grad_nll: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse_energy, lse_nll, target_logit, weighted = ctx.saved_tensors
        grad_energy = torch.zeros_like(lse_energy) if grad_energy is None else grad_energy
        grad_nll = torch.zeros_like(lse_nll) if grad_nll is None or targets is None else grad_nll
        if weighted is not None:
            grad_hidden = _scale_stored(ctx.options, weight, targets, target_logit, weighted, grad_energy, grad_nll)
            return grad_hidden, None, None, None, None
        # A token whose upstream gradient is exactly zero (its boundary is met) is left out of every matmul.
        active = ((grad_energy != 0) | (grad_nll != 0)).nonzero()[:, 0]
        tokens = _Tokens(
            hidden[active],
            None if targets is None else targets[active],
            *(x[active, None] for x in (lse_energy, lse_nll, grad_energy, grad_nll)),
        )
        active_grad, grad_weight, grad_bias = _recompute(ctx.options, weight, bias, tokens, ctx.needs_input_grad[:3])
        if active_grad is not None:
            active_grad = torch.zeros_like(hidden).index_copy_(0, active, active_grad)
        return active_grad, grad_weight, grad_bias, None, None


def _targets_inside(targets: Tensor, vocabulary: slice) -> tuple[Tensor, Tensor]:
    """Which rows have their target in this stretch of the vocabulary, and in which of its columns."""
    inside = ((targets >= vocabulary.start) & (targets < vocabulary.stop)).nonzero()[:, 0]
    return inside, targets[inside] - vocabulary.start


def _scale_stored(
    options: HeadOptions,
    weight: Tensor,
    targets: Tensor | None,
    target_logit: Tensor,
    weighted: Tensor,  # (N, H): softmax(z/T) · slope · W
    grad_energy: Tensor,
    grad_nll: Tensor,
) -> Tensor:
    """``dE/dh = −s·U`` and ``dNLL/dh = s·(U − slope_y·W_y)``: no logits are needed again."""
    scale = options.logit_scale
    grad_hidden = weighted.to(grad_energy.dtype) * (scale * (grad_nll - grad_energy))[:, None]
    if targets is not None:
        of_target = scale * grad_nll
        if options.softcap is not None:
            of_target = of_target * _softcap_slope(target_logit, options.softcap)
        grad_hidden -= weight[targets] * of_target[:, None]
    return grad_hidden.to(weighted.dtype)


def _recompute(
    options: HeadOptions,
    weight: Tensor,
    bias: Tensor | None,
    tokens: _Tokens,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Tiles of logits once more, vocabulary outermost: each stretch of the head's gradient is finished before the next."""
    needs_hidden, needs_weight, needs_bias = needs
    hidden = tokens.hidden
    n, h = hidden.shape
    v = weight.shape[0]
    dtype = tokens.lse_energy.dtype
    grad_hidden = hidden.new_zeros(n, h, dtype=dtype) if needs_hidden else None
    grad_weight = torch.zeros_like(weight) if needs_weight else None
    grad_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None

    # The head's gradient is summed over tokens in float32, so that stretch counts as scratch too.
    vocabulary_tile = min(v, VOCABULARY_TILE, max(1, SCRATCH_BYTES // (4 * h)))
    for vocabulary in _blocks(v, vocabulary_tile):
        tile_weight, tile_bias = weight[vocabulary], None if bias is None else bias[vocabulary]
        sum_weight = hidden.new_zeros(tile_weight.shape, dtype=dtype) if needs_weight else None
        sum_bias = hidden.new_zeros(tile_weight.shape[0], dtype=dtype) if grad_bias is not None else None
        for rows in _blocks(n, _rows_per_tile(vocabulary_tile)):
            z = _tile_logits(hidden[rows], tile_weight, tile_bias, options)
            dz = _logit_gradient(z, tokens.block(rows), vocabulary, options)
            if sum_bias is not None:
                sum_bias += dz.sum(dim=0)
            if options.logit_scale != 1.0:
                dz *= options.logit_scale
            if grad_hidden is not None:
                _add_product(grad_hidden[rows], dz, tile_weight)
            if sum_weight is not None:
                _add_product(sum_weight, dz.T, hidden[rows])
        if grad_weight is not None and sum_weight is not None:
            grad_weight[vocabulary] = sum_weight
        if grad_bias is not None and sum_bias is not None:
            grad_bias[vocabulary] = sum_bias
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _logit_gradient(
    z: Tensor,  # (R, V'), overwritten
    tokens: _Tokens,
    vocabulary: slice,
    options: HeadOptions,
) -> Tensor:
    """``dL/dx`` of a tile, x the logits before the softcap: ``−g_E·softmax(z/T) + g_NLL·(softmax(z) − onehot)``."""
    temperature, _, softcap = options
    _, targets, lse_energy, lse_nll, grad_energy, grad_nll = tokens
    slope = None if softcap is None else _softcap_slope(z, softcap)
    if temperature == 1.0:
        dz = z.sub_(lse_energy).exp_().mul_(grad_nll - grad_energy)
    else:
        dz = torch.exp(z / temperature - lse_energy).mul_(-grad_energy)
        if targets is not None:
            dz += z.sub_(lse_nll).exp_().mul_(grad_nll)
    if targets is not None:
        inside, column = _targets_inside(targets, vocabulary)
        dz[inside, column] -= grad_nll[inside, 0]
    return dz if slope is None else dz.mul_(slope)
