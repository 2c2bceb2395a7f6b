"""A language-model head that returns energies and NLLs instead of logits, for patching models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fused_energy.api import EnergyNLL, linear_energy
from fused_energy.dispatch import Implementation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LinearEnergy(nn.Module):
    """``linear_energy`` with the weight and the bias of a linear layer, which is not changed.

    The parameters are shared, not copied, so optimizers, checkpoints and tied embeddings work as before. All other arguments
    are those of :func:`fused_energy.linear_energy`.

    Args:
        head: the layer whose output would be the logits; ``weight`` (V, H), ``bias`` (V,) or None.
    """

    def __init__(
        self,
        head: nn.Linear,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        implementation: Implementation = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.head = head
        self.temperature, self.logit_scale, self.softcap = temperature, logit_scale, softcap
        self.ignore_index, self.implementation, self.process_group = ignore_index, implementation, process_group

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor | EnergyNLL:
        """Energy of every token, (..., H) → (...,), and its NLL if ``targets`` (...,) are given."""
        return linear_energy(
            hidden,
            self.head.weight,
            targets,
            bias=self.head.bias,
            temperature=self.temperature,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            ignore_index=self.ignore_index,
            implementation=self.implementation,
            process_group=self.process_group,
        )

    def nll(self, hidden: Tensor, targets: Tensor, count: Tensor | float | None = None) -> Tensor:
        """The cross-entropy loss: the sum of the NLL over all tokens that are not ignored, divided by their number.

        ``count`` replaces that number if tokens of other batches belong to the same step, as in gradient accumulation.
        Without any tokens the loss is 0.
        """
        both = self(hidden, targets)
        counted = (targets != self.ignore_index).sum().clamp(min=1) if count is None else count
        return both.nll.sum() / counted

    def extra_repr(self) -> str:
        options = ("temperature", "logit_scale", "softcap", "ignore_index", "implementation")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)
