"""Energies of a generation as it runs: at the prompt's last token, and at the first tokens that are generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedModel

from eua.errors import EUAError
from eua.hidden import check_finite, output_head, output_module


def end_ids(eos: int | list[int] | None) -> list[int]:
    """What a config calls ``eos_token_id``, as the ids that end a row."""
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


class EnergyRecorder(LogitsProcessor):
    """Reads what the head reads at each step of one ``generate`` call, so before any penalty, temperature or other processor.

    Args:
        model: the model that generates.
        temperature: T of the energy.
        first_tokens: how many generated tokens are recorded after the prompt's last one.
        eos: token ids that end a row; what comes after one does not count.
    """

    def __init__(self, model: PreTrainedModel, temperature: float, first_tokens: int, eos: Sequence[int]) -> None:
        self.model, self.temperature, self.first_tokens = model, temperature, first_tokens
        self.eos = torch.tensor(list(eos))
        self.energies: list[Tensor] = []  # (R,) on the CPU, of each step
        self.start = 0  # tokens of the prompt, padding included
        self._last_hidden: Tensor | None = None

    @property
    def is_complete(self) -> bool:
        return len(self.energies) > self.first_tokens

    @contextmanager
    def listening(self) -> Iterator[None]:
        hook = output_module(self.model).register_forward_pre_hook(self._capture)
        try:
            yield
        finally:
            hook.remove()

    def _capture(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not self.is_complete:
            self._last_hidden = arguments[0][:, -1].detach()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.is_complete:
            self._record(input_ids)
        return scores

    def _record(self, input_ids: Tensor) -> None:
        if self._last_hidden is None or self._last_hidden.shape[0] != input_ids.shape[0]:
            raise EUAError(
                "The hidden states did not pass through the model's head one row each, so the guard cannot see them: "
                "generate without compilation, or detach the guard knowingly."
            )
        if not self.energies:
            self.start = input_ids.shape[1]
        energy = output_head(self.model).energy(self._last_hidden, self.temperature).float().cpu()
        self._last_hidden = None
        ended = torch.isin(input_ids[:, self.start :].cpu(), self.eos).any(dim=1)
        check_finite(energy[~ended], "the energies of the prompts")
        self.energies.append(energy.where(~ended, torch.nan))  # a row that has ended says nothing more

    def scores(self) -> Tensor:
        """The mean energy of what was recorded of each row, (R,)."""
        return torch.stack(self.energies).nanmean(dim=0)
