"""The server behind `eua serve`: load, listen, answer; on SIGTERM, finish accepted requests and exit."""

from __future__ import annotations

import argparse
import socket
import time
from pathlib import Path
from types import FrameType

import uvicorn

from eua.errors import EUAError
from eua.guard.guard import EnergyGuard
from eua.model.loading import load_model
from eua.serving.app import create_app
from eua.serving.engine import Engine

FLUSH_SECONDS = 5  # in which complete or aborted answers can still reach their clients


def run_serve(arguments: argparse.Namespace) -> None:
    """Run the parsed command until a signal ends it."""
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
        name = arguments.name or Path(arguments.model).resolve().name
        app = create_app(engine, name, timeout=arguments.timeout, max_body_bytes=arguments.max_body_bytes)
        with _listen(arguments.host, arguments.port) as listening:
            host, port = listening.getsockname()[:2]
            print(f"Serving {name} on http://{host}:{port}/v1, guard {'off' if guard is None else 'on'}.", flush=True)
            config = uvicorn.Config(app, timeout_graceful_shutdown=FLUSH_SECONDS, lifespan="off")
            DrainingServer(config, engine, arguments.grace).run(sockets=[listening])
    finally:
        engine.close()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 stands for any free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise EUAError(f"The server cannot listen on {host} port {port} ({error}): pass another --host or --port.") from error


class DrainingServer(uvicorn.Server):
    """A first signal rejects new requests (503) and lets accepted ones finish for ``grace`` seconds; a second ends that."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float) -> None:
        super().__init__(config)
        self.engine, self.grace = engine, grace
        self.leave_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.leave_at = time.monotonic() + (0 if self.engine.draining else self.grace)
        self.engine.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self.leave_at is not None:
            idle = not (self.engine.waiting or self.engine.running)
            if idle or time.monotonic() >= self.leave_at:
                self.engine.abort()
                self.should_exit = True
        return await super().on_tick(counter)
