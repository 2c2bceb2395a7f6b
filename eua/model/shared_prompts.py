"""Runs a model on rows of which several have the same prompt, and runs that prompt only once.

The keys and values of the prompt are kept, as in generation, and each of its answers continues from them. Prompts of one length
share a batch, so there is no padding between a prompt and its answers. Whether a model can do that is found out on its first
batch: the longest text in it runs in the ordinary way, too, and if the hidden states differ, all rows do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from eua.data.batches import pad_rows
from eua.data.rows import EncodedRow
from eua.model.forward import (
    answer_states,
    check_head_once,
    check_ids,
    difference,
    difference_of_rounding,
    eval_hidden_states,
    eval_mode,
    hidden_states_and_output,
)
from eua.model.head import vocabulary_and_device


@torch.no_grad()
def eval_answer_states(
    model: nn.Module, rows: Sequence[EncodedRow], batch_size: int, progress: str | None = None, check: bool = True
) -> Iterator[tuple[list[int], Tensor]]:
    """The hidden states that predict the answers of rows, in eval mode: pairs of row indices and (Σ answer lengths, H).

    The states are those of :func:`eua.model.forward.answer_states`, in the order of the indices. The first one of a row is that
    of the last token of its prompt.

    Args:
        model: a causal language model.
        rows: encoded rows. Those with the same prompt share its forward, if the model keeps keys and values in transformers'
            ``DynamicCache``.
        batch_size: rows per forward pass.
        progress: title of a progress bar, or None for no bar.
        check: first check the head and the token ids; False if the caller has done so.

    Raises:
        EUAError: if the model has no plain head, or if it cannot read a row.
    """
    if check:
        check_head_once(model)
        check_ids(model, (row.input_ids for row in rows))
    batches = _batches(rows, batch_size)
    alone = set(range(len(rows))).difference(*batches)
    with eval_mode(model):
        for number, indices in enumerate(tqdm(batches, desc=progress, disable=progress is None, leave=False)):
            states = _states_with_shared_prompts(model, [rows[i] for i in indices])
            if states is None or (number == 0 and not _are_ordinary(model, [rows[i] for i in indices], states)):
                alone = set(range(len(rows)))
                break
            yield indices, states
    left = sorted(alone)
    for places, hidden in eval_hidden_states(model, [rows[i] for i in left], batch_size, progress, check=False):
        indices = [left[place] for place in places]
        yield indices, answer_states(hidden, [rows[i] for i in indices])


def _batches(rows: Sequence[EncodedRow], batch_size: int) -> list[list[int]]:
    """The indices of rows that share a prompt, in batches whose prompts have one length, longest prompts first."""
    by_prompt = defaultdict(list)
    for index, row in enumerate(rows):
        by_prompt[tuple(row.prompt_ids)].append(index)
    parts = [
        (len(prompt), indices[start : start + batch_size])
        for prompt, indices in by_prompt.items()
        for start in range(0, len(indices), batch_size)
        if len(prompt) > 1
    ]
    batches: list[list[int]] = []
    previous = 0
    for length, indices in sorted(parts, key=lambda part: (-part[0], -max(len(rows[i].input_ids) for i in part[1]))):
        if len(indices) > 1:
            if length != previous or len(batches[-1]) + len(indices) > batch_size:
                batches.append([])
            batches[-1] += indices
            previous = length
    return batches


def _states_with_shared_prompts(model: nn.Module, rows: Sequence[EncodedRow]) -> Tensor | None:
    """The states of :func:`answer_states` for rows whose prompts have one length; None if the model keeps no keys and values.

    The last token of a prompt runs with the answers, so that the hidden states of the answers are those of one call; the last
    token of an answer, which predicts none, does not run.
    """
    _, device = vocabulary_and_device(model)
    prompts = list(dict.fromkeys(tuple(row.prompt_ids) for row in rows))
    shared = len(prompts[0]) - 1
    prompt_batch = {"input_ids": torch.tensor([prompt[:shared] for prompt in prompts], device=device)}
    prompt_batch["attention_mask"] = torch.ones_like(prompt_batch["input_ids"])
    ends = [EncodedRow(row.input_ids[shared:], 1, frozenset(p - shared for p in row.later_prompts)) for row in rows]
    but_last = [EncodedRow(end.input_ids[:-1], 1) for end in ends]
    batch = {name: tensor.to(device) for name, tensor in pad_rows(but_last).items()}
    batch["attention_mask"] = torch.cat([batch["attention_mask"].new_ones(len(rows), shared), batch["attention_mask"]], dim=1)
    with torch.compiler.set_stance("force_eager"):  # a compiled graph without hooks would run twice, and lengthen the cache
        _, output = hidden_states_and_output(model, prompt_batch, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if not isinstance(cache, DynamicCache):
            return None
        places = {prompt: place for place, prompt in enumerate(prompts)}
        cache.reorder_cache(torch.tensor([places[tuple(row.prompt_ids)] for row in rows], device=device))
        hidden, _ = hidden_states_and_output(model, batch, past_key_values=cache, use_cache=True)
    return answer_states(hidden, ends)


def _are_ordinary(model: nn.Module, rows: Sequence[EncodedRow], states: Tensor) -> bool:
    """Whether ``states`` of the longest row equal those without a shared prompt up to rounding."""
    lengths = [len(row.answer_positions) for row in rows]
    longest = max(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    found = states.split(lengths)[longest]
    ((_, hidden),) = eval_hidden_states(model, [rows[longest]], 1, check=False)
    return difference(answer_states(hidden, [rows[longest]]), found) <= difference_of_rounding(model, found.dtype)
