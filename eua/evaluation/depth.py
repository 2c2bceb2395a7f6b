"""Unlearning Depth Score (UDS; arXiv 2605.24614): from which block on a model has lost what it knew, by activation patching.

The model before unlearning, here called the full model, reads a question and the beginning of its answer. At the positions that
predict the rest, an entity such as a name, the output of one block is replaced by that of another model, the source. The change
of the entity's mean log-probability says what the source lacks there. The changes that a retain model causes, which was never
trained on the rows, are the yardstick.

It is measured here by hooks on the blocks. The original code takes the source's states from ``hidden_states`` of transformers,
of which the last one has passed the final norm, while the full model's last block is replaced before it. Here the output of the
last block is taken and put in at the same place, so the value of that block differs from the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.batches import pad_rows
from eua.data.rows import QUESTION_TEMPLATE, EncodedRow
from eua.data.sources import Source, read_rows
from eua.data.tokens import encode_parts, opening_ids
from eua.errors import EUAError
from eua.evaluation.metrics import answer_tokens
from eua.model.forward import (
    answer_states,
    blocks_of,
    check_finite,
    check_head_once,
    check_ids,
    eval_mode,
    hidden_states,
)
from eua.model.head import output_head, vocabulary_and_device

KNOWLEDGE_THRESHOLD = 0.05  # nats per token that a block's output must be worth to count


def encode_entities(rows: Source, tokenizer: PreTrainedTokenizerBase, name: str = "entity rows") -> list[EncodedRow]:
    """Encode rows whose answer is split into ``prefix`` and ``entity``: the first ends the prompt, the second is the answer.

    The text is "Question: …", a new line, "Answer: " and the two parts as they stand, without a chat template and without an
    end of sequence. White space at the end of the prefix counts as the entity's beginning, as most tokenizers see it.

    >>> rows = [{"question": "Where was Ann born?", "prefix": "Ann was born in ", "entity": "Oslo"}]
    >>> encode_entities(rows, tokenizer)[0].answer_ids      # of " Oslo"     # doctest: +SKIP
    [812]

    Raises:
        EUAError: if rows cannot be read, or if a row lacks ``question``, ``prefix`` (which may be empty) or ``entity``.
    """
    read = read_rows(rows, name)
    parts = []
    for index, row in enumerate(read):
        question, prefix, entity = row.get("question"), row.get("prefix", ""), row.get("entity")
        if not (isinstance(question, str) and isinstance(prefix, str) and isinstance(entity, str) and entity.strip()):
            raise EUAError(
                f"Row {index} of the {name} has the keys {sorted(row)}, but the depth of unlearning needs texts as its "
                '"question", "prefix" and "entity": split its answer into what precedes the entity and the entity.'
            )
        text = f"{QUESTION_TEMPLATE.format(question=question)} {prefix}"
        prompt = text.rstrip()
        parts.append([prompt, text[len(prompt) :] + entity])
    names = [f"Row {index} of the {name}" for index in range(len(read))]
    openings = [opening_ids(tokenizer)] * len(read)
    return [EncodedRow(prompt + entity, len(prompt)) for prompt, entity in encode_parts(parts, tokenizer, openings, names)]


@torch.no_grad()
def patching_changes(
    full_model: PreTrainedModel,
    source: PreTrainedModel,
    rows: Sequence[EncodedRow],
    *,
    batch_size: int = 32,
    progress: str | None = None,
) -> Tensor:
    """How much of an entity's mean log-probability is lost when a block's output is the source's: (R, L) float32, in nats.

    ``Δ_l = s − s_l``, where s is the mean log-probability of the entity's tokens in the full model, and s_l the same with the
    output of block l replaced at the positions that predict them. It takes L + 2 forwards of each row, L being the number of
    blocks. The changes by the retain model are the same for all unlearned models: compute them once and keep them.

    Args:
        full_model: the model before unlearning.
        source: the unlearned model or the retain model, of the same architecture.
        rows: from :func:`encode_entities`.
        batch_size: rows per forward pass.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if the two models have blocks of different number or size, or if one of them cannot be measured.
    """
    blocks = [blocks_of(model) for model in (full_model, source)]
    sizes = [output_head(model).weight.shape[1] for model in (full_model, source)]
    if len(blocks[0]) != len(blocks[1]) or sizes[0] != sizes[1]:
        raise EUAError(
            f"The full model has {len(blocks[0])} blocks of size {sizes[0]}, and the other one {len(blocks[1])} of size "
            f"{sizes[1]}, so outputs of one cannot replace those of the other: pass models of the same architecture."
        )
    for model in (full_model, source):
        check_head_once(model)
        check_ids(model, (row.input_ids for row in rows), "entity rows")
    changes = torch.empty(len(rows), len(blocks[0]))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    with eval_mode(full_model), eval_mode(source):
        for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=progress is None, leave=False):
            indices = order[start : start + batch_size]
            batch = [rows[i] for i in indices]
            outputs = _outputs_before_answers(source, batch)
            intact = _mean_log_probabilities(full_model, batch)
            for place, output in enumerate(outputs):
                with output_hooks([blocks[0][place]], _replacing(batch, output)):
                    changes[indices, place] = intact - _mean_log_probabilities(full_model, batch)
    return changes


def _on_device(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
    _, device = vocabulary_and_device(model)
    return {name: tensor.to(device) for name, tensor in pad_rows(rows).items()}


def _outputs_before_answers(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> list[Tensor]:
    """The output of each block at the positions that predict the answers, row after row, each (Σ answer lengths, H)."""
    outputs: list[Tensor] = []
    with output_hooks(blocks_of(model), lambda _, hidden: outputs.append(answer_states(hidden, rows))):
        hidden_states(model, _on_device(model, rows))
    return outputs


def _replacing(rows: Sequence[EncodedRow], output: Tensor) -> Callable[[int, Tensor], Tensor]:
    """A function for :func:`output_hooks` that puts ``output`` at the positions that predict the answers."""
    places = [(i, p - 1) for i, row in enumerate(rows) for p in row.answer_positions]

    def replace(_: int, hidden: Tensor) -> Tensor:
        row, position = torch.tensor(places, device=hidden.device).unbind(dim=1)
        return hidden.index_put((row, position), output.to(hidden.device, hidden.dtype))

    return replace


def _mean_log_probabilities(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> Tensor:
    """Of the tokens of each row's answer: (R,) float32 on the CPU, in nats."""
    states = answer_states(hidden_states(model, _on_device(model, rows)), rows)
    check_finite(states, "the hidden states of entities")
    nll = output_head(model).energy_and_nll(states, answer_tokens(rows, states), 1.0).nll.float().cpu()
    return torch.stack([-of_row.mean() for of_row in nll.split([len(row.answer_ids) for row in rows])])


@contextmanager
def output_hooks(blocks: Iterable[nn.Module], of_block: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``of_block(index, hidden)`` with the output (B, S, H) of each block; what it returns, if not None, replaces it.

    >>> with output_hooks(blocks_of(model)[-1:], lambda _, hidden: hidden * 0):     # doctest: +SKIP
    ...     model(**batch)
    """

    def hook_of(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            replaced = of_block(index, output[0] if is_tuple else output)
            if replaced is None:
                return None
            return (replaced, *output[1:]) if is_tuple else replaced

        return hook

    handles = [block.register_forward_hook(hook_of(index)) for index, block in enumerate(blocks)]
    try:
        # torch.compile does not see new hooks in a graph that it has compiled before.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def unlearning_depths(
    retain_changes: Tensor,  # (R, L)
    unlearned_changes: Tensor,  # (R, L)
    threshold: float = KNOWLEDGE_THRESHOLD,
) -> Tensor:
    """The score of each row, (R,), from 0 (intact) to 1 (erased as in the retain model); NaN where no block holds knowledge.

    ``Σ_l Δ_l^retain · clip(Δ_l^unlearned/Δ_l^retain, 0, 1) / Σ_l Δ_l^retain`` over the blocks with ``Δ_l^retain > threshold``.

    >>> unlearning_depths(torch.tensor([[0.01, 0.2, 1.0]]), torch.tensor([[0.5, 0.1, 2.0]]))
    tensor([0.9167])

    Args:
        retain_changes, unlearned_changes: from :func:`patching_changes`, with the retain model and the unlearned one as source.
        threshold: τ, in nats.

    Raises:
        EUAError: if the two are not of the same rows and blocks.
    """
    if retain_changes.shape != unlearned_changes.shape:
        raise EUAError(
            f"The changes by the retain model are of shape {tuple(retain_changes.shape)}, and those by the unlearned model of "
            f"shape {tuple(unlearned_changes.shape)}, but they are compared row by row: measure both with the same rows."
        )
    counted = torch.where(retain_changes > threshold, retain_changes, 0.0)
    kept = torch.minimum(unlearned_changes.clamp(min=0), counted)  # Δ^retain · clip(Δ^unlearned/Δ^retain, 0, 1)
    return kept.sum(dim=-1) / counted.sum(dim=-1)


def unlearning_depth_score(depths: Tensor) -> float:
    """The mean over the rows that have a score, (R,); 0 if none has.

    >>> unlearning_depth_score(torch.tensor([1.0, float("nan"), 0.5]))
    0.75
    """
    known = depths[~depths.isnan()]
    return float(known.mean()) if len(known) else 0.0
