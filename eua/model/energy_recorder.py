"""Records energies during generation: at the prompt's last token, and of the generated tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedModel

from eua.errors import EUAError
from eua.model.forward import check_finite
from eua.model.head import output_head, output_module


def end_ids(eos: int | list[int] | Tensor | None) -> list[int]:
    """The token ids that end a row, from a config's ``eos_token_id``."""
    return [] if eos is None else torch.as_tensor(eos).flatten().tolist()


class EnergyRecorder(LogitsProcessor):
    """Records the energy at each step of one ``generate`` call, from the head's input, so before any penalty or temperature.

    It must be the first processor: the caller's own processors may run the model themselves, and the head's last input must be
    that of the step.

    Args:
        model: the model that generates.
        temperature: T of the energy.
        first_tokens: how many generated tokens are recorded after the prompt's last one.
        eos: token ids that end a row; tokens after one do not count.
        drafted: whether answers are drafted and then checked several tokens at a time (assisted decoding). The processor is
            then called for drafts, too, and the first position of a forward is the one to read.
    """

    def __init__(
        self, model: PreTrainedModel, temperature: float, first_tokens: int, eos: Sequence[int], drafted: bool = False
    ) -> None:
        self.model, self.temperature, self.first_tokens, self.drafted = model, temperature, first_tokens, drafted
        self.eos = torch.tensor(list(eos))
        self.energies: list[Tensor] = []  # (R,) on the CPU, one per step
        self.start = 0  # tokens of the prompt, padding included
        self._thread = threading.get_ident()
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
            self._last_hidden = None

    def _capture(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if self.is_complete or threading.get_ident() != self._thread:  # another thread may use the model
            return
        if self._last_hidden is None or not self.drafted:
            # A clone: a view would keep the hidden states of all positions alive.
            self._last_hidden = arguments[0][:, 0 if self.drafted else -1].detach().clone()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        is_of_a_draft = self.drafted and self._last_hidden is None
        if not self.is_complete and not is_of_a_draft:
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
        ended = has_ended(input_ids[:, self.start :], self.eos)
        check_finite(energy[~ended], "the energies of the prompts")
        self.energies.append(energy.where(~ended, torch.nan))  # a row that has ended has no more energies

    def scores(self) -> Tensor:
        """The mean recorded energy of each row, (R,)."""
        return torch.stack(self.energies).nanmean(dim=0)


class EnergyProbe(LogitsProcessor):
    """Follows one ``generate`` call and keeps the highest mean energy of ``window`` successive tokens of each row so far.

    It reads the logits that the head computed, so it needs no second product with the head.

    Args:
        model: the model that generates.
        temperature: T of the energy.
        window: the number of tokens in the mean. A row with fewer tokens has no mean.
        eos: token ids that end a row; tokens after one do not count.
    """

    def __init__(self, model: PreTrainedModel, temperature: float, window: int, eos: Sequence[int]) -> None:
        self.model, self.temperature, self.window = model, temperature, window
        self.eos = torch.tensor(list(eos))
        self._highest = torch.empty(0)  # (R,) on the CPU
        self._recent: list[Tensor] = []  # (R,) of each of the last steps
        self._thread = threading.get_ident()
        self._last_logits: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        hook = output_module(self.model).register_forward_hook(self._capture)
        try:
            yield
        finally:
            hook.remove()
            self._last_logits = None

    def _capture(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if threading.get_ident() == self._thread:
            self._last_logits = output[:, -1].detach().clone()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last_logits is None or self._last_logits.shape[0] != input_ids.shape[0]:
            raise EUAError(
                "The logits did not come from the model's head one row each, so the probe cannot see them: generate without "
                "compilation, or calibrate without a probe."
            )
        energy = output_head(self.model).energy_of_output(self._last_logits, self.temperature).cpu()
        self._last_logits = None
        if not self._recent:
            self.start = input_ids.shape[1]
            self._highest = torch.full_like(energy, -torch.inf)
        ended = has_ended(input_ids[:, self.start :], self.eos)
        check_finite(energy[~ended], "the energies of generated tokens")
        self._recent = [*self._recent[-self.window + 1 :], energy] if self.window > 1 else [energy]
        if len(self._recent) == self.window:
            mean = torch.stack(self._recent).mean(dim=0)
            self._highest = self._highest.maximum(mean.where(~ended, -torch.inf))
        return scores

    def scores(self) -> Tensor:
        """The highest mean of each row so far, (R,); −∞ if there is none yet."""
        return self._highest


def has_ended(generated: Tensor, eos: Tensor) -> Tensor:
    """Which rows of the generated tokens (R, S) contain an end of sequence: (R,) on the CPU."""
    return torch.isin(generated.cpu(), eos).any(dim=1)
