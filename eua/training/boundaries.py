"""The reference figures of rows: one float per answer token, computed once from the model before unlearning, kept in a file.

For EUA they are boundaries, for methods that compare likelihoods (NPO, DPO) the tokens' NLL. That model is frozen and the rows
do not change, so training needs neither a second model nor a second forward.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from eua.data.rows import EncodedRow, rows_digest
from eua.distributed import own_part
from eua.errors import EUAError
from eua.files import replacing
from eua.methods.table import METHODS
from eua.model.figures import answer_figures, answer_nll
from eua.model.fingerprints import model_fingerprint
from eua.model.head import Fill, Head, Side, output_head

# Which logits make a boundary: the smallest make m_out, the largest m_in.
TAIL_OF_KIND: dict[str, Side] = {"forget": "bottom", "retain": "top", "eval_forget": "bottom", "eval_retain": "top"}
# The rows of which a method needs a figure; "boundary" and "nll" are those of Method.reference.
KINDS_OF = {
    "boundary": set(TAIL_OF_KIND),
    "nll": {"forget", "alternative", "eval_forget", "eval_alternative"},
    None: set[str](),
}
Boundaries = dict[str, list[Tensor | None]]  # by kind, (A,) for each row; None: not computed yet

_SIDES: tuple[Side | None, ...] = ("bottom", "top", None)
_NAMES = {"boundary": "boundaries", "nll": "likelihoods"}
_BATCHES_AT_ONCE = 32
_SECONDS_BETWEEN_SAVES = 30.0


class ReferenceStore:
    """The boundaries of rows, or their NLL, for the model as it is before the first step. A resumed run finds them in the file.

    :meth:`look_up` and :meth:`complete` are separate, since sharded weights can be read before training is prepared, but a
    forward needs the prepared model. An interruption loses no boundary that was computed before it.

    Args:
        path: the safetensors file.
        rows: encoded rows by kind, see :data:`KINDS_OF`.
        method: decides what is computed, boundaries, NLLs or nothing, see :data:`eua.methods.table.METHODS`. Rows that need no
            figure have zeros.
        constants: (m_in, m_out), in nats, to be used instead of computed boundaries.
        every_step: the caller computes the boundaries of training rows at every step; here they are NaN.
        settings: ``fraction``, ``temperature`` and ``fill`` of :func:`compute_boundaries`.
    """

    def __init__(
        self,
        path: Path,
        rows: Mapping[str, Sequence[EncodedRow]],
        *,
        method: str = "eua",
        constants: tuple[float, float] | None = None,
        every_step: bool = False,
        **settings: Any,
    ) -> None:
        figure = METHODS[method].reference
        self.path, self.method, self.figure, self.every_step = path, method, figure, every_step
        self.settings = settings if figure == "boundary" else {}
        self.rows = rows
        self.values: dict[str, list[Tensor]] = {}  # for each row (A,) float32 on the CPU; NaN for rows that are not used
        self._found: Boundaries | None = None
        self._used: Mapping[str, Collection[int]] = {}
        self._key, self._is_saved = "", False
        self._fill([kind for kind in rows if kind not in KINDS_OF[figure]], dict.fromkeys(_SIDES, 0.0))
        if figure is not None and constants is not None:
            m_in, m_out = constants
            self._fill(rows, {"bottom": m_out, "top": m_in})
        elif figure is not None and every_step:
            self._fill([kind for kind in rows if "eval" not in kind], dict.fromkeys(_SIDES, torch.nan))
        self.wanted = {kind: rows[kind] for kind in rows if kind not in self.values}

    def _fill(self, kinds: Iterable[str], values: Mapping[Side | None, float]) -> None:
        for kind in kinds:
            value = values[TAIL_OF_KIND.get(kind)]
            self.values[kind] = [torch.full((len(row.answer_ids),), value) for row in self.rows[kind]]

    @property
    def missing(self) -> int:
        """The number of used rows without boundaries."""
        return sum(len(self._missing_rows(kind)) for kind in self.wanted)

    def _missing_rows(self, kind: str) -> list[int]:
        used = self._used.get(kind, range(len(self.wanted[kind])))
        return [i for i in used if self._found is None or self._found[kind][i] is None]

    def look_up(self, model: nn.Module, *, resuming: bool, used: Mapping[str, Collection[int]] | None = None) -> None:
        """Read the file if it belongs to these rows, settings and weights; all processes call this.

        Args:
            model: the model before the first step.
            resuming: whether the file must belong to this run.
            used: the rows that training will use, by kind; all rows of a kind that is not given. No others are computed.

        Raises:
            EUAError: when the run is resumed and the file belongs to another one, or when the file cannot be read.
        """
        self._used = used or {}
        if self._found is not None:
            return
        key = self._fingerprint(model)
        result = None
        if PartialState().is_main_process:  # the file may be on its disk only, and it alone may have loaded the weights
            result = key, load_boundaries(self.path, self.wanted, key), self.path.exists()
        self._key, found, is_there = broadcast_object_list([result])[0]
        if found is None and is_there and resuming:
            raise EUAError(
                f"{self.path} belongs to another model, other rows or other settings than this run, so resuming would mix two "
                "runs: start from the model, rows and settings of the interrupted run, or train anew into another folder."
            )
        self._found = found or {kind: [None] * len(rows) for kind, rows in self.wanted.items()}
        self._is_saved = found is not None

    def complete(self, model: nn.Module, *, batch_size: int = 16, progress: bool = True) -> None:
        """Compute the boundaries that were not found; all processes call this, and each computes a part.

        Args:
            model: the model that was passed to :meth:`look_up`, with the same weights.
            batch_size: rows per forward.
            progress: show progress bars.

        Raises:
            EUAError: if weights have been trained since, and training would use rows whose boundaries are not known.
        """
        if self._found is None:
            return
        was_complete = self.values.keys() >= self.wanted.keys()
        if was_complete and self.missing and self._fingerprint(model) != self._key:
            raise EUAError(
                f"Training would now use {self.missing} rows that it did not use before, and the weights from which their "
                "boundaries would be computed have been trained since: make a new trainer with these settings."
            )
        if self.missing or not self._is_saved:
            try:
                self._compute_missing(model, self._found, batch_size, progress)
            finally:  # an interruption loses nothing
                self._save()  # even if it holds no boundaries: its fingerprint shows which run it belongs to
                self._is_saved = True
        for kind, found in self._found.items():
            of_rows = zip(found, self.rows[kind], strict=True)
            self.values[kind] = [_unknown(row) if known is None else known for known, row in of_rows]

    def _fingerprint(self, model: nn.Module) -> str:
        return fingerprint(model, self.rows, self.settings | {"at_every_step": self.every_step, "method": self.method})

    def _compute_missing(self, model: nn.Module, boundaries: Boundaries, batch_size: int, progress: bool) -> None:
        saved = time.monotonic()
        for kind, found in boundaries.items():
            rows = self.rows[kind]
            # Longest first: too little memory fails at once.
            missing = sorted(sorted(self._missing_rows(kind)), key=[-len(row.input_ids) for row in rows].__getitem__)
            step = batch_size * _BATCHES_AT_ONCE * PartialState().num_processes
            with tqdm(
                total=len(missing),
                desc=f"{_NAMES[self.figure or 'boundary']} of {kind} rows",
                disable=not progress,
                leave=False,
            ) as bar:
                for start in range(0, len(missing), step):
                    part = own_part(missing[start : start + step])
                    values = self._compute(model, [rows[i] for i in part], kind, batch_size)
                    for i, boundary in gather_object(list(zip(part, values, strict=True))):
                        found[i] = boundary
                    bar.update(len(missing[start : start + step]))
                    if time.monotonic() > saved + _SECONDS_BETWEEN_SAVES:
                        self._save()
                        saved = time.monotonic()

    def _compute(self, model: nn.Module, rows: Sequence[EncodedRow], kind: str, batch_size: int) -> list[Tensor]:
        if self.figure == "nll":
            return answer_nll(model, rows, f"{kind} rows", batch_size)
        return compute_boundaries(model, rows, kind, batch_size=batch_size, **self.settings)

    def _save(self) -> None:
        if PartialState().is_main_process and self._found is not None:
            save_boundaries(self.path, self._found, self.wanted, self._key)


def compute_boundaries(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    kind: str,
    *,
    fraction: float,
    temperature: float,
    fill: Fill,
    batch_size: int = 16,
) -> list[Tensor]:
    """The boundary of every answer token: a list of (A,) float32 tensors on the CPU, one per row.

    Args:
        model: the model before unlearning.
        rows: encoded rows.
        kind: ``"retain"`` gives m_in, ``"forget"`` gives m_out (method.md §3); a prefix ``"eval_"`` changes nothing.
        fraction: ρ, the share of the vocabulary in the tail.
        temperature: T of the energy.
        fill: ``"zero"`` or ``"none"``, see :func:`fused_energy.tail_energy`.
        batch_size: rows per forward.
    """
    head = output_head(model)

    def tail(states: Tensor, targets: Tensor) -> Tensor:
        return boundaries_of(head, states, kind, fraction, fill, temperature)

    return answer_figures(model, rows, tail, "boundaries", f"{kind} rows", batch_size)


def boundaries_of(head: Head, states: Tensor, kind: str, fraction: float, fill: Fill, temperature: float) -> Tensor:
    """The boundary at each hidden state, (A, H) → (A,); arguments as in :func:`compute_boundaries`.

    Raises:
        EUAError: if the fraction leaves no logit, which shows only once the vocabulary is known.
    """
    try:
        return head.tail_energy(states, fraction, TAIL_OF_KIND[kind], fill, temperature)
    except ValueError as error:
        raise EUAError(f"rho cannot be used with this model: {error}") from error


def fingerprint(model: nn.Module, rows: Mapping[str, Sequence[EncodedRow]], settings: Mapping[str, object]) -> str:
    """A digest of everything that boundaries depend on: weights, rows and settings; all processes call this."""
    digest = hashlib.sha256(repr((sorted(settings.items()), model_fingerprint(model))).encode())
    for kind in sorted(rows):
        digest.update(f"{kind} {rows_digest(rows[kind])}".encode())
    return digest.hexdigest()


def save_boundaries(path: Path, boundaries: Boundaries, rows: Mapping[str, Sequence[EncodedRow]], key: str) -> None:
    """Write one safetensors file, whole or not at all. Boundaries that are not computed yet are NaN."""
    tensors = {}
    for kind, known in boundaries.items():
        tensors[kind] = torch.cat([_unknown(row) if a is None else a for a, row in zip(known, rows[kind], strict=True)])
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"fingerprint": key})


def _unknown(row: EncodedRow) -> Tensor:
    """In place of boundaries that are not known. A loss that used them would be NaN, and training would stop."""
    return torch.full((len(row.answer_ids),), torch.nan)


def load_boundaries(path: Path, rows: Mapping[str, Sequence[EncodedRow]], key: str) -> Boundaries | None:
    """The boundaries in ``path``, with None for each row whose boundaries are not computed yet.

    None if there is no file, or if it belongs to another model, other rows or other settings.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != key:
                return None
            found = {kind: file.get_tensor(kind).split([len(row.answer_ids) for row in rows[kind]]) for kind in rows}
    except Exception as error:
        raise EUAError(f"The boundaries in {path} cannot be read ({error}): delete the file; it is computed again.") from error
    return {kind: [None if part.isnan().any() else part for part in parts] for kind, parts in found.items()}
