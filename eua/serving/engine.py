"""The engine: one thread owns the model, takes requests from a bounded queue and answers waiting requests in batches."""

from __future__ import annotations

import copy
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from eua.data.batches import pad_prompts
from eua.data.rows import encode_prompt, format_prompt
from eua.errors import EUAError
from eua.guard.guard import EnergyGuard
from eua.model.asking import generation_explained, padding_id
from eua.model.energy_recorder import end_ids
from eua.model.forward import check_ids
from eua.serving.jobs import Failure, Job, Sampling
from eua.serving.prompt_limit import PromptLimit
from eua.serving.protocol import RequestError
from eua.serving.rows import AnswerRow

logger = logging.getLogger(__name__)


class Engine:
    """Answers jobs with ``model.generate`` and the guard.

    A batch is one ordinary left-padded ``generate`` call. With ``max_batch`` 1, every greedy answer therefore equals that of a
    separate ``generate`` call for its prompt, token for token. Larger batches sum floating-point numbers in another order: if
    two tokens are nearly tied (or an energy is very close to the threshold), rounding may change the result.

    Args:
        model: in eval mode; nothing else may use it while the engine runs.
        tokenizer: its tokenizer.
        guard: a guard calibrated for this model and this tokenizer; None answers everything.
        max_batch: largest number of rows in one ``generate`` call.
        queue: number of requests that may wait, those included whose prompt is still being tokenized; more are rejected.
        max_prompt_tokens: limit for one prompt; with None, only the model's positions limit it.
        max_tokens: limit for one answer, and the default if a request sets no limit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        guard: EnergyGuard | None,
        *,
        max_batch: int = 8,
        queue: int = 64,
        max_prompt_tokens: int | None = None,
        max_tokens: int = 512,
    ) -> None:
        if guard is not None and guard.first_tokens:
            raise EUAError(
                f"The guard reads the first {guard.first_tokens} generated tokens, which a stream would have sent by then: "
                "calibrate a guard with first_tokens = 0 for serving."
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.queue, self.max_tokens = max_batch, queue, max_tokens
        self.positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limits = (max_prompt_tokens, self.positions)
        self.max_prompt_tokens = min((limit for limit in limits if limit is not None), default=None)
        self._limit = PromptLimit(tokenizer, self.max_prompt_tokens)
        self.draining = False  # set it to reject new jobs while accepted ones are finished
        self._pad = padding_id(model, tokenizer)  # raises if the model generates no text
        self._eos = end_ids(model.generation_config.eos_token_id) or end_ids(tokenizer.eos_token_id)
        # The model's own stop texts end an answer as those of a request do. Special tokens are in no text, but can end it, too.
        stops, special = model.generation_config.stop_strings or (), tokenizer.all_special_tokens
        stops = (stops,) if isinstance(stops, str) else stops
        self._eos += [tokenizer.convert_tokens_to_ids(text) for text in stops if text in special]
        self._stop = tuple(text for text in stops if text not in special)
        self._arriving = 0  # requests that have a place in the queue, but no tokens yet
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._aborted = self._closing = False
        self._attached = None
        if guard is not None:
            self._attached = guard.attach(model, tokenizer)
        self._thread = threading.Thread(target=self._work, name="eua-engine", daemon=True)
        self._thread.start()

    def rehearse(self) -> None:
        """Generate a token, before there are jobs.

        Raises:
            EUAError: if the model cannot generate with its own settings, or not with the guard.
        """
        ids, _ = self.encode([{"role": "user", "content": "?"}], 1)
        job = Job(ids, 1, Sampling(), (), False, lambda event: None)
        with generation_explained():
            self._generate([self._row(job)])

    @property
    def waiting(self) -> int:
        return self._arriving + len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue for a request, from before its prompt is tokenized until its job is submitted.

        Raises:
            RequestError: 429 if the queue is full, 503 if the engine is shutting down.
        """
        with self._changed:
            self._check_open()
            if self.waiting >= self.queue:
                raise RequestError(f"The queue is full with {self.queue} waiting requests: try again later.", 429)
            self._arriving += 1
        try:
            yield
        finally:
            with self._changed:
                self._arriving -= 1

    def encode(self, messages: Sequence[dict[str, str]], max_tokens: int | None) -> tuple[list[int], int]:
        """Token ids of the prompt of a chat that ends with the user's message, and the limit for its answer.

        May be called from several threads: nothing here changes the tokenizer once it has encoded a first text.

        Raises:
            RequestError: if the tokenizer's template rejects the chat, or if it is too long.
        """
        chat = self.tokenizer.chat_template is not None
        if not chat and len(messages) > 1:
            raise RequestError(
                "The request holds several messages, but the model's tokenizer has no chat template to combine them: "
                "send a single user message.",
                field="messages",
            )
        try:
            text = format_prompt(self.tokenizer, messages if chat else messages[0]["content"], "The request")
            is_too_long = self._limit.is_exceeded(text)
            ids = [] if is_too_long else encode_prompt(text, self.tokenizer)
        except Exception as error:  # a template may raise anything, and tokenizers fail at half a surrogate pair
            reason = str(error) if isinstance(error, EUAError) else f"{type(error).__name__}: is the text valid Unicode?"
            raise RequestError(
                f"The messages cannot be turned into a prompt for this model. {reason}", field="messages"
            ) from error
        most = self.max_prompt_tokens
        if is_too_long or (most is not None and len(ids) > most):
            count = f"more than {most}" if is_too_long else len(ids)
            raise RequestError(
                f"The prompt has {count} tokens, but at most {most} are accepted: shorten it.",
                field="messages",
                code="context_length_exceeded",
            )
        if not ids:
            raise RequestError("The prompt has no tokens, so there is nothing to answer: send a text.", field="messages")
        answer_length = self._answer_length(len(ids), max_tokens)
        check_ids(self.model, [ids], "request")
        return ids, answer_length

    def _answer_length(self, prompt: int, asked: int | None) -> int:
        """Raise :class:`RequestError` if an answer of ``asked`` tokens would be too long."""
        room = self.max_tokens if self.positions is None else self.positions - prompt + 1  # its last token needs no position
        most = min(room, self.max_tokens)
        if asked is not None and asked > most:
            raise RequestError(
                f"An answer of {asked} tokens was requested, but after a prompt of {prompt} it can have {most}: request fewer.",
                field="max_tokens",
            )
        return most if asked is None else asked

    def submit(self, job: Job) -> None:
        """Put a job in the queue; take a :meth:`place` before, which counts as accepted while others finish.

        Raises:
            RequestError: 503 if the engine has been shut down since.
        """
        with self._changed:
            self._check_open(accepted=True)
            self._waiting.append(job)
            self._changed.notify()

    def _check_open(self, accepted: bool = False) -> None:
        if self._aborted or (self.draining and not accepted):
            raise RequestError("The server is shutting down and accepts no new requests: try another one, or later.", 503)

    def cancel(self, job: Job) -> None:
        """Free the place of a job that nobody waits for any more. Cancelling twice, or after the end, is harmless."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def abort(self) -> None:
        """Fail all waiting and running jobs."""
        with self._changed:
            self.draining = self._aborted = True
            for job in [*self._waiting, *self._running]:
                job.cancelled = True
                job.emit(Failure(503, "The server had to shut down before the answer was complete: ask again."))
            self._waiting.clear()

    def close(self) -> None:
        """Abort, wait for the thread to end, and detach the guard from the model."""
        self.abort()
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self._attached is not None:
            self._attached.detach()

    def _work(self) -> None:
        while batch := self._next_batch():
            self._answer(batch)
            del batch  # or the last requests would stay in memory until new ones arrive

    def _next_batch(self) -> list[Job]:
        """The job that has waited longest, and later ones that may share its batch; empty if the engine closes."""
        with self._changed:
            self._running = []
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return []
            batch = [self._waiting.popleft()]
            for job in list(self._waiting):
                if len(batch) < self.max_batch and self._may_join(job, batch):
                    batch.append(job)
                    self._waiting.remove(job)
            self._running = batch
            return batch

    def _may_join(self, job: Job, batch: Sequence[Job]) -> bool:
        """Whether a job may join a batch.

        A finished row continues as padding until the longest answer ends. With learned positions, a position beyond the model's
        last would make the whole batch fail, and on a GPU the whole process.
        """
        rows = [*batch, job]
        longest = max(len(row.prompt_ids) for row in rows) + max(row.max_tokens for row in rows)
        fits = self.positions is None or longest - 1 <= self.positions
        return fits and job.sampling.shares_batch_with(batch[0].sampling)

    def _answer(self, jobs: list[Job]) -> None:
        rows = [self._row(job) for job in jobs]
        try:
            self._generate(rows)
            for row in rows:
                row.end()
            return
        except Exception as error:
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("A batch failed with %s (message omitted: it may quote a prompt)\n%s", type(error).__name__, frames)
        # Not in the except clause, in which the traceback would keep the memory of the failed call.
        for row in rows:
            if len(rows) > 1 and not (row.has_emitted or row.is_over):
                self._answer([row.job])  # one bad row must not make the others fail
            else:
                row.fail()

    def _row(self, job: Job) -> AnswerRow:
        return AnswerRow(job, self.tokenizer, self._eos, self._stop)

    def _generate(self, rows: Sequence[AnswerRow]) -> None:
        """Run one ``generate`` call, which emits tokens of the rows as they are generated."""
        first, device = rows[0].job.sampling, self.model.device
        batch = pad_prompts([row.job.prompt_ids for row in rows], self._pad, device)
        config = self._config(rows)
        devices = [device] if device.type == "cuda" else []
        # Forked, because one client's seed must not affect the answers of others.
        with torch.random.fork_rng(devices, enabled=first.seed is not None):
            if first.seed is not None:
                torch.manual_seed(first.seed % 2**63)
            self.model.generate(
                **batch,
                generation_config=config,
                tokenizer=self.tokenizer,
                stopping_criteria=StoppingCriteriaList([_EmitTokens(rows, partial(self._refuse, rows))]),
            )

    def _refuse(self, rows: Sequence[AnswerRow]) -> None:
        """Refuse the rows of the running call that the guard refuses or stops. It decides before a row gets its first token."""
        if self._attached is None:
            return
        guard, refused, stopped = self._attached.guard, self._attached.refused, self._attached.stopped
        if refused is None or stopped is None or len(refused) != len(rows):
            raise EUAError("The guard has not decided on every row, so none may be answered: serve plain generation.")
        for row, is_refused in zip(rows, (refused | stopped).tolist(), strict=True):
            if is_refused:
                row.refuse(guard.refusal_text.strip(), len(guard.refusal_ids) - 1)  # end tokens do not count in answers either

    def _config(self, rows: Sequence[AnswerRow]) -> GenerationConfig:
        """The model's generation settings, with those of the request in place of its own."""
        config, sampling = copy.deepcopy(self.model.generation_config), rows[0].job.sampling
        longest = max(row.job.max_tokens for row in rows)
        settings: dict[str, Any] = {"max_new_tokens": longest, "do_sample": not sampling.greedy, "num_beams": 1}
        if not sampling.greedy:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        config.update(**settings, num_return_sequences=1, pad_token_id=self._pad, eos_token_id=self._eos or None)
        return config


class _EmitTokens(StoppingCriteria):
    """Calls ``decide``, then passes every row its new token. A finished row continues as padding until all are finished."""

    def __init__(self, rows: Sequence[AnswerRow], decide: Callable[[], None]) -> None:
        self.rows, self.decide = rows, decide

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.decide()
        done = [row.push(token) for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True)]
        return torch.tensor(done, device=input_ids.device)
