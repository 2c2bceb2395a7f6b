"""The messages between the HTTP endpoints and the thread that owns the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# Below it, dividing logits by the temperature may overflow, and a GPU error ends the process; such answers are greedy anyway.
LOWEST_TEMPERATURE = 1e-6
FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, otherwise from the ``top_p`` nucleus. A seed makes it reproducible."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < LOWEST_TEMPERATURE

    def shares_batch_with(self, other: Sampling) -> bool:
        """Greedy requests share a batch, and so do equal ones without a seed; results with a seed must not depend on others."""
        return (self.greedy and other.greedy) or (self == other and self.seed is None)


@dataclass(frozen=True)
class Piece:
    """Text that follows the earlier pieces."""

    text: str


@dataclass(frozen=True)
class Finish:
    """The answer is complete."""

    reason: FinishReason
    completion_tokens: int


@dataclass(frozen=True)
class Failure:
    """There is no answer. ``status`` is the HTTP status; ``text`` says what happened and quotes neither prompt nor answer."""

    status: int
    text: str


Event = Piece | Finish | Failure


@dataclass(eq=False)
class Job:
    """One request in the engine.

    Attributes:
        prompt_ids: token ids of the prompt, including the template.
        max_tokens: limit for the answer.
        sampling: how its tokens are chosen.
        stop: texts before which the answer ends.
        stream: emit text as it is generated; if False and without ``stop``, all text is emitted at the end.
        emit: called from the engine's thread with pieces, then one :class:`Finish` or :class:`Failure`; must not block.
        cancelled: set when nobody waits any more; generation of this row ends at the next token.
    """

    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    emit: Callable[[Event], None]
    cancelled: bool = False
