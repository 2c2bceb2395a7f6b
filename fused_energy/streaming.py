"""Energy and NLL in bounded memory, in plain PyTorch, on any device.

Logits exist one tile at a time: a block of tokens by a stretch of the vocabulary. Each tile is folded into a running
maximum and a running sum (online logsumexp, Milakov and Gimelshein 2018) and dropped.

- ``dE/dh = −softmax(z/T) W`` does not depend on the upstream gradient. So if the hidden states need a gradient, the
  forward also accumulates ``softmax(z/T) W`` (N, H), rescaled as the maximum changes, and their backward only scales rows.
- The head's gradient sums over tokens and depends on the upstream gradient: its backward computes the tiles of logits again,
  for the tokens whose upstream gradient is not zero.

Each tile, each sum and each temporary has at most ``shared.SCRATCH_BYTES`` bytes, and about four of them are alive at once
(with a softcap and two temperatures, about seven). Tails need full rows of logits, in blocks of ``shared.TAIL_TILES`` tiles.
``benches`` measures the total.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_energy import common as shared
from fused_energy.common import (
    HeadOptions,
    Pass,
    accumulation_dtype,
    blocks,
    hidden_gradient,
    rows_within_scratch,
    softcap_slope,
    tile_logits,
)

__all__ = ["forward", "head_gradient", "hidden_gradient", "tail_energy"]  # the interface of an implementation

VOCABULARY_TILE = 4096  # long enough for the matmul, short enough that a tile of a few hundred tokens stays in cache


def forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor | None,  # (N,), shared.LEFT_OUT for ignored tokens
    options: HeadOptions,
    store: bool,  # whether the hidden states need a gradient
) -> Pass:
    """One pass over the vocabulary. Ignored tokens are removed before anything is computed."""
    done = shared.empty_pass(hidden, targets, options, store)
    temperatures = options.temperatures(targets is not None)
    vocabulary_tile = min(weight.shape[0], VOCABULARY_TILE)
    tokens = _indices(targets != shared.LEFT_OUT) if targets is not None else torch.arange(len(hidden), device=hidden.device)

    for block in blocks(len(tokens), rows_within_scratch(max(vocabulary_tile, hidden.shape[1]))):
        rows = tokens[block]
        block_hidden, block_targets = hidden[rows], None if targets is None else targets[rows]
        running = [_RunningEnergy(block_hidden, temperature, store) for temperature in temperatures]
        for vocabulary in blocks(weight.shape[0], vocabulary_tile):
            tile_weight = weight[vocabulary]
            z = tile_logits(block_hidden, tile_weight, None if bias is None else bias[vocabulary], options)
            slope = softcap_slope(z, options.softcap) if store else None
            inside = column = None
            if block_targets is not None:
                inside, column = _targets_inside(block_targets, vocabulary)
                done.target_logit[rows[inside]] = z[inside, column]
            for i, one in enumerate(running):
                p = one.update(z if i + 1 == len(running) else z.clone())
                if store:
                    if inside is not None:
                        p[inside, column] = 0.0
                    one.add(p if slope is None else p.mul_(slope), tile_weight)
        for i, one in enumerate(running):
            done.energy[i, rows] = one.energy()
            if store:
                done.weighted[i, rows] = one.mean().to(hidden.dtype)
    return done


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
    """Compute the tiles of logits again, vocabulary outermost: each stretch of the gradient is finished before the next."""
    temperatures = options.temperatures(targets is not None)
    tokens = _indices(shared.active_tokens(targets, grad_energy, grad_target))
    grad_weight = torch.zeros_like(weight) if needs[0] else None
    grad_bias = torch.zeros_like(bias) if needs[1] and bias is not None else None

    # The sum of the gradient over tokens is in float32, so this stretch of it counts as scratch too.
    vocabulary_tile = min(weight.shape[0], VOCABULARY_TILE, rows_within_scratch(hidden.shape[1]))
    rows_per_tile = rows_within_scratch(max(vocabulary_tile, hidden.shape[1]))
    for vocabulary in blocks(weight.shape[0], vocabulary_tile):
        tile_weight, tile_bias = weight[vocabulary], None if bias is None else bias[vocabulary]
        sum_weight = sum_bias = None  # they stay None if there are no tokens
        for block in blocks(len(tokens), rows_per_tile):
            rows = tokens[block]
            block_hidden = hidden[rows]
            z = tile_logits(block_hidden, tile_weight, tile_bias, options)
            slope = softcap_slope(z, options.softcap)
            dz = torch.zeros_like(z) if len(temperatures) == 2 else z
            for i, temperature in enumerate(temperatures):
                p = z if i + 1 == len(temperatures) else z.clone()
                p += energy[i, rows, None]
                if temperature != 1.0:
                    p /= temperature
                p = p.exp_().mul_(-grad_energy[i, rows, None])
                dz = p if dz is z else dz.add_(p)
            if targets is not None:
                inside, column = _targets_inside(targets[rows], vocabulary)
                dz[inside, column] += grad_target[rows][inside]
            if slope is not None:
                dz *= slope
            if grad_bias is not None:
                sum_bias = dz.sum(dim=0) if sum_bias is None else sum_bias.add_(dz.sum(dim=0))
            if grad_weight is not None:
                sum_weight = _add_product(sum_weight, dz.T, block_hidden)
        if grad_weight is not None and sum_weight is not None:
            grad_weight[vocabulary] = sum_weight.mul_(options.logit_scale)
        if grad_bias is not None and sum_bias is not None:
            grad_bias[vocabulary] = sum_bias
    return grad_weight, grad_bias


def tail_energy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    k: int,
    side: str,
    fill: str,
    bias: Tensor | None,
    options: HeadOptions,
) -> Tensor:
    """The energy of the k largest or smallest logits of each token, (N,). The selection needs full rows of logits."""
    energy = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    for rows in blocks(hidden.shape[0], rows_within_scratch(weight.shape[0], shared.tiles_of_tails(hidden))):
        z = tile_logits(hidden[rows], weight, bias, options)
        energy[rows] = shared.tail_energy_of_logits(z, k, side, fill, options.temperature, weight.shape[0])
    return energy


def _indices(chosen: Tensor) -> Tensor:
    return chosen.nonzero()[:, 0]


def _targets_inside(targets: Tensor, vocabulary: slice) -> tuple[Tensor, Tensor]:
    """The rows whose target lies in this stretch of the vocabulary, and the column of each such target in the stretch."""
    inside = _indices((targets >= vocabulary.start) & (targets < vocabulary.stop))
    return inside, targets[inside] - vocabulary.start


class _RunningEnergy:
    """Energy of rows of logits that arrive in tiles, together with a sum weighted by their softmax."""

    def __init__(self, hidden: Tensor, temperature: float, store: bool) -> None:
        self.temperature = temperature
        like = hidden.new_empty(0, dtype=accumulation_dtype(hidden.dtype))
        self.maximum = like.new_full((len(hidden), 1), -torch.inf)
        self.total = like.new_zeros((len(hidden), 1))  # Σ exp((z − shift) / T)
        self.weighted = like.new_zeros(len(hidden), hidden.shape[1] if store else 0)

    @property
    def shift(self) -> Tensor:
        """What is subtracted from logits before exp. An infinite maximum must not be subtracted from itself."""
        return torch.where(self.maximum.isinf(), 0.0, self.maximum)

    def update(self, z: Tensor) -> Tensor:
        """Fold in a tile of logits (R, V'). Overwrites the tile with ``exp((z − shift) / T)`` and returns it."""
        old_shift = self.shift
        self.maximum = torch.maximum(self.maximum, z.amax(dim=-1, keepdim=True))
        shift = self.shift
        rescale = torch.where(self.total == 0, 0.0, torch.exp((old_shift - shift) / self.temperature))
        z -= shift
        p = (z if self.temperature == 1.0 else z.div_(self.temperature)).exp_()
        self.total = self.total * rescale + p.sum(dim=-1, keepdim=True)
        self.weighted *= rescale
        return p

    def add(self, p: Tensor, weight: Tensor) -> None:
        """Add ``p @ weight`` (R, V'), (V', H) to the weighted sum."""
        _add_product(self.weighted, p, weight)

    def energy(self) -> Tensor:
        return -(self.shift + self.temperature * self.total.log())[:, 0]

    def mean(self) -> Tensor:
        """The sum weighted by the softmax, (R, H); overwrites the running sum."""
        return self.weighted.div_(self.total)


def _add_product(accumulator: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``accumulator + left @ right`` in place; the product is in the dtype of ``right``, the sum in that of ``left``."""
    if accumulator is None:
        return shared.matmul(left.to(right.dtype), right)
    if accumulator.dtype == right.dtype:
        return accumulator.addmm_(left, right)
    return accumulator.add_(shared.matmul(left.to(right.dtype), right))
