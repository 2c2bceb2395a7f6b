"""One row of a batch while it is generated: when it is done, and what of it is told when."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from eua.serving.jobs import Failure, Finish, FinishReason, Job, Piece
from eua.serving.transcript import Transcript


class AnswerRow:
    """Collects the tokens of one answer and tells the job's owner about them.

    Whether the guard refused a row is known for certain when ``generate`` returns. A row whose tokens are not those of the
    refusal has not been refused, and is told as it comes; one whose tokens might be is held back until then, and is not
    cut short by its own limits: a refusal is shown whole.
    """

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int], refusal_ids: tuple[int, ...]) -> None:
        self.job, self.eos, self.refusal_ids = job, eos, refusal_ids
        self.told = False
        self._tokenizer = tokenizer
        self._transcript = Transcript(tokenizer, job.stop)
        self._ids: list[int] = []
        self._reason: FinishReason | None = None
        self._over = False

    def push(self, token: int) -> bool:
        """Take the next token; True once no more are wanted."""
        if self._over or self._reason or self.job.cancelled:
            return True
        if token in self.eos:
            self._reason = "stop"
        else:
            self._ids.append(token)
            if tuple(self._ids) == self.refusal_ids:
                self._reason = "stop"
            elif len(self._ids) >= self.job.max_tokens:
                self._reason = "length"
        if not self._may_be_refusal():
            self._tell()
        return self._reason is not None

    def end(self, refused: bool) -> None:
        """``generate`` has returned: tell what has not been told."""
        if self._over or self.job.cancelled:
            return
        if refused:
            text = Transcript(self._tokenizer).piece(self.refusal_ids, final=True)
            self._finish(text, "content_filter", len(self.refusal_ids))
        else:
            self._reason = self._reason or "length"
            self._tell()

    def fail(self) -> None:
        if not (self._over or self.job.cancelled):
            self._over = True
            self.job.tell(Failure(500, "The model failed on this request: ask again, or look into the server's log."))

    def _may_be_refusal(self) -> bool:
        return bool(self.refusal_ids) and tuple(self._ids) == self.refusal_ids[: len(self._ids)]

    def _tell(self) -> None:
        final = self._reason is not None
        if not (final or self.job.stream or self.job.stop):
            return
        piece = self._transcript.piece(self._ids, final=final)
        if self._transcript.stopped:
            self._reason = "stop"
        if self._reason:
            self._finish(piece, self._reason, len(self._ids))
        elif piece:
            self.told = True
            self.job.tell(Piece(piece))

    def _finish(self, piece: str, reason: FinishReason, tokens: int) -> None:
        self.told = self._over = True
        if piece:
            self.job.tell(Piece(piece))
        self.job.tell(Finish(reason, tokens))
