"""The D² loss and its parts: tensors in, tensors out (method.md §4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class D2Loss(NamedTuple):
    """The loss and its parts, scalars that carry gradients: ``loss = γ·(retain + forget) + α·nll``."""

    loss: Tensor
    forget: Tensor
    retain: Tensor
    nll: Tensor


def d2_loss(
    energy: Tensor,  # (...,)
    nll: Tensor,  # (...,)
    boundary: Tensor | tuple[float, float],  # (...,) or the constants (m_in, m_out)
    forget: Tensor,  # (...,) bool
    counted: Tensor,  # (...,) bool
    *,
    gamma: float = 0.05,
    alpha: float = 1.0,
    forget_count: Tensor | int | None = None,
    retain_count: Tensor | int | None = None,
) -> D2Loss:
    """``γ·(mean_retain relu(E − m_in)² + mean_forget relu(m_out − E)²) + α·mean_retain NLL``.

    Means are over counted tokens. A token whose energy is beyond its boundary gets a gradient of exactly zero from that part.

    Args:
        energy: per token, in nats, from :func:`fused_energy.linear_energy`.
        nll: the loss of the retained tokens, in nats: their NLL, as in the released code, or :func:`reference_kl`.
        boundary: m_in at retain tokens and m_out at forget tokens, or both as constants.
        forget: True at tokens to forget, False at tokens to retain; broadcast against ``energy``.
        counted: True at the tokens of answers; other tokens contribute nothing.
        gamma: weight of the two energy parts.
        alpha: weight of the retained tokens' NLL.
        forget_count, retain_count: divisors of the means, instead of the number of tokens here. With the counts of a full
            gradient accumulation step, the losses of its batches add up to the loss of one large batch.

    Returns:
        :class:`D2Loss`. A part without tokens is 0.
    """
    is_forget = forget & counted
    is_retain = ~forget & counted
    m_in, m_out = boundary if isinstance(boundary, tuple) else (boundary, boundary)
    forget_part = _mean((m_out - energy).relu().square(), is_forget, forget_count)
    retain_part = _mean((energy - m_in).relu().square(), is_retain, retain_count)
    nll_part = _mean(nll, is_retain, retain_count)
    return D2Loss(gamma * (retain_part + forget_part) + alpha * nll_part, forget_part, retain_part, nll_part)


def _mean(values: Tensor, mask: Tensor, count: Tensor | int | None) -> Tensor:
    count = mask.sum() if count is None else count
    total = values.where(mask, 0.0).sum()
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def reference_kl(
    hidden: Tensor,  # (N, H)
    ref_hidden: Tensor,  # (N, H'), of the reference
    *,
    logits: Callable[[Tensor], Tensor],
    ref_logits: Callable[[Tensor], Tensor],
    tile: int = 64,
) -> Tensor:
    """``KL(p_ref ‖ p) = Σ_v p_ref(v)·(log p_ref(v) − log p(v))`` of each token, (N,), in nats, at T = 1.

    Used instead of the retained tokens' NLL, it keeps the full distribution of the reference and not only the answer. It is 0
    if the model predicts the same, and its gradient with respect to the logits is ``p − p_ref``.

    Logits are computed for ``tile`` tokens at a time, (tile, V), and again in the backward pass; only hidden states are kept.
    The reference gets no gradient.
    """

    def of_tile(part: Tensor, ref_part: Tensor) -> Tensor:
        with torch.no_grad():
            ref = ref_logits(ref_part).log_softmax(dim=-1)
        return (ref.exp() * (ref - logits(part).log_softmax(dim=-1))).sum(dim=-1)

    tiles = zip(hidden.split(tile), ref_hidden.split(tile), strict=True)
    return torch.cat([checkpoint(of_tile, *parts, use_reentrant=False, preserve_rng_state=False) for parts in tiles])


def scheduled_gamma(gamma: float, schedule: str, warmup_ratio: float, step: int, steps: int) -> float:
    """γ of one step: it rises from 0 during warmup, then stays constant or decays towards 0 until the last step.

    It depends only on the step, so a resumed run continues the schedule.

    Args:
        gamma: the peak.
        schedule: what follows the warmup: ``"constant"``, or ``"linear"`` or ``"cosine"`` decay.
        warmup_ratio: the fraction of the steps over which γ rises, in [0, 1).
        step: number of steps before this one.
        steps: number of steps in the full run.
    """
    done = step / steps
    if done < warmup_ratio:
        return gamma * done / warmup_ratio
    left = (1 - done) / (1 - warmup_ratio)
    return gamma * {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]


_OF_FORGET = ("loss_forget", "energy_forget", "beyond_boundary_forget")
_OF_RETAIN = ("loss_retain", "energy_retain", "beyond_boundary_retain", "nll_retain", "kl_retain")


def loss_sums(
    energy: Tensor,  # (...,)
    nll: Tensor,  # (...,)
    boundary: Tensor,  # (...,)
    forget: Tensor,  # (...,) bool, counted tokens to forget
    retain: Tensor,  # (...,) bool, counted tokens to retain
    kl: Tensor | None = None,  # (...,) from reference_kl, if the loss uses it
) -> Tensor:
    """Counts of tokens and sums over them, (9,) or with ``kl`` (10,), to add up over batches and pass to :func:`loss_means`."""
    gap_out, gap_in = (boundary - energy).relu(), (energy - boundary).relu()
    # Masked sums instead of indexing, which would synchronize a GPU each time.
    sums = [
        *(mask.sum() for mask in (forget, retain)),
        *(x.where(forget, 0.0).sum() for x in (gap_out.square(), energy, (gap_out == 0).float())),
        *(x.where(retain, 0.0).sum() for x in (gap_in.square(), energy, (gap_in == 0).float(), nll)),
        *(x.where(retain, 0.0).sum() for x in ([] if kl is None else [kl])),
    ]
    return torch.stack([x.float() for x in sums])


def loss_means(sums: Tensor) -> dict[str, float]:
    """Means over tokens from the sums of :func:`loss_sums`: the unweighted parts of the loss, mean energies in nats
    (``energy_``), and the share of tokens beyond their boundary (``beyond_boundary_``). A part without tokens is 0."""
    forget, retain, *totals = sums.tolist()
    counts = [forget] * len(_OF_FORGET) + [retain] * len(_OF_RETAIN)
    # Without KL there is one total fewer than names.
    return {name: x / max(n, 1) for name, x, n in zip(_OF_FORGET + _OF_RETAIN, totals, counts, strict=False)}
