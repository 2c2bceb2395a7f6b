"""Reference boundaries: one float per answer token, computed once from the model before unlearning, and kept.

The reference is frozen and the data do not change, so no second model and no reference forward is needed while training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eua.data import EncodedRow
from eua.errors import EUAError
from eua.files import replacing
from eua.hidden import Fill, Side, check_finite, output_head
from eua.scoring import answer_states, eval_hidden_states

# m_out from the smallest logits, m_in from the largest
SIDES: dict[str, Side] = {"forget": "bottom", "retain": "top", "eval_forget": "bottom", "eval_retain": "top"}
_SAMPLES_PER_TENSOR = 4096


def compute_boundaries(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    kind: str,
    *,
    fraction: float,
    temperature: float,
    fill: Fill,
    batch_size: int = 16,
    progress: bool = True,
) -> list[Tensor]:
    """The boundary of every answer token: a list of (A,) float32 tensors on the CPU, one per row.

    Args:
        model: the reference, i.e. the model before unlearning.
        rows: encoded rows.
        kind: ``"retain"`` gives m_in, ``"forget"`` gives m_out (method.md §3); ``"eval_"`` before either makes no difference.
        fraction: ρ, the share of the vocabulary in the tail.
        temperature: T of the energy.
        fill: ``"zero"`` or ``"none"``, see :func:`fused_energy.tail_energy`.
    """
    head = output_head(model)
    boundaries: list[Tensor] = [torch.empty(0)] * len(rows)
    title = f"boundaries of {kind} rows" if progress else None
    for indices, hidden in eval_hidden_states(model, rows, batch_size, title):
        states = answer_states(hidden, [rows[i] for i in indices])
        check_finite(states, f"the reference's hidden states on {kind} rows")
        try:
            values = head.tail_energy(states, fraction, SIDES[kind], fill, temperature).float().cpu()
        except ValueError as error:  # a fraction that leaves no logit; only here is the vocabulary known
            raise EUAError(f"rho cannot be used with this model: {error}") from error
        for i, part in zip(indices, values.split([len(rows[i].answer_ids) for i in indices]), strict=True):
            boundaries[i] = part
    return boundaries


def fingerprint(model: nn.Module, rows: dict[str, list[EncodedRow]], settings: dict[str, object]) -> str:
    """A digest of everything boundaries depend on: weights, token ids and which of them count, settings.

    Of each weight tensor, up to 4096 evenly spaced values are read: enough to tell any training step apart, at no cost.
    """
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(flat[::step].to("cpu", torch.float32).numpy().tobytes())
    for kind in sorted(rows):
        for row in rows[kind]:
            digest.update(repr((kind, row.answer_positions, row.input_ids)).encode())
    return digest.hexdigest()


def save_boundaries(path: Path, boundaries: dict[str, list[Tensor]], key: str) -> None:
    """Write one safetensors file, whole or not at all."""
    tensors = {kind: torch.cat(rows) for kind, rows in boundaries.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"fingerprint": key})


def load_boundaries(path: Path, rows: dict[str, list[EncodedRow]], key: str) -> dict[str, list[Tensor]] | None:
    """The boundaries in ``path``, or None when there is no file or it belongs to another model, data or settings."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != key:
                return None
            return {kind: list(file.get_tensor(kind).split([len(row.answer_ids) for row in rows[kind]])) for kind in rows}
    except Exception as error:
        raise EUAError(f"The boundaries in {path} cannot be read ({error}): delete the file; it is computed again.") from error
