"""Tests with malformed requests of all kinds: an error in OpenAI's format, never a failure of the server."""

from __future__ import annotations

import http.client
import json
import logging
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eua.serving.engine import Engine
from eua.serving.protocol import UNSUPPORTED_FIELDS
from tests.conftest import tiny_llama
from tests.serving.servers import answered, ask, chat, serving

bounded = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
FIELDS = ["messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream"]
FIELDS += ["stream_options", "user", *UNSUPPORTED_FIELDS]
ODD_TEXTS = ["user", "system", "assistant", "text", "ann-7b", "\ud800", "\x00", "{{ 7*7 }}", "<eos>"]
ODD_NUMBERS = [0, 1, -1, 2**63, 2**64, 10**400, 1e308, True, False]
KEYS = st.sampled_from(["role", "content", "type", "text", "x"])
VALUES = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([*ODD_NUMBERS, *ODD_TEXTS]),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS, part, max_size=4),
    max_leaves=6,
)
WORDS = """
    : / ? # % %00 .. * http://x/ [ é \x00 -1 0 5 bytes=0-1 /v1/chat/completions /v1/models HTTP/1.1 HTTP/9.9 GET POST PUT
    OPTIONS CONNECT TRACE Content-Length Transfer-Encoding Host Expect 100-continue Upgrade websocket h2c Connection close
    keep-alive chunked identity Content-Type application/json Range Authorization Bearer
"""
TOKENS = st.sampled_from([*WORDS.split(), "", " ", "\r\n", "9" * 30, "x" * 9000])
TARGETS = st.lists(TOKENS, max_size=4).map("".join) | st.text(max_size=12).map(lambda text: f"/{text}")
HEADERS = st.lists(st.tuples(TOKENS | st.text(max_size=5), st.lists(TOKENS, max_size=2).map(" ".join)), max_size=4)


@pytest.fixture(scope="module")
def watched(tokenizer) -> Iterator[SimpleNamespace]:
    """A server that answers with few tokens, and every error that it logs."""
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(logging.Formatter().format(record))
    engine = Engine(tiny_llama(len(tokenizer)), tokenizer, None, max_tokens=3)
    with serving(engine, read_timeout=0.2, max_body_bytes=50_000) as server:
        server.server.idle_seconds = 0.2
        loggers = [logging.getLogger(name) for name in ("", "uvicorn")]
        for logger in loggers:
            logger.addHandler(handler)
        server.errors = errors
        yield server
        for logger in loggers:
            logger.removeHandler(handler)


def check_error(status: int, content: Any) -> None:
    assert 400 <= status < 500
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["message"].endswith((".", "}"))
    assert content["error"]["type"] in ("invalid_request_error", "rate_limit_error")


def check_body(server: SimpleNamespace, body: Any) -> None:
    status, content = ask(server.port, body)
    if status != 200:
        check_error(status, content)
    assert not server.errors


@bounded
@given(fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_any_value_of_any_field(watched, fields):
    check_body(watched, chat("Who?") | fields | ({"stream": False} if fields.get("stream") is True else {}))


@bounded
@given(message=st.dictionaries(st.sampled_from(["role", "content", "name"]), VALUES, max_size=3), place=st.integers(0, 1))
def test_any_message(watched, message, place):
    messages = chat("Who?")["messages"]
    check_body(watched, {"messages": messages[:place] + [message] + messages[: 1 - place]})


@bounded
@given(body=VALUES.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60), cut=st.integers(0, 60))
def test_any_body(watched, body, cut):
    whole = json.dumps(chat("Who?", max_tokens=1)).encode()
    for content in (body, whole[:cut] + body, whole[:cut] + body + whole[cut:]):
        check_body(watched, content)


@bounded
@given(method=TOKENS, target=TARGETS, version=TOKENS, headers=HEADERS, body=st.binary(max_size=20))
def test_any_request_line_and_headers(watched, method, target, version, headers, body):
    fields = ["Host: 127.0.0.1", "Content-Type: application/json", *(f"{name}: {value}" for name, value in headers)]
    lines = (f"{method} {target} {version}", f"{method} {target} HTTP/1.1", f"GET {target} HTTP/1.1")
    for line in (*lines, "POST /v1/chat/completions HTTP/1.1"):
        raw = "\r\n".join([line, *fields, "", ""]).encode(errors="replace") + body
        with socket.create_connection(("127.0.0.1", watched.port), timeout=10) as client:
            client.sendall(raw)
            response = http.client.HTTPResponse(client, method=line.split(" ")[0])
            try:
                response.begin()
            except (http.client.RemoteDisconnected, ConnectionError):
                continue  # the request was not complete in time
            content = response.read()
        if response.status >= 300 and response.length != 0 and content:
            check_error(response.status, json.loads(content))
        else:
            assert response.status < 500
    assert not watched.errors


def test_garbage_behind_the_answer_to_an_unread_body(watched):
    with socket.create_connection(("127.0.0.1", watched.port), timeout=10) as client:
        client.sendall(b"POST /none HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        response = http.client.HTTPResponse(client)
        response.begin()
        check_error(response.status, json.loads(response.read()))
        client.sendall(b"no chunk\r\n")
        while client.recv(1000):
            pass
    assert not watched.errors


def test_the_server_still_answers(watched):
    assert answered(watched.port, chat("Who?", max_tokens=2))[1] == "length"
