"""Reference: the frozen model before unlearning, for boundaries at every step, for the KL loss, and for RMU and UNDIAL."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eua.errors import EUAError
from eua.methods.answers import Places
from eua.model.forward import check_head, hidden_and_inner_states
from eua.model.head import Fill, Head, output_head
from eua.training.boundaries import boundaries_of


class Reference:
    """The model before unlearning, in eval mode; it never gets a gradient.

    Args:
        model: the reference; moved to ``device``.
        trained: the model in training; the two may share no parameter.

    Raises:
        EUAError: if it shares parameters with the model in training, or has another vocabulary or an unsupported head.
    """

    def __init__(self, model: PreTrainedModel, trained: PreTrainedModel, device: torch.device) -> None:
        in_training = {id(parameter) for parameter in trained.parameters()}
        if any(id(parameter) in in_training for parameter in model.parameters()):
            raise EUAError(
                "ref_model shares weights with the model in training, so it would not stay the model before unlearning: "
                "pass a copy (copy.deepcopy before an adapter is added), or load it a second time."
            )
        sizes = [output_head(m).vocabulary for m in (model, trained)]
        if sizes[0] != sizes[1]:
            raise EUAError(
                f"ref_model has a vocabulary of {sizes[0]} and the model in training one of {sizes[1]}, so their energies and "
                "probabilities are of different tokens: pass the model as it was before unlearning."
            )
        check_head(model)
        self.model = model.to(device).eval()

    @property
    def head(self) -> Head:
        return output_head(self.model)

    @torch.no_grad()
    def states(self, batch: dict[str, Tensor], layer: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The hidden states that the head reads, (B, S, H), and the output of a block (B, S, H), if one is named."""
        return hidden_and_inner_states(self.model, batch, layer)

    @torch.no_grad()
    def boundaries(self, states: Tensor, places: Places, fraction: float, temperature: float, fill: Fill) -> Tensor:
        """m_out at the answer tokens of forget rows and m_in at those of retain rows (method.md §3), (B, S−1); 0 elsewhere."""
        boundary = torch.zeros(places.counted.shape, device=states.device)
        for kind, tokens in (("forget", places.forget), ("retain", places.retain)):
            boundary[tokens] = boundaries_of(self.head, states[:, :-1][tokens], kind, fraction, fill, temperature).float()
        return boundary
