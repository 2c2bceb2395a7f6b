"""Figures of a model at every token of answers, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from eua.data.rows import EncodedRow
from eua.model.forward import answer_states, check_finite, eval_hidden_states
from eua.model.head import output_head


@torch.no_grad()
def answer_figures(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    figure: Callable[[Tensor, Tensor], Tensor],
    name: str,
    what: str,
    batch_size: int,
) -> list[Tensor]:
    """A figure of every answer token: a list of (A,) float32 tensors on the CPU, one per row.

    Args:
        model: in any mode; it computes in eval mode.
        rows: encoded rows.
        figure: from the states (N, H) that predict tokens, and these tokens (N,), to (N,).
        name, what: of the figure and of the rows, for error messages.
        batch_size: rows per forward.

    Raises:
        EUAError: if a hidden state or a figure is NaN or infinite.
    """
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for indices, hidden in eval_hidden_states(model, rows, batch_size):
        of_batch = [rows[i] for i in indices]
        states = answer_states(hidden, of_batch)
        check_finite(states, f"the model's hidden states on {what}")
        targets = torch.tensor([token for row in of_batch for token in row.answer_ids], device=states.device)
        values = figure(states, targets).float().cpu()
        check_finite(values, f"the {name} of {what}")
        for i, part in zip(indices, values.split([len(row.answer_ids) for row in of_batch]), strict=True):
            found[i] = part.clone()  # a view would send the whole batch to other processes
    return found


def answer_nll(model: nn.Module, rows: Sequence[EncodedRow], what: str, batch_size: int = 16) -> list[Tensor]:
    """The NLL of every answer token, in nats; arguments as above."""
    head = output_head(model)

    def nll(states: Tensor, targets: Tensor) -> Tensor:
        return head.energy_and_nll(states, targets, 1.0).nll

    return answer_figures(model, rows, nll, "likelihoods", what, batch_size)
