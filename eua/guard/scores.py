"""The scores of prompts and of answers, which the guard compares with its thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList

from eua.data.batches import pad_prompts
from eua.data.rows import EncodedRow
from eua.errors import EUAError
from eua.guard.questions import Turns
from eua.model.energy_recorder import EnergyProbe, EnergyRecorder, end_ids
from eua.model.forward import check_finite, check_head_once, check_ids, eval_hidden_states
from eua.model.head import output_head, vocabulary_and_device


@torch.no_grad()
def prompt_scores(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    first_tokens: int = 0,
    turns: Turns | None = None,
    batch_size: int = 32,
    progress: str | None = None,
    check: bool = True,
    known: dict[tuple[int, ...], float] | None = None,
) -> Tensor:
    """The energy at the last token of each prompt: (P,) float32 on the CPU, in nats.

    With ``first_tokens`` it is the mean over that token and the first tokens that the model generates greedily, up to that
    number or to the end of the answer.

    Args:
        model: a causal language model, which keeps its mode (train or eval).
        prompts: token ids of formatted prompts, see :func:`eua.data.rows.encode_prompt`.
        temperature: T of the energy.
        first_tokens: number of generated tokens that the score includes.
        turns: how the template writes turns. The score is then the highest one of :meth:`.Turns.scored_prompts`.
        batch_size: prompts per forward pass.
        progress: title of a progress bar, or None for no bar.
        check: first check the head and the token ids; False if the caller has done so.
        known: scores that are known, of prompts as :meth:`.Turns.scored_prompts` returns them. These prompts do not run, and
            those that do are added.

    Raises:
        EUAError: if hidden states or energies are NaN or infinite, if the model has no plain head, or if it cannot read a
            prompt.
    """
    if check:
        check_head_once(model)
        check_ids(model, prompts, "prompts", first_tokens + 1 if first_tokens else 0)
    parts = [[tuple(part) for part in (turns.scored_prompts(ids) if turns else [ids])] for ids in prompts]
    known = {} if known is None else known
    left = [ids for ids in dict.fromkeys(chain.from_iterable(parts)) if ids not in known]
    if first_tokens:
        found = _generated_scores(
            model,
            left,
            lambda eos: EnergyRecorder(cast(Any, model), temperature, first_tokens, eos),
            new_tokens=first_tokens + 1,
            batch_size=batch_size,
            progress=progress,
        )
    else:
        found = _end_scores(model, left, temperature, batch_size, progress)
    known |= zip(left, found.tolist(), strict=True)
    return torch.tensor([float(torch.tensor([known[part] for part in of_one]).amax()) for of_one in parts])


def _end_scores(
    model: nn.Module, prompts: Sequence[Sequence[int]], temperature: float, batch_size: int, progress: str | None
) -> Tensor:
    rows = [EncodedRow(list(ids), len(ids)) for ids in prompts]
    head = output_head(model)
    scores = torch.empty(len(rows))
    for indices, hidden in eval_hidden_states(model, rows, batch_size, progress, check=False):
        last = torch.tensor([len(rows[i].input_ids) - 1 for i in indices], device=hidden.device)
        at_end = hidden[torch.arange(len(indices), device=hidden.device), last]
        check_finite(at_end, "the hidden states at the end of a prompt")
        energy = head.energy(at_end, temperature).float().cpu()
        check_finite(energy, "the energies of the prompts")
        scores[indices] = energy
    return scores


@torch.no_grad()
def answer_scores(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    window: int,
    new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 32,
    progress: str | None = None,
) -> Tensor:
    """The highest mean energy of ``window`` successive tokens of the answer to each prompt: (P,) float32 on the CPU, in nats.

    Answers are generated greedily, up to ``new_tokens`` long. An answer shorter than the window scores −∞.

    Raises:
        EUAError: if energies are NaN or infinite, or if the model has no plain head.
    """
    check_head_once(model)
    check_ids(model, prompts, "prompts", new_tokens)
    return _generated_scores(
        model,
        prompts,
        lambda eos: EnergyProbe(cast(Any, model), temperature, window, eos),
        new_tokens=new_tokens,
        batch_size=batch_size,
        progress=progress,
    )


def check_generated_scores(model: nn.Module) -> None:
    """Raise :class:`EUAError` if the model's own settings of generation are such that scores of tokens do not follow it."""
    config = cast(Any, model).generation_config
    found = ["stop_strings"] if config.stop_strings else []
    found += ["guidance_scale"] if config.guidance_scale not in (None, 1, 1.0) else []
    if found:
        raise EUAError(
            f"The model's generation_config.json sets {' and '.join(found)}, which scores of generated tokens do not follow: "
            "remove it there, or calibrate with first_tokens = 0 and without a probe."
        )


def _generated_scores(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    make_recorder: Callable[[list[int]], EnergyRecorder | EnergyProbe],
    *,
    new_tokens: int,
    batch_size: int,
    progress: str | None,
) -> Tensor:
    """A recorder's scores for greedily generated rows. ``make_recorder`` gets the ids that end a row, once per batch."""
    check_generated_scores(model)
    generator = cast(Any, model)
    eos = end_ids(generator.generation_config.eos_token_id)
    vocabulary, _ = vocabulary_and_device(model)
    pad = next((token for token in eos if token < vocabulary), 0)  # masked, or after the end of an answer
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, num_beams=1, eos_token_id=eos or None, pad_token_id=pad
    )
    scores = torch.empty(len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=progress is None, leave=False):
            indices = order[start : start + batch_size]
            batch = pad_prompts([prompts[i] for i in indices], pad, generator.device)
            recorder = make_recorder(eos)
            with recorder.listening():
                type(generator).generate(  # bypasses an attached guard, which would write refusals
                    generator, **batch, generation_config=settings, logits_processor=LogitsProcessorList([recorder])
                )
            scores[indices] = recorder.scores()
    finally:
        model.train(training)
    return scores
