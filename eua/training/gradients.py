"""The gradient of the rows to forget, kept apart from that of the rows to retain and changed before the two are added up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eua.data.rows import IGNORE_INDEX

# Subspace iteration (Halko et al. 2011): directions that are computed beyond those asked for, and rounds.
_MORE, _ROUNDS = 4, 4


def parts_of(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A padded batch of :class:`eua.data.batches.ForgetRetainCollator` as two: its rows to forget, with other answers to their
    prompts, and its rows to retain. Padding is left out where no row of a part needs it."""
    of_forget = (batch["forget"] | batch["alternative"]).any(dim=1)
    return _part(batch, of_forget), _part(batch, ~of_forget)


def _part(batch: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    part = {name: tensor[chosen] for name, tensor in batch.items()}
    rows = len(part["row"])
    # Tokens inside a row may be hidden from attention, so their number is no width; a row's last token always counts.
    width = int((part["labels"] != IGNORE_INDEX).any(dim=0).nonzero().max()) + 1 if rows else 0
    part = {name: tensor[:, :width] for name, tensor in part.items()}
    part["row"] = torch.arange(rows, device=part["row"].device)[:, None].repeat(1, width)
    return part


class ForgetGradient:
    """Collects the gradient of the rows to forget, and adds to that of the rows to retain what is left of it.

    Args:
        model: the model in training.
        directions: of every matrix, this many of the gradient's own leading singular directions are left out. They are what
            the rows have in common, rather than what sets each apart (RepSelect, 2026). Embeddings, biases and norms, which
            have no such directions, get no gradient of the rows to forget then. 0: nothing is left out.
        sign_gate: keep a coordinate only where its sign is that of the retained rows' gradient (SAGO, 2026).
    """

    def __init__(self, model: nn.Module, directions: int = 0, sign_gate: bool = False) -> None:
        self.directions, self.sign_gate = directions, sign_gate
        embedded = {id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding)}
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.is_matrix = [parameter.dim() == 2 and id(parameter) not in embedded for parameter in self.parameters]
        self._collected: list[Tensor | None] = [None] * len(self.parameters)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """What a backward adds to gradients in the block is collected here instead."""
        before = [parameter.grad for parameter in self.parameters]
        for parameter, collected in zip(self.parameters, self._collected, strict=True):
            parameter.grad = collected
        try:
            yield
        finally:
            self._collected = [parameter.grad for parameter in self.parameters]
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient

    def add(self) -> None:
        """Add what is left of the collected gradient to the parameters' gradients, and begin anew."""
        for parameter, gradient, is_matrix in zip(self.parameters, self._collected, self.is_matrix, strict=True):
            if gradient is None:
                continue
            if self.directions:
                gradient = without_leading(gradient, self.directions) if is_matrix else torch.zeros_like(gradient)
            if self.sign_gate:
                gradient = agreeing(gradient, parameter.grad)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._collected = [None] * len(self.parameters)


def without_leading(gradient: Tensor, directions: int) -> Tensor:
    """A matrix without its leading singular directions, in its own dtype; zeros if it has no others.

    >>> without_leading(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1).round(decimals=3).diag()
    tensor([0., 2., 1.])
    """
    if directions >= min(gradient.shape):
        return torch.zeros_like(gradient)
    matrix = gradient.float()
    leading = _leading(matrix, directions)
    return (matrix - leading @ (leading.T @ matrix)).to(gradient.dtype)


def _leading(matrix: Tensor, directions: int) -> Tensor:
    """Left singular directions of the largest singular values, (rows, directions). The random state stays as it is."""
    width = min(directions + _MORE, *matrix.shape)
    generator = torch.Generator(matrix.device).manual_seed(0)
    basis = torch.randn(len(matrix), width, generator=generator, device=matrix.device)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    order = torch.linalg.svd(basis.T @ matrix, full_matrices=False).U
    return basis @ order[:, :directions]


def agreeing(gradient: Tensor, other: Tensor | None) -> Tensor:
    """The coordinates of a gradient whose signs are those of another one, and 0 elsewhere; no coordinate without another one.

    >>> agreeing(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([5.0, 1.0, 0.0]))
    tensor([1., 0., 0.])
    """
    # Signs, since a product of small gradients underflows to 0.
    return torch.zeros_like(gradient) if other is None else gradient.where(gradient.sign() == other.sign(), 0.0)
