"""The HTTP endpoints: OpenAI's chat endpoint, health, models and metrics. Prompts and answers are never logged."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from eua.errors import EUAError
from eua.serving.access import Access, check_is_json
from eua.serving.engine import Engine
from eua.serving.jobs import Event, Failure, Finish, Job, Piece
from eua.serving.metrics import Metrics
from eua.serving.protocol import ChatRequest, RequestError, chunk, completion, event, parse_request, unknown_model, usage

logger = logging.getLogger(__name__)

T = TypeVar("T")

CLIENT_GONE = 499  # nginx's status for a client that disconnected; it only appears in the metrics
READ_LIMIT_FACTOR = 16  # the server reads up to 16 times the largest body, so that a client that sends too much sees the error
LONG = 16_384  # bytes of a request whose prompt is tokenized apart from those of shorter ones, which would wait for it


def create_app(
    engine: Engine,
    name: str,
    *,
    access: Access | None = None,
    timeout: float = 120.0,
    read_timeout: float = 15.0,
    max_body_bytes: int = 2**20,
) -> Starlette:
    """The ASGI application.

    Args:
        engine: generates the answers; the app does not close it.
        name: the name of the model.
        access: who may use it; with None everyone, except for web pages of other origins.
        timeout: seconds from a request's arrival until its answer must be complete.
        read_timeout: seconds in which a body must arrive.
        max_body_bytes: largest body of a request.
    """
    service = _Service(engine, name, timeout, min(read_timeout, timeout), max_body_bytes)
    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/health", service.health),
        Route("/metrics", service.metrics_text),
    ]
    gate = Middleware(_Gate, access=access or Access(), metrics=service.metrics)
    app = Starlette(routes=routes, middleware=[gate], exception_handlers={HTTPException: _http_error})
    app.router.redirect_slashes = False
    return app


class _Gate:
    """Turns requests away that have no access, before anything else looks at them."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self.app, self.access, self.metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.access.check(Request(scope))
        except RequestError as error:
            self.metrics.requests.labels(error.status).inc()
            await _error_response(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class _Service:
    def __init__(self, engine: Engine, name: str, timeout: float, read_timeout: float, max_body_bytes: int) -> None:
        self.engine, self.name = engine, name
        self.timeout, self.read_timeout, self.max_body_bytes = timeout, read_timeout, max_body_bytes
        self.metrics = Metrics(engine)
        self.started = int(time.time())
        # One thread each: a prompt that takes seconds delays other long ones only, and one that waits can be cancelled.
        self.short_prompts, self.long_prompts = (ThreadPoolExecutor(1, f"eua-{kind}-prompts") for kind in ("short", "long"))

    async def health(self, request: Request) -> Response:
        status = "failed" if not self.engine.alive else "draining" if self.engine.draining else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "eua"}

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.name:
            return _error_response(unknown_model(self.name))
        return JSONResponse(self._model())

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def chat(self, request: Request) -> Response:
        """Turn every error into a response: a web server would log the exception, which may quote a prompt."""
        try:
            response = await self._chat(request)
        except ClientDisconnect:
            self.metrics.cancelled.inc()
            response = Response(status_code=CLIENT_GONE)
        except EUAError as error:
            response = _error_response(error if isinstance(error, RequestError) else RequestError(str(error)))
        except Exception as error:
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("A request failed with %s (message omitted: it may quote a prompt)\n%s", type(error).__name__, frames)
            response = _error_response(RequestError("The server failed on this request: see its log.", 500))
        self.metrics.requests.labels(response.status_code).inc()
        return response

    async def _chat(self, request: Request) -> Response:
        arrival = time.monotonic()
        check_is_json(request)
        body = await self._body(request)
        asked = parse_request(body, self.name)
        encoders = self.long_prompts if len(body) > LONG else self.short_prompts
        return await unless_gone(request, self._answer(asked, arrival, encoders))

    async def _body(self, request: Request) -> bytes:
        """Raise :class:`RequestError` if the body is too large (413) or too slow (408)."""
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.read_timeout):
                async for part in request.stream():
                    size += len(part)
                    if size <= self.max_body_bytes:
                        body += part
                    elif size > READ_LIMIT_FACTOR * self.max_body_bytes:
                        break
        except TimeoutError:
            raise RequestError(f"The body did not arrive within {self.read_timeout:g} s: send it faster.", 408) from None
        if size > self.max_body_bytes:
            raise RequestError(f"The body is larger than this server's limit of {self.max_body_bytes} bytes: shorten it.", 413)
        return bytes(body)

    async def _answer(self, asked: ChatRequest, arrival: float, encoders: Executor) -> Response:
        """The response, whose stream may still have to be generated. If it is cancelled, so is its work."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for events any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        with self.engine.place():
            encoding = loop.run_in_executor(encoders, self.engine.encode, asked.messages, asked.max_tokens)
            prompt_ids, max_tokens = await self._in_time(encoding, arrival)
            job = Job(prompt_ids, max_tokens, asked.sampling, asked.stop, asked.stream, emit)
            self.engine.submit(job)
        emitted = self._emitted(job, events, arrival)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        streaming = False
        try:
            if asked.stream:  # an error that precedes all text can still be sent as an HTTP status
                first = await anext(emitted)
                streaming = True
                return _JobStream(self, job, self._chunks(asked, head, job, first, emitted))
            text, finish = await _gathered(emitted)
            return JSONResponse(completion(head, text, finish, len(prompt_ids)))
        finally:
            if not streaming:
                self.engine.cancel(job)

    async def _in_time(self, work: Awaitable[T], arrival: float) -> T:
        """The result of ``work``, or :class:`RequestError` (504) if the request times out."""
        try:
            async with asyncio.timeout(arrival + self.timeout - time.monotonic()):
                return await work
        except TimeoutError:
            raise RequestError(
                f"The answer was not complete within {self.timeout:g} s: ask for fewer tokens, or try again later.", 504
            ) from None

    async def _emitted(self, job: Job, events: asyncio.Queue[Event], arrival: float) -> AsyncIterator[Piece | Finish]:
        """What the engine emits for a job, up to its :class:`Finish`.

        Raises:
            RequestError: 504 on a timeout, otherwise the status of the engine's :class:`Failure`.
        """
        is_first = True
        while True:
            item = await self._in_time(events.get(), arrival)
            if isinstance(item, Failure):
                raise RequestError(item.text, item.status)
            seconds = time.monotonic() - arrival
            if is_first:
                self.metrics.first_seconds.observe(seconds)
                is_first = False
            if isinstance(item, Finish):
                self.metrics.seconds.observe(seconds)
                self.metrics.refusals.inc(item.reason == "content_filter")
                self.metrics.tokens.labels("prompt").inc(len(job.prompt_ids))
                self.metrics.tokens.labels("completion").inc(item.completion_tokens)
            yield item

    async def _chunks(
        self, asked: ChatRequest, head: dict[str, Any], job: Job, item: Piece | Finish, emitted: AsyncIterator[Piece | Finish]
    ) -> AsyncIterator[bytes]:
        """The events of a streamed answer; an error during generation becomes the last event before ``[DONE]``."""
        yield event(chunk(head, {"role": "assistant", "content": ""}))
        try:
            while isinstance(item, Piece):
                yield event(chunk(head, {"content": item.text}))
                item = await anext(emitted)
            yield event(chunk(head, {}, item.reason))
            if asked.include_usage:
                yield event({**chunk(head, {}), "choices": [], "usage": usage(len(job.prompt_ids), item)})
        except RequestError as error:
            yield event(error.body())
        yield event("[DONE]")


class _JobStream(StreamingResponse):
    """A stream that frees its job's place in the engine however it ends."""

    def __init__(self, service: _Service, job: Job, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.service, self.job = service, job
        self.is_whole = False

    async def stream_response(self, send: Send) -> None:
        await super().stream_response(send)
        self.is_whole = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.engine.cancel(self.job)
            self.service.metrics.cancelled.inc(not self.is_whole)


async def _gathered(emitted: AsyncIterator[Piece | Finish]) -> tuple[str, Finish]:
    """The full text, and how it ended."""
    pieces = []
    while isinstance(item := await anext(emitted), Piece):
        pieces.append(item.text)
    return "".join(pieces), item


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, or :class:`ClientDisconnect` as soon as the client disconnects."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)  # asyncio logs an exception that nobody looks at


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error_response(error: RequestError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body would be read as the next request
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    text = "There is no endpoint with this path and method: use POST /v1/chat/completions, GET /v1/models, /health or /metrics."
    return _error_response(RequestError(text, status))
