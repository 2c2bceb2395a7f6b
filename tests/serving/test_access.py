"""Tests of who may use the server: hosts, origins, content types and the key."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from starlette.requests import Request

from eua import EUAError
from eua.cli.main import main
from eua.serving.access import LOOPBACK_HOSTS, Access, check_key, is_loopback
from eua.serving.engine import Engine
from eua.serving.protocol import RequestError
from eua.serving.server import access_for
from tests.conftest import tiny_llama
from tests.serving.servers import JSON, ROOT, chat, get, port_of, process_of, send, serving

LOCAL = Access(["localhost", "127.0.0.1", "::1", "my-box"], ["my-box"])
SECRET = "sk-Gk3w9Zq-only-for-this-test"


def request(path: str = "/v1/models", **headers: str) -> Request:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": raw})


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "LOCALHOST:80", "[::1]:8000", "[::1]", "my-box:8000", "localhost."]
)
def test_a_local_server_answers_to_its_own_names(host):
    LOCAL.check(request(host=host))
    LOCAL.check(request(host=host, origin=f"http://{host}"))


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "localhost@evil",
        "[::2]",
        "[",
        "0",
    ],
)
def test_a_name_that_was_bound_to_the_loopback_address_is_refused(host):
    with pytest.raises(RequestError, match="Host header names a host .* --allowed-host") as error:
        LOCAL.check(request(host=host))
    assert error.value.status == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "", "http://localhost:3000", "http://127.0.0.1", "my-box", "file://"]
)
@pytest.mark.parametrize("access", [LOCAL, Access()], ids=["local", "public"])
def test_pages_of_other_origins_are_refused(access, origin):
    with pytest.raises(RequestError, match="web page of another origin") as error:
        access.check(request(host="127.0.0.1:8000", origin=origin))
    assert error.value.status == 403


def test_pages_of_an_allowed_host_may_ask_through_any_name():
    LOCAL.check(request(host="127.0.0.1:8000", origin="https://my-box"))
    Access().check(request(host="any.example", origin="https://any.example"))


@pytest.mark.parametrize(
    "header",
    [
        "",
        SECRET,
        f"Basic {SECRET}",
        "Bearer",
        "Bearer ",
        f"Bearer {SECRET}x",
        f"Bearer {SECRET[:-1]}",
        "Bearer \xff\xfe",
        f"Bearer x{SECRET}",
    ],
)
def test_a_wrong_key_is_refused(header):
    access = Access(key=SECRET)
    with pytest.raises(RequestError, match="no valid API key") as error:
        access.check(request(authorization=header) if header else request())
    assert (error.value.status, error.value.code) == (401, "invalid_api_key")
    assert SECRET not in f"{error.value}{access!r}"


def test_the_right_key_is_accepted_and_health_needs_none():
    access = Access(key=SECRET)
    access.check(request(authorization=f"Bearer {SECRET}"))
    access.check(request(authorization=f"bearer {SECRET}"))
    access.check(request("/health"))
    with pytest.raises(RequestError):  # starlette reads a URL that begins with this header
        access.check(request("/v1/models", host="x/health?"))


@pytest.mark.parametrize("key", ["", " ", "a b", "schlüssel", "a\n"])
def test_a_key_that_nobody_could_send_is_not_accepted(key):
    with pytest.raises(EUAError, match="The API key is empty, or holds spaces .* choose another") as error:
        check_key(key)
    assert not key.strip() or key not in str(error.value)


def test_only_loopback_addresses_are_private():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "10.0.0.1", "fe80::1%eth0")))


def test_a_public_address_without_a_key_is_warned_of(capsys):
    assert access_for("127.0.0.1", [], None).hosts
    assert access_for("0.0.0.0", [], SECRET) == Access(None, [], SECRET)
    assert capsys.readouterr().err == ""
    assert access_for("0.0.0.0", ["Box:8000"], None) == Access([*LOOPBACK_HOSTS, "box"], ["box"])
    assert (
        "Warning: whoever reaches 0.0.0.0 can use this server, because it has no key: set EUA_API_KEY."
        in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def closed(tokenizer) -> Any:
    engine = Engine(tiny_llama(len(tokenizer)), tokenizer, None)
    with serving(engine, access=Access(LOCAL.hosts, LOCAL.trusted, SECRET)) as server:
        yield server


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Content-Type": "application/JSON; charset=utf-8"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Host": "evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Authorization": "Bearer wrong"}, 401),
    ],
    ids=str,
)
def test_requests_without_access_get_no_answer(closed, headers, status):
    sent = JSON | {"Authorization": f"Bearer {SECRET}"} | headers
    with send(closed.port, chat("Who?", max_tokens=2), headers=sent) as response:
        content = json.loads(response.read())
    assert response.status == status
    if status != 200:
        assert content["error"]["type"] == "invalid_request_error"
        assert set(content["error"]) == {"message", "type", "param", "code"}
    if status in (401, 403):
        for path in ("/v1/models", "/metrics", "/none"):
            with send(closed.port, None, "GET", path, sent) as response:
                assert response.status == status


def test_the_request_in_the_documentation_is_answered(closed):
    page = (ROOT / "docs" / "serving.md").read_text()
    command = page[page.index("curl http://127.0.0.1:8000/v1/chat/completions") :].split("\n```")[0]
    parts = shlex.split(command.replace("\\\n", " "))
    headers = dict(parts[place + 1].split(": ") for place, part in enumerate(parts) if part == "-H")
    body = parts[parts.index("-d") + 1].encode()
    with send(closed.port, body, headers=headers | {"Authorization": f"Bearer {SECRET}"}) as response:
        assert response.status == 200


def test_the_key_comes_from_the_environment_and_is_never_written(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setenv("EUA_API_KEY", SECRET)
    with process_of(folder, "--no-guard") as process:
        port = port_of(process)
        assert get(port, "/health")[0] == 200
        assert get(port, "/v1/models")[0] == 401
        with send(port, None, "GET", f"/v1/models?key={SECRET}", {"Authorization": f"Bearer {SECRET}"}) as response:
            assert response.status == 200
        with send(port, None, "GET", f"/{'x' * 5000}", {"Authorization": f"Bearer {SECRET}"}) as response:
            assert response.status == 404
        process.terminate()
        assert process.wait(20) == 0
        log = process.stdout.read()
    assert '"GET /v1/models HTTP/1.1" 200' in log
    assert SECRET not in log
    assert max(map(len, log.splitlines())) < 400
    assert not [path for path in folder.rglob("*") if SECRET.encode() in path.read_bytes()]


def test_an_empty_key_does_not_open_the_server(monkeypatch, capsys):
    monkeypatch.setenv("EUA_API_KEY", "")
    assert main(["serve", "--model", "none", "--no-guard"]) == 2
    assert "The API key is empty" in capsys.readouterr().err
