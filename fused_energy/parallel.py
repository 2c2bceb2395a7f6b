"""Vocabulary-sharded heads: every rank of a group holds some rows of the head, and all of the hidden states.

The ranks hold consecutive stretches of the vocabulary in rank order, of any size, empty ones included. Each makes its own
pass; maxima, sums and weighted sums are then combined. Energy, NLL and the gradient of the hidden states come out whole and
equal on every rank; the head's gradient is that of the rank's own rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor, Replicate, Shard

from fused_energy import shared
from fused_energy.shared import LEFT_OUT, HeadOptions, Pass


class VocabularyShard(NamedTuple):
    """The rows ``start : start + rows`` of a head with ``vocabulary`` rows, held by one rank of ``group``."""

    group: ProcessGroup
    start: int
    rows: int
    vocabulary: int

    @classmethod
    def of(cls, weight: Tensor, group: ProcessGroup) -> VocabularyShard:
        """Found by asking every rank how many rows it holds; a collective call."""
        own = torch.tensor([weight.shape[0]], device=weight.device)
        sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, own, group=group)
        counts, rank = [int(size) for size in sizes], dist.get_rank(group)
        return cls(group, sum(counts[:rank]), counts[rank], sum(counts))

    def inside(self, targets: Tensor) -> Tensor:
        return (targets >= self.start) & (targets < self.start + self.rows)

    def local(self, targets: Tensor | None) -> Tensor | None:
        """Targets counted from this shard's first row; ``rows``, which is outside of it, where another rank holds them."""
        if targets is None:
            return None
        return torch.where(targets == LEFT_OUT, LEFT_OUT, torch.where(self.inside(targets), targets - self.start, self.rows))

    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x

    def maximum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x


def unwrap(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, ProcessGroup | None]:
    """Local tensors, and the group that the head is sharded over, of arguments of which some are DTensors.

    Raises:
        ValueError: for placements other than a head that is sharded on dim 0 or replicated, and replicated hidden states.
    """
    group = None
    if isinstance(weight, DTensor):
        if weight.device_mesh.ndim != 1 or weight.placements[0] not in (Shard(0), Replicate()):
            raise ValueError(
                f"weight is a DTensor placed {weight.placements} on a mesh of {weight.device_mesh.ndim} dimensions, but a head "
                "can only be split by rows over one dimension: redistribute it to [Shard(0)], or pass full_tensor()."
            )
        group = weight.device_mesh.get_group() if weight.placements[0] == Shard(0) else None
        if bias is not None and not (isinstance(bias, DTensor) and bias.placements == weight.placements):
            raise ValueError("weight is a DTensor and bias is not placed like it: shard the bias with its rows of the head.")
        weight, bias = weight.to_local(), None if bias is None else bias.to_local()
    if isinstance(hidden, DTensor):
        if any(placement != Replicate() for placement in hidden.placements):
            raise ValueError(
                f"hidden is a DTensor placed {hidden.placements}, but every rank needs whole hidden states: redistribute it "
                "to [Replicate()] first."
            )
        hidden = hidden.to_local()
    return hidden, weight, bias, group


def _check_same_hidden(hidden: Tensor, shard: VocabularyShard) -> None:
    """Raise ``ValueError`` on every rank where ranks hold different tokens, as data-parallel ranks do."""
    mine = torch.stack(
        [
            torch.tensor(float(len(hidden)), dtype=torch.float64, device=hidden.device),
            hidden.sum(dtype=torch.float64),
            torch.linalg.vector_norm(hidden, 1, dtype=torch.float64),
        ]
    )
    highest, lowest = shard.maximum(torch.cat([mine, -mine])).view(2, 3) * mine.new_tensor([[1.0], [-1.0]])
    if ((highest - lowest) > highest[2] * mine.new_tensor([0.0, 1e-6, 1e-6])).any():
        raise ValueError(
            "The ranks of process_group hold different hidden states, but a vocabulary-sharded head needs the same tokens on "
            "every rank of its group: pass the group that the head is split over, not the one that the data are."
        )


class ShardedHead:
    """An implementation that sees the rank's own rows, made to act for the whole vocabulary."""

    def __init__(self, implementation: Any, group: str, weight: Tensor) -> None:
        self.implementation = implementation
        self.shard = VocabularyShard.of(weight, _resolve_process_group(group))  # type: ignore[arg-type]

    def forward(
        self,
        hidden: Tensor,  # (N, H), the same on every rank
        weight: Tensor,  # (V_local, H)
        bias: Tensor | None,  # (V_local,)
        targets: Tensor | None,  # (N,), counted over the whole vocabulary
        options: HeadOptions,
        store: bool,
    ) -> Pass:
        shard = self.shard
        _check_same_hidden(hidden, shard)
        if shard.rows:
            own = self.implementation.forward(hidden, weight, bias, shard.local(targets), options, store)
        else:
            own = shared.empty_pass(hidden, targets, options, store)
            own.lse.fill_(-math.inf)

        maximum = shard.maximum(own.lse.clone())
        shift = torch.where(maximum.isinf(), 0.0, maximum)  # an infinite maximum must not be subtracted from itself
        lse = shift + shard.sum(torch.exp(own.lse - shift)).log()
        target_logit = own.target_logit
        if targets is not None:
            lse = torch.where(targets == LEFT_OUT, 0.0, lse)
            inside = shard.inside(targets)
            found = shard.sum(torch.stack([torch.where(inside, own.target_logit, 0.0), inside.to(lse.dtype)]))
            target_logit = torch.where((found[1] == 1) | (targets == LEFT_OUT), found[0], math.nan)
        for k in range(own.weighted.shape[0]):
            share = torch.exp(own.lse[k] - lse[k])[:, None]
            for rows in shared.blocks(hidden.shape[0], shared.rows_within_scratch(hidden.shape[1])):
                own.weighted[k, rows] = shard.sum(own.weighted[k, rows] * share[rows])
        return Pass(lse, target_logit, own.weighted)

    def hidden_gradient(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V_local, H)
        targets: Tensor | None,  # (N,)
        options: HeadOptions,
        done: Pass,
        grad_lse: Tensor,  # (K, N)
        grad_target: Tensor,  # (N,)
    ) -> Tensor:
        return shared.hidden_gradient(hidden, weight, targets, options, done, grad_lse, grad_target, self._target_rows)

    def head_gradient(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None, *rest: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.shard.rows:
            return torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        return self.implementation.head_gradient(hidden, weight, bias, self.shard.local(targets), *rest)

    def _target_rows(self, weight: Tensor, targets: Tensor) -> Tensor:
        """The rows (R, H) of the head that targets (R,) name, wherever they are held."""
        inside = self.shard.inside(targets)
        rows = weight.new_zeros(len(targets), weight.shape[1])
        rows[inside] = weight[targets[inside] - self.shard.start]
        return self.shard.sum(rows)


def tail_energy(
    hidden: Tensor,  # (N, H), the same on every rank
    weight: Tensor,  # (V_local, H)
    k: int,
    side: str,
    fill: str,
    bias: Tensor | None,  # (V_local,)
    options: HeadOptions,
    group: ProcessGroup,
) -> Tensor:
    """Tails of the whole vocabulary, (N,): what is in a rank's own tail is all that can be in that of the group."""
    shard = VocabularyShard.of(weight, group)
    _check_same_hidden(hidden, shard)
    width = int(shard.maximum(torch.tensor([min(k, shard.rows)], device=weight.device)))
    energy = hidden.new_empty(hidden.shape[0], dtype=shared.accumulation_dtype(hidden.dtype))
    for rows in shared.blocks(hidden.shape[0], shared.rows_within_scratch(shard.vocabulary)):
        z = shared.tile_logits(hidden[rows], weight, bias, options)
        mine = torch.topk(z, min(k, shard.rows), dim=-1, largest=side == "top", sorted=False).values
        padding = -math.inf if side == "top" else math.inf
        mine = torch.nn.functional.pad(mine, (0, width - mine.shape[-1]), value=padding).contiguous()
        candidates = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(candidates, mine, group=group)
        energy[rows] = shared.tail_energy_of_logits(
            torch.cat(candidates, dim=-1), k, side, fill, options.temperature, shard.vocabulary
        )
    return energy
