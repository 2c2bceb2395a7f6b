"""A task of the benchmark: what to forget and to retain, what to choose settings on, and what to report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from eua.data.sources import Row
from eua.errors import EUAError
from eua.evaluation.said import KeyedFact

FORGOTTEN = "forget"  # the group of facts that are to be forgotten
EXTRACTION_STRENGTH, SAID_GREEDILY = "extraction strength", "said greedily"  # what settings are chosen by
_READ_BYTES = 2**20


@dataclass(frozen=True)
class EvaluationSet:
    """Rows to measure, and whether they are to be forgotten."""

    rows: Sequence[Row]
    forget: bool


@dataclass(frozen=True)
class Task:
    """Everything that a method is given and measured on, for one seed.

    Settings are chosen on ``validation`` and reported on ``test``. Both come in groups (people, authors) that they do not
    share; forgotten groups are split, too, and all of them are trained on.

    Attributes:
        name: of the task, e.g. "people".
        target: folder of the model before unlearning.
        retain_model: folder of a model that was never trained on the rows to forget, or None. It has the target's tokenizer.
        forget, retain: rows to train on. A row to forget may have "alternatives", wrong answers that AltPO trains on.
        validation, test: named sets to measure.
        calibration, calibration_groups: prompts for a guard's threshold that unlearning never saw, and the group of each.
        facts: facts with the words that give each away; those of the forgotten test groups are in the group "forget".
        validation_facts: facts of the validation groups, if settings are chosen by what greedy answers say; None: they are
            chosen by the extraction strength of the validation sets.
        members: rows to forget that membership inference is tried on; the test sets to forget if there are none.
        holdout: rows like those that no model was trained on. Without them there is no membership inference.
        entities: facts to forget as rows of "question", "prefix" and "entity", for the depth of unlearning.
        text: plain texts whose perplexity is measured.
        utility: names of the test sets that model utility is made of; without them it is not reported.
        second: rows of ``retain`` that are to be forgotten later, in a second request; none: there is no second request.
        unrelated: plain texts that have nothing to do with the rows, to relearn on.
        relearning_steps: numbers of fine-tuning steps after which it is measured what comes back; none: relearning is left out,
            since it holds a copy of the model with an optimizer.
        relearning_rate: its learning rate.
        new_tokens: length of generated answers.
        generation: test set → options of :func:`eua.evaluation.texts.generate` for its rows, where others than the length are
            usual; None: there are none.
        samples: sampled answers to each wording of a fact to forget.
        retained_samples: the same for facts to retain; None: as many.
        sampling_dtype: in which answers are sampled, e.g. "bfloat16", which is twice as fast on many processors; None: the
            model's own.
        training: fields of :class:`eua.EUAConfig` that all methods share, e.g. the batch size.
        rate_factor: by which every method's published learning rates, which are meant for models of 1B parameters, are
            multiplied.
        epochs: numbers of passes over the rows to forget, in place of the published 5 and 10.
        blocks: of the target, by which the published choices of a block, of 16, are scaled.
        tolerance: the rate of false refusals that a guard is calibrated for.
        note: what readers of the figures must know of this task: what a seed changes, and what differs from other benchmarks.
    """

    name: str
    target: str
    retain_model: str | None
    forget: Sequence[Row]
    retain: Sequence[Row]
    validation: Mapping[str, EvaluationSet]
    test: Mapping[str, EvaluationSet]
    calibration: Sequence[str]
    calibration_groups: Sequence[str]
    facts: Sequence[KeyedFact] = ()
    validation_facts: Sequence[KeyedFact] | None = None
    members: Sequence[Row] = ()
    holdout: Sequence[Row] = ()
    entities: Sequence[Row] = ()
    text: Sequence[str] = ()
    utility: Sequence[str] = ()
    second: Sequence[Row] = ()
    unrelated: Sequence[str] = ()
    relearning_steps: tuple[int, ...] = ()
    relearning_rate: float = 2e-5
    new_tokens: int = 64
    generation: Mapping[str, Mapping[str, Any]] | None = None
    samples: int = 16
    retained_samples: int | None = None
    sampling_dtype: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    rate_factor: float = 1.0
    epochs: tuple[float, ...] = (5, 10)
    blocks: int = 16
    tolerance: float = 0.05
    note: str = ""

    def __post_init__(self) -> None:
        for name, sets in (("validation", self.validation), ("test", self.test)):
            if {one.forget for one in sets.values()} != {True, False}:
                raise EUAError(
                    f"The {name} sets of the task {self.name} are {', '.join(sets) or 'none'}, but a method is judged by what "
                    "it forgets and by what it keeps: give at least one set to forget and one to retain, each with rows."
                )
        if untested := self.validation.keys() - self.test.keys():
            raise EUAError(
                f"The validation sets {', '.join(sorted(untested))} of the task {self.name} have no test sets of the same "
                "names, so what settings are chosen by could not be reported: give both, or leave them out of both."
            )

    @property
    def forgotten_facts(self) -> list[KeyedFact]:
        """The facts that are to be forgotten."""
        return [fact for fact in self.facts if fact.group == FORGOTTEN]

    @property
    def objective(self) -> str:
        """What settings are chosen by, :data:`EXTRACTION_STRENGTH` or :data:`SAID_GREEDILY`."""
        return EXTRACTION_STRENGTH if self.validation_facts is None else SAID_GREEDILY

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all rows and settings, and of the models' files: not of folders' names, settings of None, and the note."""
        content = asdict(self) | {key: folder and files_digest(folder) for key, folder in self.folders.items()}
        given = {key: value for key, value in content.items() if value is not None and key != "note"}
        return hashlib.sha256(json.dumps(given, sort_keys=True, default=list).encode()).hexdigest()

    @property
    def folders(self) -> dict[str, str | None]:
        return {"target": self.target, "retain_model": self.retain_model}


MakeTask: TypeAlias = Callable[[int], Task]  # seed → task; it can be pickled, so that worker processes can call it


def files_digest(folder: str) -> str:
    """SHA-256 of the weights, settings and tokenizer in a model's folder; of the name, if it is one on the hub."""
    digest = hashlib.sha256()
    files = sorted(path for pattern in ("*.safetensors", "*.json") for path in Path(folder).glob(pattern))
    if not files:
        return hashlib.sha256(folder.encode()).hexdigest()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()
