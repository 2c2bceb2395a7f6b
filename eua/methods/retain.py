"""The part of the loss that keeps retained rows: their NLL, the divergence from the reference, or RMU's inner states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eua.methods import rmu
from eua.methods.answers import Answers, Places
from eua.methods.tiles import in_tiles


def retained(answers: Answers, how: str, as_released: bool) -> Tensor:
    """The values whose mean over :func:`retained_places` is the retain part: "nll", "kl" or "hidden"."""
    if how == "nll":
        return answers.nll
    if how == "hidden":
        return rmu.kept_as_released(answers) if as_released else rmu.kept(answers)
    hidden, head, ref_hidden, ref_head = answers.hidden, answers.head, answers.ref_hidden, answers.ref_head
    if hidden is None or head is None or ref_hidden is None or ref_head is None:
        raise ValueError("KL compares with the model before unlearning: give hidden states and heads of both to Answers")
    counted = retained_places(answers.places, how, as_released)
    width = counted.shape[1]
    # The heads run in their weights' dtype, not under autocast: logits in bfloat16 would be off by a tenth of a nat.
    states, ref_states = (
        hidden[:, :width][counted].to(head.weight.dtype),
        ref_hidden[:, :width][counted].to(ref_head.weight.dtype),
    )
    values = reference_kl(states, ref_states, logits=head.logits, ref_logits=ref_head.logits)
    empty = torch.zeros(counted.shape, dtype=answers.energy.dtype, device=counted.device)
    return empty.masked_scatter(counted, values.to(empty.dtype))


def retained_places(places: Places, how: str, as_released: bool) -> Tensor:
    """The tokens or rows over which the retain part is averaged: a bool mask in the shape of :func:`retained`'s values.

    OpenUnlearning averages KL over all positions, prompt and padding included; RMU's released mean is that of a batch.
    """
    of_retain = ~(places.of_forget | places.of_alternative)
    if how == "hidden":
        return of_retain.any()[None] if as_released else places.rows_with(places.retain)
    return of_retain if how == "kl" and as_released else places.retain


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

    return in_tiles(of_tile, hidden, ref_hidden, tile=tile)
