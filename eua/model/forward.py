"""Runs a model and returns the hidden states that its head reads, and the energies of rows' tokens.

Hidden states are taken where the head takes them: a hook on the output embedding captures its input and lets only one
position of one row through, so no logits of a whole batch exist. That works for any architecture and through wrappers
(PEFT, DDP), since the model is called the way everyone calls it. :func:`check_head` compares the head as it is understood here
with the model's own logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from eua.data.batches import pad_rows
from eua.data.rows import EncodedRow
from eua.distributed import attached_to_output, has_other_processes
from eua.errors import EUAError
from eua.model.head import check_present, output_head, output_module, unwrap, vocabulary_and_device
from fused_energy import EnergyNLL

logger = logging.get_logger(__name__)

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def hidden_states(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The hidden states that the head reads at every position: ``input_ids`` (B, S) → (B, S, H).

    ``batch`` holds ``attention_mask`` (B, S) where rows are padded, or ``position_ids`` where they follow one another in one
    row, see :mod:`eua.data.batches`; other entries are ignored.

    Raises:
        EUAError: when the head was not called with one hidden state per token.
    """
    return hidden_states_and_output(model, batch, use_cache=False)[0]


def hidden_and_inner_states(model: nn.Module, batch: Mapping[str, Tensor], layer: int | None) -> tuple[Tensor, Tensor | None]:
    """:func:`hidden_states`, and the output of block ``layer``, (B, S, H), or None if no block is named."""
    if layer is None:
        return hidden_states(model, batch), None
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hook = block_of(model, layer).register_forward_hook(keep)
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled graph has no hook
            hidden, output = hidden_states_and_output(model, batch, use_cache=False)
    finally:
        hook.remove()
    return hidden, attached_to_output(model, outputs[0], output.logits)


def freeze_above(model: nn.Module, layer: int) -> None:
    """Freeze the parameters on which the output of block ``layer`` does not depend: blocks above it, the last norm, the head.

    A loss on that output gives them no gradient, for which DDP would wait, and the optimizer would keep a state for them.

    Raises:
        EUAError: if the model has no such block, or if no trainable parameter is left.
    """
    block_of(model, layer)
    _, device = vocabulary_and_device(model)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with eval_mode(model), torch.enable_grad():
        _, inner = hidden_and_inner_states(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, layer)
    depends = inner is not None and inner.requires_grad
    gradients = torch.autograd.grad(inner.float().sum(), trainable, allow_unused=True) if inner is not None and depends else ()
    below = {id(parameter) for parameter, gradient in zip(trainable, gradients, strict=False) if gradient is not None}
    if not below:
        raise EUAError(
            f"layer = {layer}, but every trainable weight of {type(unwrap(model)).__name__} lies above that block, whose "
            "output is all that the loss depends on: name a higher block, or train weights below it."
        )
    for parameter in trainable:
        parameter.requires_grad_(id(parameter) in below)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The transformer's blocks in order.

    Raises:
        EUAError: if there is no list of as many modules as the model's config states layers.
    """
    inner = unwrap(model)
    config: Any = getattr(inner, "config", None)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    decoder = inner.get_decoder() if isinstance(inner, PreTrainedModel) else inner  # not a part that reads pictures
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    if not lists:
        raise EUAError(
            f"{type(inner).__name__} has no list of {layers} blocks, so the output of one block cannot be read: choose a "
            "method or measure that reads no inner states."
        )
    return lists[0]


def block_of(model: nn.Module, layer: int) -> nn.Module:
    """One of :func:`blocks_of`.

    Raises:
        EUAError: if the model has fewer blocks.
    """
    blocks = blocks_of(model)
    if layer >= len(blocks):
        raise EUAError(
            f"layer = {layer}, but {type(unwrap(model)).__name__} has {len(blocks)} blocks, numbered from 0: choose one of "
            "these."
        )
    return blocks[layer]


def hidden_states_and_output(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> tuple[Tensor, Any]:
    """:func:`hidden_states`, and what the model returns, called with further ``options``. The logits in it are cut."""
    input_ids = batch["input_ids"]
    inputs = {name: batch[name] for name in _MODEL_INPUTS if name in batch}
    captured: list[Tensor] = []

    def capture(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(arguments[0])
        return (arguments[0][:1, :1], *arguments[1:])

    def run() -> Any:
        return model(**inputs, **options)

    hook = output_module(model).register_forward_pre_hook(capture)
    try:
        output = run()
        if not captured:
            # torch.compile does not see new hooks in a graph that it has compiled before.
            with torch.compiler.set_stance("force_eager"):
                output = run()
    finally:
        hook.remove()
    if len(captured) != 1 or captured[0].shape[:2] != input_ids.shape:
        raise EUAError(
            f"{type(model).__name__} called its head {len(captured)} times, on {[tuple(h.shape) for h in captured]}, for "
            f"tokens of shape {tuple(input_ids.shape)}: energies need one call on (B, S, H), so this model is not supported."
        )
    return attached_to_output(model, captured[0], output.logits), output


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare the head, as this library computes it, with the model's own logits on a few tokens.

    The model must also be causal: no token may change the hidden states before it.

    The hidden states are scaled up until the logits are as large as those of a trained model and larger. A softcap or a scale
    that is not in the config then shows, even if the logits of an untrained model are flat.

    Raises:
        EUAError: when they differ by more than the dtype explains, when a hidden state is NaN or infinite, or when the model is
            not causal.
    """
    check_present(model)
    head, module = output_head(model), output_module(model)
    name = type(unwrap(model)).__name__
    ids = torch.arange(8, device=head.weight.device)[None] % head.vocabulary
    other_end = ids.where(ids < 4, ids.roll(1) if head.vocabulary < 12 else ids + 4)
    both = torch.cat([ids, other_end])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # No compiled graph without the hook may be left behind.
    with eval_mode(model), torch.compiler.set_stance("force_eager"):
        hidden, of_other_end = hidden_states(model, {"input_ids": both, "attention_mask": torch.ones_like(both)}).split(1)
        check_finite(hidden, "the model's hidden states on a probe of 8 tokens")
        _check_causal(model, hidden[:, :4], of_other_end[:, :4])
        unscaled = replace(head, bias=None, logit_scale=1.0, softcap=None)
        largest = unscaled.logits(hidden).abs().amax(dim=-1, keepdim=True)
        wanted = 2.0 ** torch.arange(1, 9, device=hidden.device)[:, None]
        hidden = (hidden * wanted / largest.clamp(min=1e-6)).to(hidden.dtype)
        hook = module.register_forward_pre_hook(lambda module, arguments: (hidden, *arguments[1:]))
        try:
            theirs = model(**batch, use_cache=False).logits.float()
        finally:
            hook.remove()
    ours = head.logits(hidden)
    if ours.shape != theirs.shape:
        raise EUAError(
            f"{name} has a head of {head.vocabulary} rows and returns logits of shape {tuple(theirs.shape)} for a row of "
            f"{ids.shape[1]} tokens, so its energies would be over another vocabulary: this architecture is not supported."
        )
    tolerance = max(2 * torch.finfo(hidden.dtype).eps, 1e-4)
    off = ((ours - theirs).abs().amax(dim=-1) / ours.abs().amax(dim=-1).clamp(min=1e-6)).amax().item()
    if not off <= tolerance:
        raise EUAError(
            f"{name} does more between hidden states and logits than a matrix, a bias, and the scale ({head.logit_scale:g}) "
            f"and softcap ({head.softcap}) that its config states (logits differ by up to {off:.2g} of the largest), so its "
            "energies would be wrong: this architecture is not supported."
        )


def _check_causal(model: nn.Module, hidden: Tensor, with_other_end: Tensor) -> None:
    """Raise if the hidden states of a beginning depend on the tokens behind it by more than rounding or quantization does."""
    off, bound = difference(hidden, with_other_end), difference_of_rounding(model, hidden.dtype)
    if off > bound:
        raise EUAError(
            f"{type(unwrap(model)).__name__} reads what follows a token, too (hidden states change by {off:.2g} of the largest "
            "when later tokens do), so it would see answers before it gives them: load a causal language model, or set "
            "is_decoder=True in its config."
        )


def difference(hidden: Tensor, other: Tensor) -> float:
    """The largest difference between hidden states of the same tokens, as a share of the largest hidden state."""
    return ((hidden - other).abs().amax() / hidden.abs().amax().clamp(min=1e-6)).item()


def difference_of_rounding(model: nn.Module, dtype: torch.dtype) -> float:
    """The largest :func:`difference` that rounding or quantization causes if the same tokens run in another batch."""
    # 8-bit layers choose the columns that they do not quantize by all tokens of a batch.
    is_quantized = getattr(getattr(unwrap(model), "config", None), "quantization_config", None) is not None
    return 0.1 if is_quantized else max(8 * torch.finfo(dtype).eps, 1e-4)


def check_head_once(model: nn.Module) -> None:
    """:func:`check_head`, which takes two forwards, unless it has found this head with this scale and softcap sound before."""
    if has_other_processes():
        check_head(model)  # a process that remembers another head than the others would not take part in their forwards
        return
    head, module = output_head(model), output_module(model)
    tensors = [t for t in (module.weight, getattr(module, "bias", None)) if isinstance(t, Tensor)]
    memory = [(t.data_ptr(), t.dtype, t.device, 0 if t.is_inference() else t._version) for t in tensors]
    found = (id(module), memory, head.logit_scale, head.softcap)
    if _sound_heads.get(model) != found:
        check_head(model)
        _sound_heads[model] = found


_sound_heads: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()


def check_finite(values: Tensor, what: str) -> None:
    """Raise :class:`EUAError` if ``values`` contain NaN or infinity."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise EUAError(
            f"NaN or infinity in {what} ({bad} of {values.numel()} values), so no energy can be trusted: "
            "check the weights, or use bfloat16 or float32 where float16 overflows."
        )


def token_energies(model: nn.Module, batch: dict[str, Tensor], temperature: float, hidden: Tensor | None = None) -> EnergyNLL:
    """Energy and NLL, each (B, S−1), of the tokens that ``labels[:, 1:]`` marks; 0 elsewhere.

    ``hidden`` are the batch's hidden states (B, S, H), where the caller has them already.
    """
    if hidden is None:
        hidden = hidden_states(model, batch)
    return output_head(model).energy_and_nll(hidden[:, :-1], batch["labels"][:, 1:], temperature)


def answer_states(hidden: Tensor, rows: Sequence[EncodedRow]) -> Tensor:
    """The hidden states that predict the tokens of the answers, row after row: (B, S, H) → (Σ answer lengths, H).

    The token at position p is predicted at p − 1, so an answer's states start at the prompt's last token.
    """
    places = [(i, p - 1) for i, row in enumerate(rows) for p in row.answer_positions]
    row, position = torch.tensor(places, device=hidden.device).unbind(dim=1)
    return hidden[row, position]


@torch.no_grad()
def eval_hidden_states(
    model: nn.Module, rows: Sequence[EncodedRow], batch_size: int, progress: str | None = None, check: bool = True
) -> Iterator[tuple[list[int], Tensor]]:
    """Hidden states of rows in eval mode, as pairs of row indices and (B, S, H), longest rows first.

    Rows of similar length share a batch, so that little padding is computed; the longest rows come first, so that a lack of
    memory shows at once.
    """
    if check:
        check_head_once(model)
        check_ids(model, (row.input_ids for row in rows))
    _, device = vocabulary_and_device(model)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    batches: Iterable[int] = range(0, len(order), batch_size)
    with eval_mode(model):
        for start in tqdm(batches, desc=progress, disable=progress is None, leave=False):
            indices = order[start : start + batch_size]
            batch = {name: tensor.to(device) for name, tensor in pad_rows([rows[i] for i in indices]).items()}
            yield indices, hidden_states(model, batch)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and then back into the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_ids(model: nn.Module, rows: Iterable[Sequence[int]], name: str = "", new_tokens: int = 0) -> None:
    """Check that a model can read rows: that it has their tokens, and a position for each.

    Rows that are longer than what the model was made for cause a warning, if it computes its positions rather than having
    learned them.

    Args:
        model: a causal language model.
        rows: token ids.
        name: what messages call the rows.
        new_tokens: number of tokens that are generated behind each row. The model reads all of them but the last.

    Raises:
        EUAError: if a row holds a token id outside the model's vocabulary, or needs more positions than the model has learned.
    """
    vocabulary, _ = vocabulary_and_device(model)
    positions, are_learned = _positions(model)
    where = f"of the {name} " if name else ""
    total, longer = 0, 0
    for index, ids in enumerate(rows):
        largest = max(ids, default=0)
        if largest >= vocabulary:
            raise EUAError(
                f"Row {index} {where}holds token id {largest}, which is out of range for the model's vocabulary of "
                f"{vocabulary}: use the model's own tokenizer, or resize the model's embeddings."
            )
        is_longer = positions is not None and len(ids) + max(new_tokens - 1, 0) > positions
        if is_longer and are_learned:
            generated = f" and {new_tokens} generated ones" if new_tokens else ""
            raise EUAError(
                f"Row {index} {where}has {len(ids)} tokens{generated}, but the model has learned {positions} positions: "
                "shorten it, leave it out, or cut long answers in training (max_length)."
            )
        total, longer = total + 1, longer + is_longer
    if longer:
        logger.warning(
            f"{longer} of {total} rows {where}are longer than the {positions} positions for which the model was made, and "
            "energies and answers beyond those mean little: shorten them, or leave them out."
        )


# The names of tables of positions. A model without one computes its positions, however many there are.
_TABLES = ("wpe.weight", "positions_embed.weight", "position_embeddings.weight", "embed_positions.weight", "embed_positions")


def _positions(model: nn.Module) -> tuple[int | None, bool]:
    """The number of positions that a model's config states, and whether the model has a table of them."""
    model = unwrap(model)
    config: Any = getattr(model, "config", None)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    tensors = (name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named)
    return positions, any(name.endswith(_TABLES) for name in tensors)
