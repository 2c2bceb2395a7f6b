"""The metrics of a model in training on held-out rows: the D² loss, its parts, and how well energies separate prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from eua.data.rows import EncodedRow
from eua.methods.d2 import loss_means, loss_sums
from eua.model.forward import answer_states, check_finite, eval_hidden_states
from eua.model.head import output_head
from eua.statistics import auroc
from eua.training.reference import Reference


@torch.no_grad()
def held_out_metrics(
    model: nn.Module,
    rows: Mapping[str, Sequence[EncodedRow]],
    boundaries: Mapping[str, Sequence[Tensor]],
    *,
    gamma: float,
    alpha: float,
    temperature: float,
    batch_size: int,
    progress: bool = True,
    kl_reference: Reference | None = None,
) -> dict[str, float]:
    """The D² loss of held-out rows, its parts, and how well the scores of prompts separate forget from retain rows.

    It draws no random number and restores the model's mode, so training goes on as if nothing had happened.

    Args:
        model: the model in training.
        rows: encoded rows, ``"forget"`` and ``"retain"``.
        boundaries: of these rows, (A,) each, as :func:`eua.training.boundaries.compute_boundaries` gives them.
        gamma, alpha: weights of the loss.
        temperature: T of the energy.
        batch_size: rows per forward.
        kl_reference: if given, the loss contains KL to this model instead of the retained tokens' NLL.

    Returns:
        ``loss``, the names of :func:`eua.methods.d2.loss_means`, and ``auroc``: the prompts' scores, forget against retain.
    """
    head = output_head(model)
    totals: list[Tensor] = []
    scores: dict[str, Tensor] = {}
    for kind in ("forget", "retain"):
        of_prompts: list[Tensor] = []
        title = f"held-out {kind} rows" if progress else None
        reference = None if kl_reference is None else eval_hidden_states(kl_reference.model, rows[kind], batch_size)
        for indices, hidden in eval_hidden_states(model, rows[kind], batch_size, title):
            batch = [rows[kind][i] for i in indices]
            states = answer_states(hidden, batch)
            check_finite(states, f"the hidden states of held-out {kind} rows")
            targets = torch.tensor([token for row in batch for token in row.answer_ids], device=states.device)
            energy, nll = head.energy_and_nll(states, targets, temperature)
            boundary = torch.cat([boundaries[kind][i] for i in indices]).to(energy.device)
            is_forget = torch.full_like(boundary, kind == "forget", dtype=torch.bool)
            kl = None
            if kl_reference is not None and reference is not None:
                _, theirs = next(reference)  # of the same rows: batches depend on nothing but the rows
                kl = kl_reference.kl(answer_states(theirs, batch), states, head)
            totals.append(loss_sums(energy, nll, boundary, is_forget, ~is_forget, kl))
            # The prompt's last token predicts the answer's first one. Its energy is the prompt's score.
            starts = torch.tensor([0, *(len(row.answer_ids) for row in batch[:-1])], device=energy.device).cumsum(0)
            of_prompts.append(energy[starts].float().cpu())
        scores[kind] = torch.cat(of_prompts)
    means = loss_means(torch.stack(totals).sum(dim=0))
    loss = (
        gamma * (means["loss_forget"] + means["loss_retain"])
        + alpha * means["nll_retain" if kl_reference is None else "kl_retain"]
    )
    return {"loss": loss, **means, "auroc": auroc(scores["forget"], scores["retain"])}
