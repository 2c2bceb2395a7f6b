"""Vocabulary-sharded heads: every rank of a group holds some rows of the head and all of the hidden states.

The ranks hold consecutive stretches of the vocabulary in rank order, of any size, including empty ones. Each rank makes its own
pass; maxima, sums and weighted sums are then combined. Energy, NLL and the gradient of the hidden states are complete and equal
on every rank; the head's gradient is that of the rank's own rows.

Forward and backward both communicate. Every rank must make the same calls in the same order, with the same tokens and the same
upstream gradients; the number of collectives depends neither on the rows a rank holds nor on the values in the tensors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor, Replicate, Shard

from fused_energy import common as shared
from fused_energy.common import LEFT_OUT, OUT_OF_RANGE, HeadOptions, Pass


class VocabularyShard(NamedTuple):
    """The rows of a head that one rank of ``group`` holds: ``rows`` out of ``vocabulary``, beginning at ``start``."""

    group: ProcessGroup
    counts: tuple[int, ...]  # number of rows on each rank

    @classmethod
    def of(cls, weight: Tensor, group: ProcessGroup) -> VocabularyShard:
        """Ask every rank how many rows it holds; a collective call.

        Raises:
            ValueError: on every rank, if none holds a row.
        """
        counts = _gather(torch.tensor([weight.shape[0]], device=weight.device), group)
        if not counts.any():
            raise ValueError(
                f"weight has shape {tuple(weight.shape)} and no rank of process_group holds a row of the head, but an energy "
                "needs a vocabulary: pass the rows (V_local, H) of each rank, at least one row in total."
            )
        return cls(group, tuple(counts[:, 0].tolist()))

    @property
    def start(self) -> int:
        return sum(self.counts[: dist.get_rank(self.group)])

    @property
    def rows(self) -> int:
        return self.counts[dist.get_rank(self.group)]

    @property
    def vocabulary(self) -> int:
        return sum(self.counts)

    def inside(self, targets: Tensor) -> Tensor:
        return (targets >= self.start) & (targets < self.start + self.rows)

    def local(self, targets: Tensor | None) -> Tensor | None:
        """Targets counted from this shard's first row; out of range if another rank holds them."""
        if targets is None:
            return None
        own = torch.where(self.inside(targets), targets - self.start, OUT_OF_RANGE)
        return torch.where(targets == LEFT_OUT, LEFT_OUT, own)

    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x

    def maximum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x


def unwrap(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor | None, ProcessGroup | None]:
    """Local tensors of arguments of which some are DTensors, and the group over which the head is sharded.

    Raises:
        ValueError: if the head is neither sharded on dim 0 nor replicated; if the hidden states are not replicated; if
            ``group`` is not the group of the head's mesh.
    """
    if isinstance(weight, DTensor):
        if weight.device_mesh.ndim != 1 or weight.placements[0] not in (Shard(0), Replicate()):
            raise ValueError(
                f"weight is a DTensor placed {weight.placements} on a mesh of {weight.device_mesh.ndim} dimension(s), but a "
                "head can only be split by rows, over one dimension: redistribute it to [Shard(0)] on a mesh of one dimension, "
                "or pass weight.full_tensor()."
            )
        own = weight.device_mesh.get_group() if weight.placements[0] == Shard(0) else None
        if group is not None and (own is None or own.group_name != group.group_name):
            raise ValueError(
                f"weight is a DTensor placed {weight.placements} and process_group is not the group it is sharded over, so it "
                "is unclear which rank holds which rows: leave process_group out, the DTensor knows its group."
            )
        group = own
    if (isinstance(weight, DTensor) and bias is not None or isinstance(bias, DTensor)) and _placed(weight) != _placed(bias):
        raise ValueError(
            f"weight is {_placed(weight)[0]} and bias is {_placed(bias)[0]}, but a rank needs the bias of the rows it holds: "
            "distribute both over the same mesh with the same placements."
        )
    if isinstance(hidden, DTensor) and any(placement != Replicate() for placement in hidden.placements):
        raise ValueError(
            f"hidden is a DTensor placed {hidden.placements}, but every rank needs the full hidden states: redistribute it to "
            "[Replicate()] first."
        )
    hidden, weight = (x.to_local() if isinstance(x, DTensor) else x for x in (hidden, weight))
    return hidden, weight, bias.to_local() if isinstance(bias, DTensor) else bias, group


def _placed(x: Tensor | None) -> tuple[str, object]:
    return (f"a DTensor placed {x.placements}", x.device_mesh) if isinstance(x, DTensor) else ("a plain tensor", None)


def _gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """``x`` of every rank, (ranks, *x.shape)."""
    of_ranks = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, x.contiguous(), group=group)
    return torch.stack(of_ranks)


def _check_same_tokens(hidden: Tensor, shard: VocabularyShard) -> None:
    """Raise ``ValueError`` on every rank if ranks hold different tokens, as data-parallel ranks do; a collective call."""
    n, h = hidden.shape
    mine = torch.tensor([n, 0, 0], dtype=torch.float64, device=hidden.device)
    for rows in shared.blocks(n, shared.rows_within_scratch(2 * h)):
        part = hidden[rows].double().nan_to_num(0.0, 0.0, 0.0)  # values that are not finite must not hide the others
        mine[1] += part.sum()
        mine[2] += part.abs_().sum()
    of_ranks = _gather(mine, shard.group)
    apart = (of_ranks - of_ranks[0]).abs().amax(dim=0)
    # Equal up to the rounding of sums: different tokens differ by far more, even if a batch has about 10⁸ numbers.
    if (apart > of_ranks[:, 2].amax() * mine.new_tensor([0.0, 1e-6, 1e-6])).any():
        raise ValueError(
            f"The ranks of process_group pass different hidden states ({[int(x) for x in of_ranks[:, 0]]} tokens), but a head "
            "that is split by rows needs the same tokens on every rank: pass the group over which the head is split, not the "
            "group over which the data are split; if the head is sharded to save memory (FSDP), pass weight.full_tensor()."
        )


class ShardedHead:
    """Extends an implementation, which sees only the rank's own rows, to the full vocabulary."""

    def __init__(self, implementation: Any, group: str, weight: Tensor) -> None:
        self.implementation = implementation
        self.shard = VocabularyShard.of(weight, _resolve_process_group(group))  # type: ignore[arg-type]

    def forward(
        self,
        hidden: Tensor,  # (N, H), the same on every rank
        weight: Tensor,  # (V_local, H)
        bias: Tensor | None,  # (V_local,)
        targets: Tensor | None,  # (N,), counted over the full vocabulary
        options: HeadOptions,
        store: bool,
    ) -> Pass:
        shard = self.shard
        _check_same_tokens(hidden, shard)
        if shard.rows:
            own = self.implementation.forward(hidden, weight, bias, shard.local(targets), options, store)
        else:
            own = shared.empty_pass(hidden, targets, options, store)
            own.energy.fill_(math.inf)

        temperatures = options.column_of_temperatures(targets is not None, own.energy)
        maximum = shard.maximum(-own.energy)
        shift = torch.where(maximum.isinf(), 0.0, maximum)  # an infinite maximum must not be subtracted from itself
        energy = -shift - temperatures * shard.sum(torch.exp((-own.energy - shift) / temperatures)).log()
        target_logit = own.target_logit
        if targets is not None:
            energy = torch.where(targets == LEFT_OUT, 0.0, energy)
            inside = shard.inside(targets)
            found = shard.sum(torch.stack([torch.where(inside, own.target_logit, 0.0), inside.to(energy.dtype)]))
            target_logit = torch.where((found[1] == 1) | (targets == LEFT_OUT), found[0], math.nan)
        shares = torch.exp((energy - own.energy) / temperatures)  # of the softmax that lies in the rank's rows
        for k in range(own.weighted.shape[0]):
            share = shares[k, :, None]
            for rows in shared.blocks(hidden.shape[0], shared.rows_within_scratch(hidden.shape[1])):
                # If all logits of a rank are −inf, its mean is 0/0 and must not count.
                own.weighted[k, rows] = shard.sum(torch.where(share[rows] == 0, 0.0, own.weighted[k, rows] * share[rows]))
        return Pass(energy, target_logit, own.weighted)

    def hidden_gradient(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V_local, H)
        targets: Tensor | None,  # (N,)
        options: HeadOptions,
        done: Pass,
        grad_energy: Tensor,  # (K, N)
        grad_target: Tensor,  # (N,)
    ) -> Tensor:
        return shared.hidden_gradient(hidden, weight, targets, options, done, grad_energy, grad_target, self._target_rows)

    def head_gradient(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None, *rest: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.shard.rows:
            return torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        return self.implementation.head_gradient(hidden, weight, bias, self.shard.local(targets), *rest)

    def _target_rows(self, weight: Tensor, targets: Tensor) -> Tensor:
        """The rows (R, H) of the head for targets (R,), whichever rank holds them."""
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
    """Tails of the full vocabulary, (N,). Only logits in the tail of a single rank can be in the tail of the group."""
    shard = VocabularyShard.of(weight, group)
    _check_same_tokens(hidden, shard)
    width = min(k, max(shard.counts))  # ranks with fewer rows pad with what topk selects last; topk ranks NaN above all else
    padding = -math.inf if side == "top" else math.nan
    energy = hidden.new_empty(hidden.shape[0], dtype=shared.accumulation_dtype(hidden.dtype))
    # The same blocks on every rank, however many rows it holds; the candidates of all ranks can outnumber the vocabulary.
    longest = max(*shard.counts, width * len(shard.counts))
    for rows in shared.blocks(hidden.shape[0], shared.rows_within_scratch(longest, shared.tiles_of_tails(hidden))):
        z = shared.tile_logits(hidden[rows], weight, bias, options)
        mine = torch.topk(z, min(k, shard.rows), dim=-1, largest=side == "top", sorted=False).values
        candidates = _gather(torch.nn.functional.pad(mine, (0, width - mine.shape[-1]), value=padding), group)
        energy[rows] = shared.tail_energy_of_logits(
            rearrange(candidates, "ranks n k -> n (ranks k)"), k, side, fill, options.temperature, shard.vocabulary
        )
    return energy
