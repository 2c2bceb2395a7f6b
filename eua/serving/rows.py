"""One row of a batch during generation: when it is finished, and when its text is emitted."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from eua.serving.jobs import Failure, Finish, FinishReason, Job, Piece
from eua.serving.transcript import Transcript


class AnswerRow:
    """Collects the tokens of one answer and emits its text, or the refusal instead."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.job, self.eos, self.stop = job, eos, (*job.stop, *stop)
        self.has_emitted = False
        self._transcript = Transcript(tokenizer, self.stop)
        self._ids: list[int] = []
        self._ended = False

    @property
    def is_over(self) -> bool:
        """Whether nothing more may be emitted."""
        return self._ended or self.job.cancelled

    def push(self, token: int) -> bool:
        """Take the next token; return True if the row needs no more."""
        if self.is_over:
            return True
        reason: FinishReason | None = None
        if token in self.eos:
            reason = "stop"
        else:
            self._ids.append(token)
            if len(self._ids) >= self.job.max_tokens:
                reason = "length"
        self._emit(reason)
        return self._ended

    def refuse(self, text: str, tokens: int) -> None:
        """Emit the complete refusal, whatever the request's limits, without waiting for its tokens to be generated.

        If the answer has begun, the refusal follows what has been said and ends the answer.
        """
        if not self.is_over:
            said = self._transcript.piece(self._ids, final=True)
            self._finish(f"{said} {text}" if self._ids else text, "content_filter", len(self._ids) + tokens)

    def end(self) -> None:
        """``generate`` has returned, perhaps because of a limit in the model's generation settings."""
        if not self.is_over:
            self._emit("length")

    def fail(self) -> None:
        if not self.is_over:
            self._ended = True
            self.job.emit(Failure(500, "The model failed on this request: ask again, or see the server's log."))

    def _emit(self, reason: FinishReason | None) -> None:
        if not (reason or self.job.stream or self.stop):
            return
        piece = self._transcript.piece(self._ids, final=reason is not None)
        if self._transcript.stopped:
            reason = "stop"
        if reason:
            self._finish(piece, reason, len(self._ids))
        elif piece:
            self.has_emitted = True
            self.job.emit(Piece(piece))

    def _finish(self, piece: str, reason: FinishReason, tokens: int) -> None:
        self.has_emitted = self._ended = True
        if piece:
            self.job.emit(Piece(piece))
        self.job.emit(Finish(reason, tokens))
