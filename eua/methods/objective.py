"""The loss of a batch for any method of the table, and the figures of the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eua.methods.answers import Answers, Places
from eua.methods.d2 import above_boundary, mean
from eua.methods.retain import retained, retained_places
from eua.methods.table import AS_RELEASED, METHODS, Method

Figures = dict[str, Tensor]  # by name (2,): a sum, and the number of what was added up


class Loss(NamedTuple):
    """A scalar that carries a gradient, and what the log adds up."""

    loss: Tensor
    figures: Figures


@dataclass(frozen=True)
class Objective:
    """``γ·mean(forget) + α·mean(retain)`` of one method, and for EUA γ times its energy part at retain tokens.

    Args:
        name: of the method, see :data:`eua.methods.table.METHODS`.
        parameters: of its forget part, by name.
        retain_loss: "nll", "kl" or "hidden"; ignored for methods without a retain part.
        as_released: average where the released code does, see :data:`eua.methods.table.AS_RELEASED`.
        prompt_energy: weight, in γ, of EUA's two energy parts at the last token of prompts alone, where a guard reads the
            energy: there they count as much as at all tokens of answers together. 0: no such parts, as in D².
        warmup: how much of EUA's margin and of the weights of its energies to forget and of prompts is in force, up to 1. The
            margin and its excess together, beyond which tokens are pulled back, are what they are from the start.
    """

    name: str
    parameters: Mapping[str, Any]
    retain_loss: str = "nll"
    as_released: bool = False
    prompt_energy: float = 0.0
    warmup: float = 1.0

    @property
    def method(self) -> Method:
        return AS_RELEASED.get(self.name, METHODS[self.name]) if self.as_released else METHODS[self.name]

    @property
    def has_retain(self) -> bool:
        return self.method.retain_loss is not None

    @property
    def _in_force(self) -> dict[str, Any]:
        """The parameters during the warm-up."""
        given = dict(self.parameters)
        if given.get("margin") is not None:
            if given.get("margin_excess") is not None:
                given["margin_excess"] += (1 - self.warmup) * given["margin"]
            given["margin"] *= self.warmup
        if "answer_energy" in given:
            given["answer_energy"] *= self.warmup
        return given

    def counts(self, places: Places) -> Tensor:
        """What the means are divided by for a batch, (4,): the numbers of tokens or rows to forget and to retain, and those of
        answers to forget and to retain, for the energies of their prompts."""
        forget = self.method.counted(places, **self.parameters).sum()
        kept = retained_places(places, self.retain_loss, self.as_released).sum() if self.has_retain else forget.new_zeros(())
        return torch.stack([forget, kept, *(tokens.sum() for tokens in _prompts(places).values())]).float()

    def loss(self, answers: Answers, gamma: float, alpha: float, counts: Tensor | None = None) -> Loss:
        """The loss of a batch and its figures.

        Args:
            answers: of the batch, with what the method needs.
            gamma, alpha: the weights of the two parts.
            counts: (4,), divisors of the means, instead of this batch's :meth:`counts`. With those of a full gradient
                accumulation step, the losses of its batches add up to the loss of one large batch.
        """
        method, places = self.method, answers.places
        forget_count, retain_count, *prompt_counts = (None,) * 4 if counts is None else counts.unbind()
        values, counted = method.forget(answers, **self._in_force), method.counted(places, **self.parameters)
        total = gamma * mean(values, counted, forget_count)
        figures = {"loss_forget": _figure(values, counted)}
        if method.keep is not None:
            kept = method.keep(answers)
            total = total + gamma * mean(kept, places.retain, retain_count)
            figures["loss_retain"] = _figure(kept, places.retain)
            if self.prompt_energy:
                parts = {"forget": above_boundary(answers), "retain": kept}
                for (kind, tokens), count in zip(_prompts(places).items(), prompt_counts, strict=True):
                    total = total + gamma * self.warmup * self.prompt_energy * mean(parts[kind], tokens, count)
                    figures[f"loss_prompt_{kind}"] = _figure(parts[kind], tokens)
                    figures[f"energy_prompt_{kind}"] = _figure(answers.energy, tokens)
        if self.has_retain:
            kept, of_retain = (
                retained(answers, self.retain_loss, self.as_released),
                retained_places(places, self.retain_loss, self.as_released),
            )
            total = total + alpha * mean(kept, of_retain, retain_count)
            if self.retain_loss != "nll":
                figures[f"{self.retain_loss}_retain"] = _figure(kept, of_retain)
        return Loss(total, figures | _token_figures(answers, beyond_boundary=method.reference == "boundary"))


def _prompts(places: Places) -> dict[str, Tensor]:
    """(B, S−1) bool by kind of row, the first tokens of answers, each of which stands for its prompt."""
    first = places.after_prompt
    return {"forget": first & places.of_forget[:, 1:], "retain": first & places.retain}


def _token_figures(answers: Answers, *, beyond_boundary: bool) -> Figures:
    places, energy = answers.places, answers.energy
    figures = {}
    for kind, tokens in (("forget", places.forget), ("retain", places.retain)):
        figures[f"nll_{kind}"] = _figure(answers.nll, tokens)
        figures[f"energy_{kind}"] = _figure(energy, tokens)
        if beyond_boundary:
            is_beyond = energy >= answers.reference if kind == "forget" else energy <= answers.reference
            figures[f"beyond_boundary_{kind}"] = _figure(is_beyond.float(), tokens)
    return figures


def _figure(values: Tensor, mask: Tensor) -> Tensor:
    # A masked sum instead of indexing, which would synchronize a GPU each time.
    return torch.stack([values.detach().where(mask, 0.0).sum().float(), mask.sum().float()])


def added(one: Figures | None, other: Figures) -> Figures:
    """The figures of two batches of one objective together."""
    return other if one is None else {name: value + other[name] for name, value in one.items()}


def figure_means(figures: Figures) -> dict[str, float]:
    """Means from sums: the parts of the loss before their weights, NLLs and energies in nats, and the shares of tokens beyond
    their boundaries. Figures of which nothing was counted are left out."""
    totals = torch.stack(list(figures.values())).tolist() if figures else []
    return {name: total / count for name, (total, count) in zip(figures, totals, strict=True) if count}


def scheduled(peak: float, schedule: str, warmup_ratio: float, step: int, steps: int) -> float:
    """A weight at one step: it rises from 0 during warmup, then stays constant or decays towards 0 until the last step.

    It depends only on the step, so a resumed run continues the schedule.

    Args:
        peak: its largest value.
        schedule: what follows the warmup: ``"constant"``, or ``"linear"`` or ``"cosine"`` decay.
        warmup_ratio: the fraction of the steps over which it rises, in [0, 1).
        step: number of steps before this one.
        steps: number of steps in the full run.
    """
    done = step / steps
    if done < warmup_ratio:
        return peak * done / warmup_ratio
    left = (1 - done) / (1 - warmup_ratio)
    return peak * {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]
