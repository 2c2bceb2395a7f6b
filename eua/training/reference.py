"""Reference: the frozen model before unlearning, for boundaries at every step and for the KL loss."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eua.data.rows import IGNORE_INDEX
from eua.errors import EUAError
from eua.methods.d2 import reference_kl
from eua.model.forward import check_head, hidden_states
from eua.model.head import Fill, Head, output_head
from eua.training.boundaries import TAIL_OF_KIND


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
    def states(self, batch: dict[str, Tensor]) -> Tensor:
        """The hidden states that predict ``labels[:, 1:]``, (B, S−1, H)."""
        return hidden_states(self.model, batch)[:, :-1]

    @torch.no_grad()
    def boundaries(self, states: Tensor, batch: dict[str, Tensor], fraction: float, temperature: float, fill: Fill) -> Tensor:
        """m_out at the answer tokens of forget rows and m_in at those of retain rows (method.md §3), (B, S−1); 0 elsewhere."""
        counted = batch["labels"][:, 1:] != IGNORE_INDEX
        boundary = torch.zeros(counted.shape, device=states.device)
        forget = batch["forget"][:, 1:]
        for kind, tokens in (("forget", counted & forget), ("retain", counted & ~forget)):
            boundary[tokens] = self.head.tail_energy(states[tokens], fraction, TAIL_OF_KIND[kind], fill, temperature).float()
        return boundary

    def kl(self, states: Tensor, hidden: Tensor, head: Head) -> Tensor:
        """KL(reference ‖ model) at each position, (N,), from the hidden states (N, H) of both and the model's head.

        The heads run in their weights' dtype, not under autocast: logits in bfloat16 would be off by a tenth of a nat.
        """
        return reference_kl(
            hidden.to(head.weight.dtype), states.to(self.head.weight.dtype), logits=head.logits, ref_logits=self.head.logits
        )
