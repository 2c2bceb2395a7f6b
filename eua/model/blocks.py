"""Reads and replaces the outputs of a model's blocks, by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eua.errors import EUAError
from eua.model.head import unwrap


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a decoder, first to last: the one list of modules with as many entries as the config states layers.

    Raises:
        EUAError: if there is no such list, or more than one.
    """
    inner = unwrap(model)
    config: Any = getattr(inner, "config", None)
    count = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    lists = [module for module in inner.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(lists) != 1:
        raise EUAError(
            f"{type(inner).__name__} has {len(lists)} lists of {count} modules, so it is unknown which one holds its blocks: "
            "use a decoder whose config states num_hidden_layers and whose blocks are in one list."
        )
    return list(lists[0])


@contextmanager
def output_hooks(blocks: Sequence[nn.Module], of_block: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
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
