"""The score of a prompt, which the guard compares with its threshold, and that of an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList

from eua.data.batches import pad_prompts
from eua.data.rows import EncodedRow
from eua.guard.questions import Turns
from eua.model.energy_recorder import EnergyProbe, EnergyRecorder, end_ids
from eua.model.forward import check_finite, check_head, check_token_ids, eval_hidden_states
from eua.model.head import output_head


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
) -> Tensor:
    """The energy at the last token of each prompt: (P,) float32 on the CPU, in nats.

    With ``first_tokens`` it is the mean over that token and so many tokens that the model goes on with greedily, or up to the
    answer's end where it comes before.

    Args:
        model: a causal language model; left in the mode (train or eval) it was in.
        prompts: token ids of formatted prompts, see :func:`eua.data.rows.encode_prompt`.
        temperature: T of the energy.
        first_tokens: how many generated tokens are taken in.
        turns: how prompts are put together. The score is then the highest of those of :meth:`.Turns.scored_prompts`.
        batch_size: prompts per forward.
        progress: title of a progress bar, or None for no bar.
        check: compare head and vocabulary with the model's own first; False where that was done before.

    Raises:
        EUAError: on NaN or infinite hidden states, or a model without a plain head.
    """
    if check:
        check_head(model)
        check_token_ids(model, prompts)
    if turns is not None:
        parts = [turns.scored_prompts(ids) for ids in prompts]
        flat = [ids for of_one in parts for ids in of_one]
        scores = prompt_scores(
            model,
            flat,
            temperature=temperature,
            first_tokens=first_tokens,
            batch_size=batch_size,
            progress=progress,
            check=False,
        )
        return torch.stack([of_one.amax() for of_one in scores.split([len(of_one) for of_one in parts])])
    if first_tokens:
        return _generated_scores(
            model,
            prompts,
            lambda eos: EnergyRecorder(cast(Any, model), temperature, first_tokens, eos),
            new_tokens=first_tokens + 1,
            batch_size=batch_size,
            progress=progress,
        )
    rows = [EncodedRow(list(ids), len(ids)) for ids in prompts]
    head = output_head(model)
    scores = torch.empty(len(rows))
    for indices, hidden in eval_hidden_states(model, rows, batch_size, progress, check=False):
        last = torch.tensor([len(rows[i].input_ids) - 1 for i in indices], device=hidden.device)
        at_end = hidden[torch.arange(len(indices), device=hidden.device), last]
        check_finite(at_end, "the hidden states at the end of a prompt")
        scores[indices] = head.energy(at_end, temperature).float().cpu()
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

    Answers are generated greedily, up to ``new_tokens`` long; one that is shorter than the window scores −∞.

    Raises:
        EUAError: on NaN or infinite energies, or a model without a plain head.
    """
    check_head(model)
    check_token_ids(model, prompts)
    return _generated_scores(
        model,
        prompts,
        lambda eos: EnergyProbe(cast(Any, model), temperature, window, eos),
        new_tokens=new_tokens,
        batch_size=batch_size,
        progress=progress,
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
    """What a recorder says of each row of a greedy generation; it is made anew for every batch, from the ids that end a row."""
    generator = cast(Any, model)
    eos = end_ids(generator.generation_config.eos_token_id)
    pad = eos[0] if eos else 0  # masked, or behind an answer's end
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
                type(generator).generate(  # a guard that is attached to this model would write refusals into it
                    generator, **batch, generation_config=settings, logits_processor=LogitsProcessorList([recorder])
                )
            scores[indices] = recorder.scores()
    finally:
        model.train(training)
    return scores
