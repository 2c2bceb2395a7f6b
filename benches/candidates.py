"""What the GPU kernels could become: prototypes of forward and backward, to be timed with those that are built.

- Hybrid: ``torch.mm`` (cuBLAS) writes a chunk of logits and a Triton kernel reads it. The backward is built so, with chunks
  that fit a budget of memory; here are other sizes, and logits in half precision.
- Kept logits: all logits are stored in the dtype of the head, and their gradient replaces them.

Exponents have base 2 throughout: scores are logits · log2(e). Every prototype that computes energies is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from heads import Head
from torch import Tensor

LOG2E = math.log2(math.e)
LOWEST = -3.0e38
LOWEST_SCORE = tl.constexpr(LOWEST)
RISE = 20.0  # a row's reference score changes only for scores that lie further above it, so its sums are rarely rescaled


class Chunk(NamedTuple):
    """How many tokens and how much of the vocabulary a hybrid handles at a time, and the dtype of its logits."""

    rows: int
    columns: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.rows} × {self.columns} in {str(self.dtype).removeprefix('torch.')}"


class Candidate(NamedTuple):
    name: str
    step: Callable[[], Any]
    energies: Callable[[], Tensor] | None = None  # (N,), of the last run


@triton.jit
def _fold(z, maxima, sums, width, scale, BLOCK: tl.constexpr):
    """Fold one row of a chunk of logits into its running maximum and sum."""
    row = tl.program_id(0).to(tl.int64)
    old = tl.load(maxima + row)
    maximum = tl.full((BLOCK,), LOWEST_SCORE, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(z + row * width + at, mask=at < width, other=float("-inf")).to(tl.float32) * scale
        risen = tl.maximum(maximum, x)
        total = total * tl.exp2(maximum - risen) + tl.exp2(x - risen)
        maximum = risen
    new = tl.maximum(old, tl.max(maximum, 0))
    added = tl.load(sums + row) * tl.exp2(old - new) + tl.sum(total * tl.exp2(maximum - new), 0)
    tl.debug_barrier()  # every warp has read the old values before one of them stores the new ones
    tl.store(maxima + row, new)
    tl.store(sums + row, added)


@triton.jit
def _to_probabilities(z, p, references, sums, weighted, width, hidden_size, scale, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """One row of logits becomes ``exp2(score − reference)``; if the reference must rise, the row's sums are rescaled."""
    row = tl.program_id(0).to(tl.int64)
    old = tl.load(references + row)
    maximum = tl.full((BLOCK,), LOWEST_SCORE, tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(z + row * width + at, mask=at < width, other=LOWEST_SCORE).to(tl.float32)
        maximum = tl.maximum(maximum, x * scale)
    top = tl.max(maximum, 0)
    new = tl.where(top > old + LIMIT, top, old)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(z + row * width + at, mask=at < width, other=float("-inf")).to(tl.float32)
        e = tl.exp2(x * scale - new)
        total += e
        tl.store(p + row * width + at, e.to(p.dtype.element_ty), mask=at < width)
    added = tl.load(sums + row) * tl.exp2(old - new) + tl.sum(total, 0)
    tl.debug_barrier()
    tl.store(sums + row, added)
    if new != old:
        tl.store(references + row, new)
        for start in range(0, hidden_size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(weighted + row * hidden_size + at, mask=at < hidden_size, other=0.0)
            tl.store(weighted + row * hidden_size + at, x * tl.exp2(old - new), mask=at < hidden_size)


@triton.jit
def _to_gradients(z, dz, lse, upstream, targets, first, width, scale, BLOCK: tl.constexpr):
    """One row of logits becomes its gradient: ``upstream · (softmax − onehot)``; ``lse`` is in base 2."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.load(upstream + row)
    own = tl.load(lse + row)
    target = tl.load(targets + row) - first
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(z + row * width + at, mask=at < width, other=float("-inf")).to(tl.float32)
        d = g * (tl.exp2(x * scale - own) - tl.where(at == target, 1.0, 0.0))
        tl.store(dz + row * width + at, d.to(dz.dtype.element_ty), mask=at < width)


def forward_candidates(head: Head, chunks: list[Chunk], block: int) -> Iterator[Candidate]:
    """Energies alone, by hybrids; each also with its products alone, whose difference is the fold."""
    hidden, weight = head.hidden, head.weight
    n = len(hidden)
    for chunk in chunks:
        work = _Chunks(head, chunk)
        maxima, sums = (torch.empty(n, device=hidden.device) for _ in range(2))

        def hybrid(work=work, maxima=maxima, sums=sums) -> None:
            maxima.fill_(LOWEST)
            sums.zero_()
            for rows, columns, z, _ in work:
                _mm(hidden[rows], weight[columns].T, z)
                _fold[(len(z),)](z, maxima[rows], sums[rows], z.shape[1], LOG2E, BLOCK=block, num_warps=4)

        def products(work=work) -> None:
            for rows, columns, z, _ in work:
                _mm(hidden[rows], weight[columns].T, z)

        yield Candidate(f"hybrid, {chunk}", hybrid, lambda maxima=maxima, sums=sums: -(maxima + sums.log2()) / LOG2E)
        yield Candidate(f"hybrid, {chunk}: products alone", products)


def backward_candidates(head: Head, chunks: list[Chunk], block: int) -> Iterator[Candidate]:
    """With a frozen head, one pass makes ``softmax · W``; the head's gradient takes a second one. Their products also alone."""
    hidden, weight = head.hidden, head.weight
    n, h = hidden.shape
    lse, upstream = torch.full((n,), 17.0, device=hidden.device), torch.rand(n, device=hidden.device)
    for chunk in chunks:
        work = _Chunks(head, chunk)
        weighted = torch.zeros(min(chunk.rows, n), h, device=hidden.device)
        references, sums = (torch.empty(n, device=hidden.device) for _ in range(2))

        def frozen(work=work, weighted=weighted, references=references, sums=sums) -> None:
            references.fill_(-1e30)
            sums.zero_()
            for rows, columns, z, p in work:
                if columns.start == 0:
                    weighted.zero_()
                _mm(hidden[rows], weight[columns].T, z)
                _to_probabilities[(len(z),)](
                    z, p, references[rows], sums[rows], weighted, z.shape[1], h, LOG2E, LIMIT=RISE, BLOCK=block, num_warps=4
                )
                _addmm(weighted[: len(p)], p, weight[columns])

        def by_head(work=work, weighted=weighted) -> None:
            for _, columns, _, p in work:
                _addmm(weighted[: len(p)], p, weight[columns])

        def of_frozen(references=references, sums=sums) -> Tensor:
            return -(references + sums.log2()) / LOG2E

        yield Candidate(f"frozen head, hybrid, {chunk}", frozen, of_frozen)
        yield Candidate(f"frozen head, hybrid, {chunk}: p W alone", by_head)
        if chunk.rows < n:
            continue
        gradient = torch.empty_like(weight)

        def head_gradient(work=work, gradient=gradient) -> None:
            for rows, columns, z, dz in work:
                _mm(hidden[rows], weight[columns].T, z)
                _to_gradients[(len(z),)](
                    z, dz, lse, upstream, head.targets, columns.start, z.shape[1], LOG2E, BLOCK=block, num_warps=4
                )
                torch.mm(dz.T, hidden[rows], out=gradient[columns])

        yield Candidate(f"head's gradient, hybrid, {chunk}", head_gradient)


def kept_candidates(head: Head, block: int) -> Iterator[Candidate]:
    """The parts of a trained head's pass that stores all logits in the dtype of the head."""
    hidden, weight = head.hidden, head.weight
    n, v = len(hidden), len(weight)
    z = torch.empty(n, v, device=hidden.device, dtype=hidden.dtype)
    lse, upstream = torch.full((n,), 17.0, device=hidden.device), torch.rand(n, device=hidden.device)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def gradients() -> None:
        _to_gradients[(n,)](z, z, lse, upstream, head.targets, 0, v, LOG2E, BLOCK=block, num_warps=8)

    yield Candidate("kept logits: z", lambda: torch.mm(hidden, weight.T, out=z))
    yield Candidate("kept logits: dz in place of z", gradients)
    yield Candidate("kept logits: dz W", lambda: torch.mm(z, weight, out=grad_hidden))
    yield Candidate("kept logits: dzᵀ h", lambda: torch.mm(z.T, hidden, out=grad_weight))


class _Chunks:
    """The chunks of a pass: tokens, columns, room for logits, and room for what replaces them (in place if dtypes agree)."""

    def __init__(self, head: Head, chunk: Chunk) -> None:
        self.n, self.v = len(head.hidden), len(head.weight)
        self.rows, self.columns = min(chunk.rows, self.n), min(chunk.columns, self.v)
        self.logits = torch.empty(self.rows * self.columns, device=head.hidden.device, dtype=chunk.dtype)
        same = chunk.dtype == head.hidden.dtype
        self.others = self.logits if same else torch.empty_like(self.logits, dtype=head.hidden.dtype)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        for r in range(0, self.n, self.rows):
            for c in range(0, self.v, self.columns):
                rows, columns = slice(r, min(r + self.rows, self.n)), slice(c, min(c + self.columns, self.v))
                shape = rows.stop - rows.start, columns.stop - columns.start
                yield rows, columns, *(x[: shape[0] * shape[1]].view(shape) for x in (self.logits, self.others))


def _mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:  # half precision on a GPU
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _addmm(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
