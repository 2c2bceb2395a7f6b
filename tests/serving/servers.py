"""Servers in a thread or in a process of their own, and clients that ask them."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eua.serving.app import create_app
from eua.serving.engine import Engine
from eua.serving.server import DrainingServer

ROOT = Path(__file__).parents[2]
JSON = {"Content-Type": "application/json"}


@contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[SimpleNamespace]:
    """Serve the app of an engine on a free port."""
    listening = socket.create_server(("127.0.0.1", 0))
    limits = {"timeout": settings.pop("timeout", 120), "read_timeout": settings.pop("read_timeout", 15)}
    connections = settings.pop("max_connections", 512)
    app = create_app(engine, "ann-7b", **limits, **settings)
    server = DrainingServer(app, engine, grace=30, **limits, max_connections=connections)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield SimpleNamespace(port=listening.getsockname()[1], engine=engine, server=server)
    finally:
        engine.abort()
        server.should_exit = True
        thread.join()
        engine.close()
        listening.close()


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.005)


def chat(question: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], **fields}


def send(
    port: int,
    body: Any,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    headers: dict[str, str] | None = None,
) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, content, JSON if headers is None else headers)
    response = connection.getresponse()
    response.hang_up = lambda: (connection.sock and connection.sock.shutdown(socket.SHUT_RDWR), response.close())
    return response


def ask(port: int, body: Any) -> tuple[int, dict[str, Any]]:
    with send(port, body) as response:
        return response.status, json.loads(response.read())


def get(port: int, path: str) -> tuple[int, str]:
    with send(port, None, "GET", path) as response:
        return response.status, response.read().decode()


def answered(port: int, body: dict[str, Any]) -> tuple[str, str]:
    """Text and finish reason of an answer."""
    status, content = ask(port, body)
    assert status == 200, content
    choice = content["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def events_of(response: http.client.HTTPResponse) -> Iterator[dict[str, Any] | str]:
    for line in response:
        if line.strip():
            data = line.decode().removeprefix("data: ").strip()
            yield data if data == "[DONE]" else json.loads(data)


def streamed(port: int, body: dict[str, Any]) -> tuple[str, str]:
    """Like :func:`answered`, from the chunks of a stream."""
    with send(port, body | {"stream": True}) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, end = events_of(response)
    assert end == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    *reasons, reason = [choice["finish_reason"] for choice in choices]
    assert not any(reasons)
    return "".join(choice["delta"].get("content", "") for choice in choices), reason


@contextmanager
def process_of(folder: Path, *more: str) -> Iterator[subprocess.Popen]:
    """``eua serve`` in a separate process."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "eua", "serve", "--model", str(folder), "--port", "0", *more]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def port_of(process: subprocess.Popen) -> int:
    """The port it listens on; waits until it does."""
    line = next(line for line in process.stdout if line.startswith("Serving "))
    assert "guard off" in line
    return int(line.split("/v1")[0].rsplit(":", 1)[1])
