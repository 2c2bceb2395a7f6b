"""Tests that ordinary questions are answered in time while others send whatever they like, and that memory stays flat."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import random
import socket
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.conftest import tiny_llama
from tests.serving.servers import JSON, ask, chat, get, port_of, process_of, send, streamed, wait_until

QUESTION = chat("Where was Ann born, and who is she?", max_tokens=64)
HEADERS = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
OVERSIZED = [json.dumps(chat(content)).encode() for content in ("why " * 225_000, "n" * 900_000, "❄" * 290_000)]
MALFORMED = [b"", b"{", b"[1]", b"[" * 20_000, b"\xff", b'{"messages": 1}', b'{"messages": [], "seed": ' + b"9" * 5000 + b"}"]


class Clients:
    """Requests of all kinds but ordinary questions."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.random = port, random.Random(seed)
        self.unfinished: list[socket.socket] = []
        self.kinds = [self.short, self.stream, self.oversize, self.leave, self.malformed, self.slow_header]

    def send(self, requests: int) -> Counter[str]:
        """The number of requests of each kind."""
        with ThreadPoolExecutor(4) as pool:
            counts = Counter(pool.map(self._one, range(requests)))
        for client in self.unfinished:
            client.close()
        return counts

    def _one(self, _: int) -> str:
        kind = self.random.choice(self.kinds)
        kind()
        time.sleep(self.random.random() * 0.2)
        return kind.__name__

    def short(self) -> None:
        assert ask(self.port, chat("Who?", max_tokens=4))[0] == 200

    def stream(self) -> None:
        assert streamed(self.port, chat("Who is Ann?", max_tokens=4))[1] == "length"

    def oversize(self) -> None:
        body = self.random.choice(OVERSIZED)
        assert ask(self.port, body)[0] == (400 if len(body) < 2**20 else 413)

    def leave(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        body = json.dumps(chat("Who?", max_tokens=64, stream=self.random.random() < 0.5)).encode()
        connection.request("POST", "/v1/chat/completions", self.random.choice([body, OVERSIZED[1]]), JSON)
        time.sleep(self.random.random() * 0.02)
        connection.close()

    def malformed(self) -> None:
        status, content = ask(self.port, self.random.choice(MALFORMED))
        assert (status, content["error"]["type"]) == (400, "invalid_request_error")
        with send(self.port, None, "GET", "/" + "x" * self.random.randrange(3000)) as response:
            assert response.status == 404
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as client:
            client.sendall(self.random.randbytes(50) + b"\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 400")

    def slow_header(self) -> None:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        client.sendall(self.random.choice([HEADERS, HEADERS + b"Content-Length: 99\r\n\r\n{"]))
        self.unfinished.append(client)


def asked(port: int) -> float:
    """The seconds until an ordinary question is answered in full."""
    start = time.monotonic()
    status, content = ask(port, QUESTION)
    assert (status, content["usage"]["completion_tokens"]) == (200, 64)
    return time.monotonic() - start


def send_others(port: int, seed: int, requests: int) -> Counter[str]:
    return Clients(port, seed).send(requests)


def soak(tokenizer, folder: Path, requests: int, rounds: int) -> tuple[list[tuple[list[float], list[float]]], list[int]]:
    """For every round the seconds of ordinary questions alone, and among others; the memory after each of the latter, in bytes.

    Both are measured in every round, since other work on this machine comes and goes. The other clients are a process of low
    priority: they stand for other machines, whose own work takes no time of the server's.
    """
    model = tiny_llama(len(tokenizer))
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    limits = ("--read-timeout", "2", "--max-connections", "100", "--max-tokens", "64")
    spawn, counts = multiprocessing.get_context("spawn"), Counter[str]()
    times, sizes = [], []
    with (
        process_of(folder, "--no-guard", *limits) as process,
        ProcessPoolExecutor(1, mp_context=spawn, initializer=os.nice, initargs=(19,)) as clients,
    ):
        port, output = port_of(process), []
        reader = threading.Thread(target=lambda: output.extend(process.stdout))
        reader.start()
        memory = psutil.Process(process.pid).memory_info
        counts += clients.submit(send_others, port, 0, requests // 4).result()
        for seed in range(1, rounds + 1):
            wait_until(lambda: "eua_requests_running 0.0" in get(port, "/metrics")[1])
            alone, among = [asked(port) for _ in range(20)], []
            others = clients.submit(send_others, port, seed, requests // rounds)
            while not others.done():
                among.append(asked(port))
                sizes.append(memory().rss)
            counts += others.result()
            times.append((alone, among))
        process.terminate()
        assert process.wait(20) == 0
        reader.join()
    print(f"{requests} requests, and those before them to warm up: {dict(counts)}. Log: {len(output)} lines.")
    for alone, among in times:
        print(f"Seconds of {len(among)} questions: alone {quantiles(alone)}, among others {quantiles(among)}")
    print(f"Memory in MiB: {[size // 2**20 for size in sizes[:: max(1, len(sizes) // 10)]]}")
    assert not [line for line in output if "Traceback" in line or "ERROR" in line]
    assert len(output) < 5 * requests
    return times, sizes


def quantiles(seconds: list[float]) -> str:
    values = sorted(seconds)
    return ", ".join(f"{share:.0%}: {values[int(share * (len(values) - 1))]:.3f}" for share in (0.5, 0.95, 1))


def test_ordinary_questions_are_answered_in_time_among_others(tokenizer, tmp_path):
    [(alone, among)], sizes = soak(tokenizer, tmp_path, 150, rounds=1)
    assert statistics.median(among) < 2 * statistics.median(alone)
    assert sizes[-1] < 1.1 * sizes[0]


@pytest.mark.soak
def test_ordinary_questions_are_answered_in_time_among_two_thousand_others(tokenizer, tmp_path):
    times, sizes = soak(tokenizer, tmp_path, 2000, rounds=5)
    # Other work on this machine only ever adds time, so the rounds that it disturbed least count.
    twice = 2 * min(statistics.median(alone) for alone, among in times)
    slow = [statistics.quantiles(among, n=20)[-1] for alone, among in times]
    assert min(slow) < twice, slow
    assert statistics.median(slow) < 1.5 * twice, slow
    assert statistics.median(statistics.median(among) for alone, among in times) < twice
    quarter = len(sizes) // 4
    assert statistics.median(sizes[-quarter:]) < 1.05 * statistics.median(sizes[:quarter])
