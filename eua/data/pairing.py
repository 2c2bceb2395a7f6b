"""The sampler that pairs forget rows with retain rows and orders them for training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

_GROUPS_SORTED = 50  # as in transformers' LengthGroupedSampler
NEAREST = 16  # retain rows that count as similar to a forget row
_ROWS_AT_ONCE = 4096


class Pair(NamedTuple):
    """Indices of rows that are trained on together: a forget row, its retain rows, and an alternative answer to its prompt."""

    forget: int
    retain: tuple[int, ...]
    alternative: tuple[int, ...] = ()  # one, or none


class PairedSampler(Sampler[Pair]):
    """Yields every forget row once per epoch, in a seeded order, each with ``ratio`` retain rows.

    Retain rows come from an endless sequence of seeded permutations that continues from epoch to epoch, so all of them are
    visited equally often, even if there are few forget rows. An epoch depends only on the seed and its number: a resumed run
    gets the same pairs as an uninterrupted one.

    Args:
        forget_lengths, retain_lengths: number of tokens in each row.
        ratio: retain rows for each forget row.
        seed: of all orders.
        group: this number of successive forget rows, and their retain rows, have similar lengths; 0: no grouping. An epoch
            contains the same rows either way.
        alternatives: number of other answers to each prompt to forget, of which successive epochs take successive ones; those
            of forget row i are the rows from ``i · alternatives`` on.
        similar: for each forget row the retain rows that are most like it, see :func:`similar_rows`. Every second retain row
            that it is paired with, over all epochs, is then one of these, in a seeded order. None: it has no say.
    """

    def __init__(
        self,
        forget_lengths: Sequence[int],
        retain_lengths: Sequence[int],
        ratio: int,
        seed: int,
        group: int = 0,
        alternatives: int = 0,
        similar: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.similar = similar
        self.lengths = {"forget": forget_lengths, "retain": retain_lengths}
        self.forget_rows, self.retain_rows = len(forget_lengths), len(retain_lengths)
        self.ratio, self.seed, self.group, self.alternatives = ratio, seed, group, alternatives
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.forget_rows

    def __iter__(self) -> Iterator[Pair]:
        return self._pairs(self.epoch)

    def rows_used(self, pairs_of_epochs: Iterable[int]) -> dict[str, set[int]]:
        """The rows in the first pairs of each epoch, given the number of these pairs: indices of rows by kind."""
        used: dict[str, set[int]] = {"forget": set(), "retain": set(), "alternative": set()}
        for epoch, pairs in enumerate(pairs_of_epochs):
            for pair in islice(self._pairs(epoch), pairs):
                used["forget"].add(pair.forget)
                used["retain"].update(pair.retain)
                used["alternative"].update(pair.alternative)
            every = (self.forget_rows, self.retain_rows, self.forget_rows * self.alternatives)
            if tuple(map(len, used.values())) == every:
                break
        return used

    def _pairs(self, epoch: int) -> Iterator[Pair]:
        forget = self._permutation("forget", epoch, self.forget_rows)
        retain = self._retain_rows(epoch * self.forget_rows * self.ratio, self.forget_rows * self.ratio)
        if self.group:
            forget, retain = self._by_length("forget", forget, 1), self._by_length("retain", retain, self.ratio)
        pairs = [
            Pair(
                index,
                self._with_similar(index, epoch, retain[i * self.ratio : (i + 1) * self.ratio]),
                self._alternative(index, epoch),
            )
            for i, index in enumerate(forget)
        ]
        if not self.group:
            yield from pairs
            return
        whole = len(pairs) // self.group  # whole groups; the rest stays at the end
        for number in [*self._permutation("group", epoch, whole), whole]:
            yield from pairs[number * self.group : (number + 1) * self.group]

    def _with_similar(self, forget: int, epoch: int, retain: Sequence[int]) -> tuple[int, ...]:
        """The retain rows of a forget row in an epoch, every second one replaced by one that is similar to it."""
        if self.similar is None:
            return tuple(retain)
        nearest = self.similar[forget]
        before = epoch * self.ratio  # the retain rows that it was paired with in earlier epochs
        order = self._permutation("similar", forget, len(nearest))
        return tuple(
            nearest[order[(before + place) // 2 % len(nearest)]] if (before + place) % 2 == 0 else row
            for place, row in enumerate(retain)
        )

    def _alternative(self, forget: int, epoch: int) -> tuple[int, ...]:
        return (forget * self.alternatives + epoch % self.alternatives,) if self.alternatives else ()

    def _by_length(self, kind: str, rows: list[int], ratio: int) -> list[int]:
        """Sorts rows by length within stretches. An epoch has at least four stretches, so the pairs stay random."""
        groups = min(_GROUPS_SORTED, max(1, self.forget_rows // (4 * self.group)))
        stretch = groups * self.group * ratio
        starts = range(0, len(rows), stretch)
        return [i for start in starts for i in sorted(rows[start : start + stretch], key=lambda i: -self.lengths[kind][i])]

    def _retain_rows(self, start: int, count: int) -> list[int]:
        """``count`` entries of the endless sequence of permutations, from ``start`` on."""
        first, offset = divmod(start, self.retain_rows)
        rows: list[int] = []
        while len(rows) < offset + count:
            rows += self._permutation("retain", first + len(rows) // self.retain_rows, self.retain_rows)
        return rows[offset : offset + count]

    def _permutation(self, kind: str, index: int, size: int) -> list[int]:
        salt = {"forget": 0, "retain": 1, "group": 1 << 40, "similar": (1 << 40) + 1}[kind]
        generator = torch.Generator().manual_seed(2 * (self.seed * 1_000_003 + index) + salt)
        return torch.randperm(size, generator=generator).tolist()


def similar_rows(forget: Sequence[Sequence[int]], retain: Sequence[Sequence[int]], count: int = NEAREST) -> list[list[int]]:
    """For each prompt to forget the ``count`` prompts to retain that share most tokens with it, the most similar first.

    Similarity is the number of different tokens that two prompts share, over that of those that one of them has (Jaccard 1901).
    Names are in few prompts, so what is found is mostly of the same form, with other names. Of equals the first come first.

    >>> similar_rows([[1, 2, 3]], [[7, 8], [1, 2, 9], [1, 2, 3, 4]], count=2)
    [[2, 1]]

    Args:
        forget, retain: prompts as token ids.
        count: number of prompts for each; all of them if there are fewer.
    """
    columns = {token: column for column, token in enumerate(sorted({token for prompt in forget for token in prompt}))}
    asked = _token_sets(forget, columns)
    found = torch.zeros(len(forget), 0)
    for start in range(0, len(retain), _ROWS_AT_ONCE):
        kept = retain[start : start + _ROWS_AT_ONCE]
        shared = asked @ _token_sets(kept, columns).T
        either = _sizes(forget)[:, None] + _sizes(kept) - shared
        found = torch.cat([found, shared / either.clamp(min=1)], dim=1)
    order = found.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].tolist()


def _token_sets(prompts: Sequence[Sequence[int]], columns: Mapping[int, int]) -> torch.Tensor:
    """Which tokens are in which prompt, as zeros and ones, (prompts, columns); other tokens than those of columns are left
    out."""
    sets = torch.zeros(len(prompts), len(columns))
    for row, prompt in enumerate(prompts):
        sets[row, [columns[token] for token in set(prompt) if token in columns]] = 1
    return sets


def _sizes(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([len(set(prompt)) for prompt in prompts])
