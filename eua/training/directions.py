"""Adapters that read only what sets the rows to forget apart.

A LoRA adapter adds ``B A x`` to what a layer makes of its input ``x``. Here the rows of ``A`` are not trained: they are the
directions in which inputs on rows to forget are largest in proportion to those on rows to retain. Whatever ``B`` learns then
hardly changes what the layer makes of inputs that look like the retained ones, whether training has seen these or not.
Model editing keeps other knowledge in this way (AlphaEdit, Fang et al. 2025, arXiv 2410.02355), and unlearning, too (CIR,
Sondej and Yang 2025, arXiv 2509.11816).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from eua.data.rows import EncodedRow
from eua.errors import EUAError, in_one_line
from eua.files import replacing
from eua.model.forward import blocks_of, eval_hidden_states

FORGET_TOKENS, RETAIN_TOKENS = 2048, 8192  # whole rows are taken until these numbers are reached
RIDGE = 0.01
ADAPTER = "default"  # PEFT's name of the first one

Layers = dict[str, tuple[nn.Module, Tensor]]
_GROUP_BYTES = 2 * 2**30  # of inputs in memory at once


class DistinctDirections:
    """The ``A`` of a model's LoRA layers, which stay as they are found. They are kept in a file, so that a resumed run has
    the same ones whatever its hardware rounds to.

    Args:
        model: carries the adapter of :func:`adapter_on_mlps`, which has not been trained.
        path: of the safetensors file.
    """

    def __init__(self, model: nn.Module, path: Path) -> None:
        self.model, self.path, self.are_set = model, path, False
        self.weights = {name: weight.requires_grad_(False) for name, (_, weight) in _adapted(model).items()}

    def set(self, rows: Mapping[str, Sequence[EncodedRow]], *, resuming: bool, save: bool, batch_size: int) -> None:
        """Read them from the file of the run to resume, or find them by :func:`set_distinct_directions`; once.

        Raises:
            EUAError: as that function, or if the file cannot be read.
        """
        if self.are_set:
            return
        if resuming and self.path.is_file():
            self._read()
        else:
            set_distinct_directions(self.model, rows["forget"], rows["retain"], batch_size=batch_size)
            if save:
                with replacing(self.path) as temporary:
                    save_file({name: weight.contiguous() for name, weight in self.weights.items()}, temporary)
        self.are_set = True

    @torch.no_grad()
    def _read(self) -> None:
        try:
            found = load_file(self.path)
            for name, weight in self.weights.items():
                weight.copy_(found[name])
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise EUAError(
                f"{self.path}, which holds the input directions of the run to resume, cannot be used ({in_one_line(error)}): "
                "put it back as it was, or train anew into another folder."
            ) from error


@torch.no_grad()
def set_distinct_directions(
    model: nn.Module, forget: Sequence[EncodedRow], retain: Sequence[EncodedRow], *, batch_size: int = 16, seed: int = 0
) -> None:
    """Set ``A`` of every layer with an adapter to the :func:`distinct_directions` of its inputs.

    Args:
        model: carries the adapter of :func:`adapter_on_mlps`, which has not been trained, so it computes what its base does.
        forget, retain: rows whose tokens are read, at most about 2,048 and 8,192 tokens of rows drawn at random.
        batch_size: rows per forward.
        seed: of that draw.

    Raises:
        EUAError: if a layer reads anything but one input per token, or if its inputs on rows to forget stand out in fewer
            directions than the adapter's rank.
    """
    layers = _adapted(model)
    rng = random.Random(seed)
    drawn = {"forget": _drawn(forget, FORGET_TOKENS, rng), "retain": _drawn(retain, RETAIN_TOKENS, rng)}
    tokens = sum(len(row.input_ids) for rows in drawn.values() for row in rows)
    for group in _groups(layers, tokens):
        of_forget, of_retain = (_inputs(model, group, rows, batch_size) for rows in drawn.values())
        for name, (_, weight) in group.items():
            weight.copy_(_of_layer(name, of_forget[name], of_retain[name], len(weight)))


def adapter_on_mlps(model: PreTrainedModel, rank: int) -> LoraConfig:
    """A LoRA adapter for the last matrix of the MLP of every block.

    Its inputs are an MLP's neurons, many of which answer to few words (Geva et al. 2021, arXiv 2012.14913). So inputs on rows
    to forget stand out here more than anywhere else.

    Raises:
        EUAError: if the blocks of the model have no such matrices.
    """
    size, names = model.config.get_text_config().hidden_size, dict[str, None]()
    for block in blocks_of(model):
        outputs = {name: getattr(module, "out_features", getattr(module, "nf", None)) for name, module in block.named_modules()}
        writing = [name for name, width in outputs.items() if width == size and "att" not in name]  # no part of attention
        writing = [name for name in writing if "mlp" in name or "ffn" in name] or writing
        if not writing:
            raise EUAError(
                f"distinct_directions = {rank} was set, but the blocks of {type(model).__name__} have no linear layer outside "
                "of attention that an adapter could be put on, for example because experts share one tensor: leave it out."
            )
        names |= dict.fromkeys(writing[-1:])
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names), task_type="CAUSAL_LM")


def _adapted(model: nn.Module) -> Layers:
    """The layers that carry the adapter, and its ``A`` (r, d), by name."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {name: (layer, layer.lora_A[ADAPTER].weight) for name, layer in layers}


def distinct_directions(forget: Tensor, retain: Tensor, count: int, ridge: float = RIDGE) -> Tensor:
    """Directions in which some inputs are largest in proportion to others, (c, d) float64, the most distinct one first.

    They maximize ``uᵀ F u / uᵀ (R + λI) u``, where ``F`` and ``R`` are the mean outer products of the inputs to forget and to
    retain, and are orthogonal in ``F``. Each has a mean square of 1 over the inputs to forget.

    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])
    >>> distinct_directions(x, y, 1).abs().round(decimals=2).tolist()      # the second coordinate, in which y has nothing
    [[0.0, 0.5]]

    Args:
        forget: (n, d) inputs.
        retain: (m, d) inputs.
        count: the greatest c; there are no more than distinct inputs to forget, and than coordinates.
        ridge: λ as a share of the mean square of a coordinate of the inputs to retain. The smaller, the more a direction is
            avoided in which retained inputs have little.
    """
    forget, retain = forget.double(), retain.double()
    strength = ridge * retain.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    solved = _solved(retain, strength, forget.T)  # (d, n)
    values, vectors = torch.linalg.eigh(forget @ solved / len(forget))
    values, vectors = values[-count:].flip(0), vectors[:, -count:].flip(1)
    # The other eigenvalues of tokens that are alike are 0, up to rounding.
    distinct = int((values > values[0] * len(values) * torch.finfo(values.dtype).eps).sum())
    return (solved @ vectors[:, :distinct] / (values[:distinct] * len(forget) ** 0.5)).T


def _solved(retain: Tensor, strength: Tensor, right: Tensor) -> Tensor:
    """``(RᵀR/m + λI)⁻¹ right``, by the smaller of the two matrices that lead there."""
    rows, width = retain.shape
    if rows >= width:
        matrix = retain.T @ retain / rows
        matrix.diagonal().add_(strength)
        return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
    gram = retain @ retain.T
    gram.diagonal().add_(rows * strength)
    return (right - retain.T @ torch.cholesky_solve(retain @ right, torch.linalg.cholesky(gram))) / strength


def _of_layer(name: str, forget: Tensor, retain: Tensor, rank: int) -> Tensor:
    device = "cpu" if forget.device.type == "mps" else forget.device  # it has no float64
    found = distinct_directions(forget.to(device), retain.to(device), rank)
    read = (found @ retain.to(device).double().T).square().mean(dim=1)
    count = int((read < 1).sum())  # the rows to forget have a mean square of 1 in each
    if count < rank:
        raise EUAError(
            f"distinct_directions = {rank} was set, but there are only {count} directions in which the inputs of {name} are "
            "larger on rows to forget than on rows to retain: lower it, or give more rows to forget."
        )
    return found


def _drawn(rows: Sequence[EncodedRow], tokens: int, rng: random.Random) -> list[EncodedRow]:
    """Rows in random order until they have at least ``tokens`` tokens together; all rows if they have fewer."""
    drawn: list[EncodedRow] = []
    for row in rng.sample(rows, len(rows)):
        if tokens <= 0:
            break
        drawn.append(row)
        tokens -= len(row.input_ids)
    return drawn


def _groups(layers: Layers, tokens: int) -> Iterator[Layers]:
    """The layers in order, in groups whose inputs fit into memory together."""
    left = iter(layers.items())
    widest = max(weight.shape[1] for _, weight in layers.values())
    while group := dict(islice(left, max(1, _GROUP_BYTES // (4 * widest * tokens)))):
        yield group


def _inputs(model: nn.Module, layers: Layers, rows: Sequence[EncodedRow], batch_size: int) -> dict[str, Tensor]:
    """What layers read at the tokens of rows, by name of the layer: (tokens, d)."""
    read: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, states: Tensor) -> None:
        read[name].append(states)

    hooks = [
        layer.register_forward_pre_hook(lambda module, arguments, name=name: keep(name, arguments[0]))
        for name, (layer, _) in layers.items()
    ]
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    try:
        for indices, hidden in eval_hidden_states(model, rows, batch_size, check=False):
            for name, calls in read.items():
                if len(calls) == 1 and calls[0].shape[:-1].numel() == hidden.shape[:-1].numel():
                    calls[0] = calls[0].reshape(*hidden.shape[:2], -1)  # OPT joins the rows of a batch
                if len(calls) != 1 or calls[0].shape[:2] != hidden.shape[:2]:
                    raise EUAError(
                        f"{name} read inputs of shapes {[tuple(call.shape) for call in calls]} where hidden states have "
                        f"the shape {tuple(hidden.shape)}, so which token each belongs to is unknown: "
                        "leave distinct_directions out."
                    )
                found[name] += [calls[0][place, : len(rows[i].input_ids)] for place, i in enumerate(indices)]
                calls.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts).float() for name, parts in found.items()}
