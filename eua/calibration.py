"""From scores of held-out prompts to a threshold (method.md §5)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from eua.errors import EUAError


def conformal_threshold(scores: Tensor, tolerance: float, groups: Sequence[Hashable] | None = None) -> float:
    """The lowest threshold above which at most a share ε of new retained prompts is expected to score.

    Without groups it is the ⌈(n+1)(1−ε)⌉-th smallest of the n scores (split conformal, Vovk et al. 2005): a prompt
    exchangeable with them scores above it with probability at most ε.

    Prompts about one person or document resemble each other, so they are not exchangeable with prompts about another. With
    ``groups`` whole groups are taken as exchangeable instead, and the expected share of a new group's prompts above the
    threshold is at most ε (conformal risk control, Angelopoulos et al. 2022; with one prompt a group, the same rule).

    Args:
        scores: (n,) scores of retained prompts that training has not seen.
        tolerance: ε, the tolerated rate of false refusals, in (0, 1).
        groups: what each score belongs to, e.g. a person's name.

    Raises:
        EUAError: fewer than ⌈1/ε⌉ − 1 scores or groups (the text says how many are missing), NaN scores, or ε outside (0, 1).
    """
    if not 0 < tolerance < 1:
        raise EUAError(f"tolerance = {tolerance}, but a rate of false refusals lies strictly between 0 and 1, e.g. 0.05.")
    if torch.isnan(scores).any():
        raise EUAError(
            f"{int(torch.isnan(scores).sum())} of {len(scores)} scores are NaN: mend the model or the prompts first."
        )
    if groups is not None and len(groups) != len(scores):
        raise EUAError(f"{len(groups)} groups were given for {len(scores)} scores: name the group of every prompt.")
    owners: Sequence[Hashable] = range(len(scores)) if groups is None else groups
    members = Counter(owners)
    needed = math.ceil(round(1 / tolerance, 9)) - 1
    if len(members) < needed:
        what = "calibration prompts" if groups is None else "groups of calibration prompts"
        raise EUAError(
            f"{len(members)} {what} are too few for a false-refusal rate of {tolerance:g}, which needs {needed}: "
            f"add {needed - len(members)} more that are held out, or tolerate at least {1 / (len(members) + 1):.3g}."
        )
    # Every group weighs 1 in all. The new group may be all wrong, so 1 of the G + 1 shares is given away beforehand.
    weights = torch.tensor([1 / members[owner] for owner in owners], dtype=torch.float64)
    allowed = tolerance * (len(members) + 1) - 1
    order = scores.sort(descending=True)
    above = weights[order.indices].cumsum(0) - weights[order.indices]  # the weight of all scores before this one
    return float(order.values[int((above <= allowed + 1e-9).sum()) - 1])
