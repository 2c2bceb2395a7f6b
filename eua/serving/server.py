"""The server behind `eua serve`: load, listen, answer; on SIGTERM, finish accepted requests and exit."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from eua.errors import EUAError
from eua.guard.guard import EnergyGuard
from eua.model.loading import load_model
from eua.serving.access import LOOPBACK_HOSTS, Access, check_key, host_name, is_loopback
from eua.serving.app import create_app
from eua.serving.connection import Connection
from eua.serving.engine import Engine

logger = logging.getLogger("uvicorn.error")

KEY_VARIABLE = "EUA_API_KEY"
BACKLOG = 512  # connections that the system keeps until they are accepted
FLUSH_SECONDS = 5  # in which complete or aborted answers can still reach their clients
KEEP_ALIVE_SECONDS = 5  # that a connection may wait for its next request
RETRY_SECONDS = 0.05  # until the next look for a place for a new connection
SPARE_FILES = 16  # that a process without free file descriptors keeps for other things than connections
LOGGED_PATH = 200  # characters


def run_serve(arguments: argparse.Namespace) -> None:
    """Run the parsed command until a signal ends it."""
    key = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY_VARIABLE)
    key = None if key is None else check_key(key)
    guard = None if arguments.no_guard else EnergyGuard.from_pretrained(arguments.guard or arguments.model)
    model, tokenizer = load_model(arguments.model)
    engine = Engine(
        model,
        tokenizer,
        guard,
        max_batch=arguments.max_batch,
        queue=arguments.queue,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_tokens=arguments.max_tokens,
    )
    try:
        engine.rehearse()
        # A full collection of what is loaded would stop all answers, for a third of a second with a small model.
        gc.collect()
        gc.freeze()
        name = arguments.name or Path(arguments.model).resolve().name
        with _listen(arguments.host, arguments.port) as listening:
            host, port = listening.getsockname()[:2]
            limits = {"timeout": arguments.timeout, "read_timeout": arguments.read_timeout}
            access = access_for(host, arguments.allowed_host, key)
            app = create_app(engine, name, access=access, **limits, max_body_bytes=arguments.max_body_bytes)
            server = DrainingServer(app, engine, grace=arguments.grace, **limits, max_connections=arguments.max_connections)
            where = f"[{host}]" if ":" in host else host
            print(f"Serving {name} on http://{where}:{port}/v1, guard {'off' if guard is None else 'on'}.", flush=True)
            server.run(sockets=[listening])
    finally:
        engine.close()


def access_for(address: str, allowed_hosts: Iterable[str], key: str | None) -> Access:
    """Who may use a server that listens on this IP address. Warns if everyone may who reaches it."""
    allowed = [host_name(host.lower()) for host in allowed_hosts]
    if is_loopback(address):
        return Access([*LOOPBACK_HOSTS, address, *allowed], allowed, key)
    if key is None:
        print(
            f"Warning: whoever reaches {address} can use this server, because it has no key: set {KEY_VARIABLE}.",
            file=sys.stderr,
            flush=True,
        )
    return Access([*LOOPBACK_HOSTS, *allowed] if allowed else None, allowed, key)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 stands for any free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise EUAError(f"The server cannot listen on {host} port {port} ({error}): pass another --host or --port.") from error


class DrainingServer(uvicorn.Server):
    """uvicorn's server, with limits for connections, that finishes accepted requests before it exits.

    A first signal rejects new requests (503) and lets accepted ones finish for ``grace`` seconds; a second ends that.

    Args:
        app: the application.
        engine: what the application answers with.
        grace: seconds after a first signal.
        timeout: seconds until an answer must be complete.
        read_timeout: seconds in which the headers of a request must arrive, and then its body.
        max_connections: number of open connections. A new one takes the place of the one that has waited longest for a request,
            so unfinished requests never keep others out.
    """

    def __init__(
        self, app: ASGIApp, engine: Engine, *, grace: float, timeout: float, read_timeout: float, max_connections: int
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        logging.getLogger("uvicorn.access").addFilter(_shorten_path)
        self.engine, self.grace, self.max_connections = engine, grace, max_connections
        self.idle_seconds = KEEP_ALIVE_SECONDS + read_timeout
        self.busy_seconds = self.idle_seconds + read_timeout + timeout + FLUSH_SECONDS
        self.leave_at: float | None = None
        self._accepting: list[asyncio.Task[None]] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.leave_at = time.monotonic() + (0 if self.engine.draining else self.grace)
        self.engine.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start without uvicorn's listeners, which accept any number of connections and log every one they have no file for."""
        await super().startup(sockets=[])
        self._accepting = [asyncio.create_task(self._accept(listening)) for listening in sockets or ()]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._accepting:
            task.cancel()
        await super().shutdown(sockets=sockets)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        for task in self._accepting:
            if task.done():
                task.result()  # a server that accepts nothing any more must not look alive
        self._close_overdue()
        if self.leave_at is not None:
            idle = not (self.engine.waiting or self.engine.running)
            if idle or time.monotonic() >= self.leave_at:
                self.engine.abort()
                self.should_exit = True
        return await super().on_tick(counter)

    def _close_overdue(self) -> None:
        """Close connections that have waited too long for headers, or whose client does not read its answer."""
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            if now - connection.since > (self.idle_seconds if connection.is_idle else self.busy_seconds):
                connection.close()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        while True:
            try:
                client, _ = await loop.sock_accept(listening)
            except ConnectionError:  # the client has left
                continue
            except OSError as error:  # no more file descriptors, or no memory
                self._accept_fewer(error)
                await asyncio.sleep(RETRY_SECONDS)
                await self._make_room()
                continue
            await self._make_room()
            try:
                await loop.connect_accepted_socket(self._connection, client)
            except OSError:  # the client has left
                client.close()

    def _connection(self) -> Connection:
        return Connection(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def _accept_fewer(self, error: OSError) -> None:
        fewer = max(1, len(self.server_state.connections) - SPARE_FILES)
        if fewer < self.max_connections:
            self.max_connections = fewer
            logger.warning(
                "The system allows no more open files or sockets (%s): from now on at most %d connections are open at a time. "
                "Raise its limit, e.g. with `ulimit -n`.",
                error.strerror,
                fewer,
            )

    async def _make_room(self) -> None:
        """Wait until another connection may be open."""
        while len(self.server_state.connections) >= self.max_connections:
            receiving = [connection for connection in self.server_state.connections if connection.is_receiving]
            if receiving:
                min(receiving, key=lambda connection: connection.since).close()
            await asyncio.sleep(0 if receiving else RETRY_SECONDS)


def _shorten_path(record: logging.LogRecord) -> bool:
    """A filter of the access log: paths without queries, which may hold what a client calls secret, and of bounded length."""
    if isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, path, *rest = record.args
        record.args = (client, method, str(path).partition("?")[0][:LOGGED_PATH], *rest)
    return True
