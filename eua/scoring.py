"""Per-token energies of rows, and the per-prompt score that the guard compares with its threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList

from eua.data.batches import flatten_rows, pad_prompts, pad_rows
from eua.data.rows import EncodedRow
from eua.errors import EUAError
from eua.hidden import check_finite, check_head, hidden_states, output_head, vocabulary_and_device
from eua.recording import EnergyProbe, EnergyRecorder, end_ids
from eua.turns import Turns
from fused_energy import EnergyNLL


def token_energies(model: nn.Module, batch: dict[str, Tensor], temperature: float, hidden: Tensor | None = None) -> EnergyNLL:
    """Energy and NLL, each (B, S−1), of the tokens that ``labels[:, 1:]`` marks; 0 elsewhere.

    ``hidden`` are the batch's hidden states (B, S, H), where the caller has them already.
    """
    if hidden is None:
        hidden = hidden_states(model, batch)
    return output_head(model).energy_and_nll(hidden[:, :-1], batch["labels"][:, 1:], temperature)


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
        turns: how prompts are put together. The score is then the highest of those that :meth:`eua.turns.Turns.decisive` names.
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
        parts = [turns.decisive(ids) for ids in prompts]
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


def answer_states(hidden: Tensor, rows: Sequence[EncodedRow]) -> Tensor:
    """The hidden states that predict the answers' tokens, of all rows in turn: (B, S, H) → (Σ answer lengths, H).

    The token at position p is predicted at p − 1, so an answer's states start at the prompt's last token.
    """
    places = [(i, p - 1) for i, row in enumerate(rows) for p in row.answer_positions]
    row, position = torch.tensor(places, device=hidden.device).unbind(dim=1)
    return hidden[row, position]


@torch.no_grad()
def check_padding_free(model: nn.Module) -> None:
    """Raise :class:`EUAError` when the model does not keep rows apart that follow one another in one row."""
    vocabulary, device = vocabulary_and_device(model)
    starts_and_lengths = ((1, 7), (3, 4), (2, 6))
    rows = [EncodedRow([i % vocabulary for i in range(start, start + n)], 1) for start, n in starts_and_lengths]
    padded = {name: tensor.to(device) for name, tensor in pad_rows(rows).items()}
    flat = flatten_rows(padded)
    is_first = torch.arange(flat["input_ids"].shape[1], device=device) < len(rows[0].input_ids)
    other_first = flat | {"input_ids": flat["input_ids"].where(~is_first, 0)}
    training = model.training
    model.eval()
    try:
        alone = hidden_states(model, padded)[padded["attention_mask"].bool()]
        found, after_another = (hidden_states(model, batch)[0] for batch in (flat, other_first))
    except TypeError as error:  # its forward takes no position_ids
        raise EUAError(f"padding_free = True cannot be used with this model ({error}): leave it at False.") from error
    finally:
        model.train(training)
    largest, eps = alone.abs().max(), torch.finfo(alone.dtype).eps
    mixed = (after_another - found)[~is_first].abs().max() / largest
    off = (found - alone).abs().max() / largest  # positions that do not start anew show here, above the dtype's rounding
    if not (mixed <= 8 * eps and off <= max(16 * eps, 1e-4)):
        raise EUAError(
            "padding_free = True, but this model does not keep rows apart that follow one another in one row (its hidden "
            f"states differ by up to {max(mixed, off):.2g} of the largest): leave it at False, or load the model with "
            'another attn_implementation, e.g. "sdpa" or "flash_attention_2".'
        )


def check_token_ids(model: nn.Module, rows: Iterable[Sequence[int]]) -> None:
    """Raise :class:`EUAError` when a token id of ``rows`` is beyond the model's vocabulary."""
    vocabulary, _ = vocabulary_and_device(model)
    largest = max((max(ids) for ids in rows if ids), default=0)
    if largest >= vocabulary:
        raise EUAError(
            f"The rows hold token id {largest}, which is out of range for the model's vocabulary of {vocabulary}: "
            "use the model's own tokenizer, or resize the model's embeddings."
        )


@torch.no_grad()
def eval_hidden_states(
    model: nn.Module, rows: Sequence[EncodedRow], batch_size: int, progress: str | None = None, check: bool = True
) -> Iterator[tuple[list[int], Tensor]]:
    """Hidden states of rows in eval mode, as pairs of row indices and (B, S, H), longest rows first.

    Rows of like length share a batch, so little padding is computed; the longest come first, so memory that does not
    suffice fails at once.
    """
    if check:
        check_head(model)
        check_token_ids(model, (row.input_ids for row in rows))
    _, device = vocabulary_and_device(model)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    batches: Iterable[int] = range(0, len(order), batch_size)
    training = model.training
    model.eval()
    try:
        for start in tqdm(batches, desc=progress, disable=progress is None, leave=False):
            indices = order[start : start + batch_size]
            batch = {name: tensor.to(device) for name, tensor in pad_rows([rows[i] for i in indices]).items()}
            yield indices, hidden_states(model, batch)
    finally:
        model.train(training)
