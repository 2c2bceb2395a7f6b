"""Tests that no client keeps others from their answers: oversized prompts, clients that leave, unfinished requests."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import psutil
import pytest
from starlette.requests import ClientDisconnect, Request

from eua.serving.app import unless_gone
from eua.serving.engine import Engine
from eua.serving.protocol import RequestError
from tests.conftest import tiny_llama
from tests.serving.servers import JSON, answered, ask, chat, get, port_of, process_of, send, serving, wait_until

HEADERS = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def connect(port: int, sent: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(sent)
    return client


def is_closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.fixture
def slow_to_encode(model, tokenizer, monkeypatch):
    """A server of which every prompt that holds "slow" waits for the event ``go``, and the prompts it has begun to encode."""
    engine, go, begun = Engine(model, tokenizer, None, queue=4), threading.Event(), []
    encode = engine.encode

    def waiting(messages, max_tokens):
        begun.append(messages[0]["content"])
        if "slow" in begun[-1]:
            go.wait(20)
        return encode([{"role": "user", "content": messages[0]["content"][:10]}], max_tokens)

    monkeypatch.setattr(engine, "encode", waiting)
    with serving(engine) as server:
        server.go, server.begun = go, begun
        yield server
        go.set()


def test_prompts_that_are_being_encoded_count_in_the_queue_and_do_not_delay_short_ones(slow_to_encode):
    server = slow_to_encode
    long = chat("slow" * 10_000, max_tokens=2)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(ask, server.port, long) for _ in range(3)]
        wait_until(lambda: server.engine.waiting == 3)
        assert answered(server.port, chat("Who?", max_tokens=2))[1] == "length"
        server.go.set()
        assert [status.result()[0] for status in waiting] == [200] * 3
    assert server.engine.waiting == 0


def test_a_queue_full_of_prompts_that_are_being_encoded_rejects_others(slow_to_encode):
    server = slow_to_encode
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(ask, server.port, chat("slow" * 10_000, max_tokens=2)) for _ in range(4)]
        wait_until(lambda: server.engine.waiting == 4)
        assert ask(server.port, chat("Who?"))[0] == 429
        server.go.set()
        assert [status.result()[0] for status in waiting] == [200] * 4


def test_the_prompt_of_a_client_that_has_left_is_not_encoded(slow_to_encode):
    server = slow_to_encode
    clients = []
    for name in "ABC":
        client = http.client.HTTPConnection("127.0.0.1", server.port)
        client.request("POST", "/v1/chat/completions", json.dumps(chat(name + "slow" * 10_000)), JSON)
        clients.append(client)
    wait_until(lambda: server.engine.waiting == 3)
    for client in clients:
        client.close()
    wait_until(lambda: server.engine.waiting == 0, 2)
    server.go.set()
    assert answered(server.port, chat("x" * 20_000, max_tokens=2))[1] == "length"
    assert len(server.begun) == 2  # the first one had begun; the last one comes after all others in line
    assert "eua_cancelled_total 3.0" in get(server.port, "/metrics")[1]


def test_work_that_fails_as_its_client_leaves_is_not_logged():
    """asyncio logs the traceback of an exception that nobody has looked at."""
    logged = []

    async def failing() -> None:
        try:
            await asyncio.sleep(9)
        except asyncio.CancelledError:
            raise RequestError("The prompt is too long.") from None

    async def disconnect() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
        with pytest.raises(ClientDisconnect):
            await unless_gone(Request({"type": "http"}, disconnect), failing())
        gc.collect()

    asyncio.run(leave())
    assert not logged


def test_unfinished_requests_and_idle_connections_are_closed(model, tokenizer):
    with serving(Engine(model, tokenizer, None), timeout=30, read_timeout=0.5) as server:
        server.server.idle_seconds = 0.5
        unfinished = [
            b"",
            b"GET /health HT",
            HEADERS,
            HEADERS + b"X-Long: " + b"x" * 9000,
            b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET",
        ]
        clients = [connect(server.port, sent) for sent in unfinished]
        body = connect(server.port, HEADERS + b"Content-Length: 100\r\n\r\n{")
        assert body.recv(100).startswith(b"HTTP/1.1 408")
        clients[-1].recv(10_000)
        drip = connect(server.port, HEADERS)
        start = time.monotonic()
        while not is_closed(drip):
            assert time.monotonic() - start < 5
            drip.setblocking(True)
            try:
                drip.sendall(b"X: y\r\n")
            except ConnectionError:
                break
            time.sleep(0.1)
        wait_until(lambda: all(map(is_closed, clients)), 3)
        wait_until(lambda: not server.server.server_state.connections, 3)
        assert get(server.port, "/health")[0] == 200


def test_a_client_that_does_not_read_its_answer_is_dropped(endless, tokenizer, monkeypatch):
    with serving(Engine(endless, tokenizer, None, max_tokens=8000), timeout=60) as server:
        server.server.busy_seconds = 1
        client = connect(server.port, b"")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps(chat("Who?", stream=True, max_tokens=8000)).encode()
        client.sendall(HEADERS + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.engine.running == 1)
        wait_until(lambda: server.engine.running == 0, 5)
        assert not server.server.server_state.connections


def test_a_full_server_closes_what_has_waited_longest_for_a_request(endless, tokenizer):
    with ExitStack() as stack:
        server = stack.enter_context(serving(Engine(endless, tokenizer, None, max_tokens=4000), max_connections=4))
        busy = stack.enter_context(send(server.port, chat("Who?", stream=True)))
        unfinished = [stack.enter_context(connect(server.port, HEADERS)) for _ in range(3)]
        wait_until(lambda: len(server.server.server_state.connections) == 4)
        assert get(server.port, "/health")[0] == 200
        wait_until(lambda: is_closed(unfinished[0]), 2)
        assert not any(map(is_closed, unfinished[1:]))
        for _ in range(50):
            stack.enter_context(connect(server.port, HEADERS + b"Content-Length: 99\r\n\r\n{"))
        assert get(server.port, "/health")[0] == 200
        assert len(server.server.server_state.connections) <= 4
        assert busy.readline().startswith(b"data: ")
        busy.hang_up()


@pytest.mark.skipif(sys.platform != "linux", reason="needs the limit of another process")
def test_a_process_with_few_file_descriptors_survives_many_connections(tokenizer, tmp_path):
    """300 connections of which each keeps a file descriptor, where the system allows 128."""
    folder = tmp_path / "model"
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with process_of(folder, "--no-guard", "--read-timeout", "30") as process, ExitStack() as stack:
        port = port_of(process)
        psutil.Process(process.pid).rlimit(psutil.RLIMIT_NOFILE, (128, 128))
        for _ in range(300):
            stack.enter_context(connect(port, HEADERS))
        for _ in range(5):
            start = time.monotonic()
            assert answered(port, chat("Who?", max_tokens=2))[1] == "length"
            assert time.monotonic() - start < 5
        busy = psutil.Process(process.pid).cpu_percent(1.0)
        process.terminate()
        assert process.wait(20) == 0
        log = process.stdout.read()
    assert "The system allows no more open files" in log
    assert len(log.splitlines()) < 60
    assert busy < 50
