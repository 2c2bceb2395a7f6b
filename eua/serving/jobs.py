"""What passes between the web side and the thread that owns the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LOWEST_TEMPERATURE = (
    1e-6  # logits divided by less may overflow, which ends a GPU's use to the process; the answer is greedy anyway
)
FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else from the ``top_p`` nucleus. A seed makes the choice repeatable."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < LOWEST_TEMPERATURE

    def shares_batch_with(self, other: Sampling) -> bool:
        """Greedy requests share a batch, and so do equal ones without a seed; what a seed gives must not depend on company."""
        return (self.greedy and other.greedy) or (self == other and self.seed is None)


@dataclass(frozen=True)
class Piece:
    """Text that follows the pieces before."""

    text: str


@dataclass(frozen=True)
class Finish:
    """The answer is complete."""

    reason: FinishReason
    completion_tokens: int


@dataclass(frozen=True)
class Failure:
    """There will be no answer; ``status`` is HTTP's, ``text`` says what happened and nothing of prompt or answer."""

    status: int
    text: str


Event = Piece | Finish | Failure


@dataclass(eq=False)
class Job:
    """One request on its way through the engine.

    Attributes:
        prompt_ids: token ids of the prompt, template included.
        max_tokens: of the answer.
        sampling: how its tokens are chosen.
        stop: texts before which the answer ends.
        stream: emit text as it comes; without it, and without ``stop``, all of it comes at the end.
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
