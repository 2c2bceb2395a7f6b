"""The D² loss and its parts: tensors in, tensors out (method.md §4)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from eua.methods.answers import Answers


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
        nll: the loss of the retained tokens, in nats: their NLL, as in the released code, or
            :func:`eua.methods.retain.reference_kl`.
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
    forget_part = mean(_squared_hinge(m_out - energy), is_forget, forget_count)
    retain_part = mean(_squared_hinge(energy - m_in), is_retain, retain_count)
    nll_part = mean(nll, is_retain, retain_count)
    return D2Loss(gamma * (retain_part + forget_part) + alpha * nll_part, forget_part, retain_part, nll_part)


def above_boundary(
    answers: Answers, margin: float | None = None, margin_excess: float | None = None, answer_energy: float = 1.0
) -> Tensor:
    """EUA's forget part: ``relu(m_out − E)²``, (B, S−1).

    Published settings: γ = 0.05, α = 1, ρ = 0.1, T = 1, learning rate 1e-5, 10 epochs.

    Args:
        answers: of the batch.
        margin: not in D²: adds ``relu(margin − NLL)²``, in nats². Adding a constant to all logits raises or lowers the energy
            and changes no probability, so a model can meet its boundary and still say what it should forget. It cannot meet a
            margin in this way. A token whose margin is met gets a gradient of exactly zero from this part.
        margin_excess: not in D²: adds ``relu(NLL − margin − margin_excess)²``, so that no token is forgotten more than that.
            None: nothing is added.
        answer_energy: not in D²: weight of the energies, which leaves the margin as it is.
    """
    beyond = answer_energy * _squared_hinge(answers.reference - answers.energy)
    if margin is not None:
        beyond = beyond + _squared_hinge(margin - answers.nll)
        if margin_excess is not None:
            beyond = beyond + _squared_hinge(answers.nll - margin - margin_excess)
    return beyond


def below_boundary(answers: Answers) -> Tensor:
    """EUA's energy part at tokens to retain: ``relu(E − m_in)²``, (B, S−1)."""
    return _squared_hinge(answers.energy - answers.reference)


def _squared_hinge(gap: Tensor) -> Tensor:
    """0, with a gradient of exactly 0, where the boundary is met."""
    return gap.relu().square()


def mean(values: Tensor, mask: Tensor, count: Tensor | int | None) -> Tensor:
    """The sum of the values in a mask, divided by ``count`` or by their number; 0 without any."""
    count = mask.sum() if count is None else count
    total = values.where(mask, 0.0).sum()  # not indexed, which would synchronize a GPU
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
