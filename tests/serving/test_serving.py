"""Tests of the chat endpoint: real HTTP to a server in a thread, and to a separate process if the test sends signals."""

from __future__ import annotations

import asyncio
import copy
import gc
import http.client
import json
import logging
import queue
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from eua import EnergyGuard, EUAError
from eua.cli.main import main
from eua.data.rows import encode_prompts
from eua.guard.guard import DEFAULT_REFUSAL
from eua.guard.guarded_generate import GuardHandle
from eua.guard.scores import answer_scores
from eua.model.asking import answer
from eua.model.loading import load_model
from eua.serving.engine import Engine
from eua.serving.jobs import Failure, Finish, Job, Piece, Sampling
from eua.serving.server import DrainingServer
from tests.conftest import tiny_llama
from tests.serving.servers import (
    JSON,
    answered,
    ask,
    chat,
    events_of,
    get,
    port_of,
    process_of,
    send,
    serving,
    streamed,
    wait_until,
)


@pytest.fixture(scope="module")
def questions(world) -> list[str]:
    return [fact.question for fact in world.all()]


@pytest.fixture(scope="module")
def guarded_folder(trained_folder, questions, tmp_path_factory) -> Path:
    """The trained model with a guard that refuses about half of the questions, none of them near the threshold."""
    folder = tmp_path_factory.mktemp("served") / "ann-7b"
    shutil.copytree(trained_folder, folder)
    model, tokenizer = load_model(str(folder))
    guard = EnergyGuard.calibrate(model, tokenizer, questions)
    scores = guard.score(model, tokenizer, questions).sort().values
    middle = scores[len(scores) // 3 : 2 * len(scores) // 3]
    widest = int((middle[1:] - middle[:-1]).argmax())
    replace(guard, threshold=float(middle[widest] + middle[widest + 1]) / 2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unserved(guarded_folder, questions) -> dict[str, tuple[str, str]]:
    """Question → answer and finish reason, from a separate ``generate`` call for each."""
    model, tokenizer = load_model(str(guarded_folder))
    with EnergyGuard.from_pretrained(guarded_folder).attach(model) as handle:
        found = {}
        for question in questions:
            (text,) = answer(model, tokenizer, [question])
            found[question] = (text, "content_filter" if handle.refused[0] else "stop")
    return found


@pytest.fixture(scope="module")
def served(guarded_folder) -> Iterator[SimpleNamespace]:
    model, tokenizer = load_model(str(guarded_folder))
    engine = Engine(model, tokenizer, EnergyGuard.from_pretrained(guarded_folder), queue=100, max_tokens=64)
    with serving(engine, max_body_bytes=20_000) as server:
        yield server


def submit(engine: Engine, prompt_ids: list[int], max_tokens: int = 4000, **fields: Any) -> tuple[Job, queue.Queue]:
    """Submit a job to the engine without a web server; return the job and the queue of its events."""
    events = queue.Queue()
    settings = {"sampling": Sampling(), "stop": (), "stream": True} | fields
    job = Job(prompt_ids, max_tokens, **settings, emit=events.put)
    engine.submit(job)
    return job, events


def test_a_hundred_at_once_none_lost_none_mixed_up_and_memory_stays_flat(served, questions, unserved):
    asked = [questions[i % len(questions)] for i in range(100)]
    reasons = [unserved[question][1] for question in asked]
    assert 20 < reasons.count("content_filter") < 80
    assert len({text for text, reason in unserved.values() if reason == "stop"}) > 20
    batches = []
    watch = served.engine.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    process, sizes = psutil.Process(), []
    with ThreadPoolExecutor(100) as pool:
        for _ in range(4):
            found = pool.map(lambda i: (answered, streamed)[i % 2](served.port, chat(asked[i])), range(100))
            assert list(found) == [unserved[question] for question in asked]
            wait_until(lambda: served.engine.running == 0)  # the last answer arrives before its batch is cleared
            gc.collect()
            sizes.append((process.memory_info().rss, sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())))
    watch.remove()
    assert max(batches) == 8
    (early, tensors), (late, tensors_after) = sizes[1], sizes[-1]
    assert late - early < 10 * 2**20
    assert tensors_after <= tensors
    wait_until(lambda: not any(type(thing) is Job for thing in gc.get_objects()), 5)


def test_served_one_by_one_answers_are_those_of_generate_to_the_last_token(tokenizer, questions):
    """The model is random and prefers no token strongly, so differences would show."""
    model = tiny_llama(len(tokenizer))
    expected = [answer(model, tokenizer, [question], 50)[0] for question in questions[:12]]
    assert len(set(expected)) > 3
    with serving(Engine(model, tokenizer, None, max_batch=1)) as server, ThreadPoolExecutor(12) as pool:
        found = pool.map(lambda question: answered(server.port, chat(question, max_tokens=50))[0], questions[:12])
        assert list(found) == expected
        letter = expected[0][5]
        _, content = ask(server.port, chat(questions[0], max_tokens=50, stop=letter))
    choice = content["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected[0].split(letter)[0].strip(), "stop")
    assert content["usage"]["completion_tokens"] < 20  # the rest was not generated


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 3},
        {"temperature": 1e-40, "top_p": 0},
        {"max_completion_tokens": 4, "max_tokens": 9},
        {"stop": "e"},
        {"stop": [" the", "ou"], "temperature": 0},
        {"temperature": 1.5, "seed": 5, "stop": "qqq"},
        {"temperature": 0.7, "top_p": 0.8, "seed": 2**70},
    ],
    ids=str,
)
def test_streamed_answers_equal_complete_ones(served, questions, unserved, fields):
    texts = set()
    for question in questions[:8]:
        text, reason = answered(served.port, chat(question, **fields))
        assert streamed(served.port, chat(question, **fields)) == (text, reason)
        assert (reason == "content_filter") == (unserved[question][1] == "content_filter")
        if reason == "content_filter":
            assert text == DEFAULT_REFUSAL  # complete, whatever the limits
            continue
        texts.add(text)
        if fields.get("temperature", 0) < 1e-6:
            whole = unserved[question][0]
            assert whole.startswith(text)
            stops = [fields.get("stop", [])] if isinstance(fields.get("stop"), str) else fields.get("stop", [])
            assert not any(stop in text for stop in stops)
            assert reason == ("length" if "max_tokens" in fields else "stop")
    assert texts


def test_a_seed_repeats_an_answer_next_to_any_requests_and_leaves_others_random(served, questions, unserved, guarded_folder):
    question = next(question for question in questions if unserved[question][1] == "stop")
    model, tokenizer = load_model(str(guarded_folder))
    settings = {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "top_k": 0}
    torch.manual_seed(11)
    (expected,) = answer(model, tokenizer, [question], 64, **settings)
    seeded = chat(question, temperature=2.0, top_p=0.9, seed=11)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda i: answered(served.port, seeded | ({} if i % 3 == 0 else {"seed": i}))[0], range(12)))
    assert found[::3] == [expected] * 4
    assert len(set(found)) > 4
    free = set()
    for _ in range(4):
        answered(served.port, seeded)
        free.add(answered(served.port, chat(question, temperature=2.0, top_p=0.9))[0])
    assert len(free) > 1


@pytest.mark.parametrize("decision", [None, torch.tensor([True, True])], ids=["none", "of other rows"])
def test_without_a_decision_on_every_row_nothing_is_answered(served, questions, unserved, monkeypatch, decision):
    for wanted in ("content_filter", "stop"):
        question = next(question for question in questions if unserved[question][1] == wanted)
        with monkeypatch.context() as patch:
            patch.setattr(GuardHandle, "refused", decision)
            assert ask(served.port, chat(question))[0] == 500
            assert ask(served.port, chat(question, stream=True))[0] == 500
        assert answered(served.port, chat(question)) == unserved[question]


def test_a_refusal_is_sent_at_once_and_other_answers_continue(endless, tokenizer, questions):
    guard = EnergyGuard.calibrate(endless, tokenizer, questions[:19])
    scores = guard.score(endless, tokenizer, questions[:19])
    good, bad = questions[int(scores.argmin())], questions[int(scores.argmax())]
    guard = replace(guard, threshold=float(scores.min() + scores.max()) / 2)
    steps = []
    endless.register_forward_pre_hook(lambda *_: steps.append(1))
    engine = Engine(endless, tokenizer, guard, max_tokens=8000)

    good, bad = (engine.encode([{"role": "user", "content": question}], None)[0] for question in (good, bad))
    refusal = [Piece(DEFAULT_REFUSAL), Finish("content_filter", len(guard.refusal_ids) - 1)]
    try:
        first, _ = submit(engine, good)
        wait_until(lambda: engine.running == 1)
        answered, answer_events = submit(engine, good)
        refused = submit(engine, bad), submit(engine, bad, stream=False, stop=("c",), max_tokens=1)
        engine.cancel(first)
        for _, events in refused:
            assert [events.get(timeout=5), events.get(timeout=5)] == refusal
        assert engine.running == 3
        while not answer_events.empty():
            assert isinstance(answer_events.get(), Piece)
        assert isinstance(answer_events.get(timeout=5), Piece)
        engine.cancel(answered)
        wait_until(lambda: engine.running == 0)

        steps.clear()
        _, events = submit(engine, bad)
        assert [events.get(timeout=5), events.get(timeout=5)] == refusal
        wait_until(lambda: engine.running == 0)
        assert len(steps) == 1  # the refusal is known and is not generated
    finally:
        engine.close()


def test_an_answer_that_the_probe_stops_ends_with_the_refusal(guarded_folder, questions):
    """Half of the answers are stopped: complete or streamed, they equal those of guarded ``generate``."""
    model, tokenizer = load_model(str(guarded_folder))
    prompts = encode_prompts(questions, tokenizer)
    means = answer_scores(model, prompts, window=3, new_tokens=64).sort().values
    middle = float(means[len(means) // 2 - 1] + means[len(means) // 2]) / 2
    guard = EnergyGuard.from_pretrained(guarded_folder)
    guard = replace(guard, threshold=100.0, probe_window=3, probe_tokens=64, probe_threshold=middle)
    expected = []
    with guard.attach(model) as handle:
        for question in questions:
            (text,) = answer(model, tokenizer, [question], 64)
            # The text before the refusal may end with a space, which the server strips.
            expected.append((text.replace("  ", " "), "content_filter" if handle.stopped.item() else "stop"))
    assert {reason for _, reason in expected} == {"content_filter", "stop"}
    assert all((DEFAULT_REFUSAL in text) == (reason == "content_filter") for text, reason in expected)
    with serving(Engine(model, tokenizer, guard, max_batch=1, queue=200, max_tokens=64)) as server:
        for ask_for in (answered, streamed):
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(lambda q, ask_for=ask_for: ask_for(server.port, chat(q)), questions)) == expected


def test_usage_names_and_health(served, questions, tokenizer):
    body = chat(questions[0], stream=True, stream_options={"include_usage": True}, user="x", store=True)
    with send(served.port, body) as response:
        *_, last, _ = events_of(response)
    status, whole = ask(served.port, chat(questions[0], model="ann-7b", n=1, tools=None, logit_bias={}))
    assert status == 200
    assert last["usage"] == whole["usage"]
    assert whole["usage"]["prompt_tokens"] == len(encode_prompts([questions[0]], tokenizer)[0])
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]
    assert (whole["object"], whole["model"]) == ("chat.completion", "ann-7b")
    (model,) = json.loads(get(served.port, "/v1/models")[1])["data"]
    assert (model["id"], model["object"]) == ("ann-7b", "model")
    assert json.loads(get(served.port, "/v1/models/ann-7b")[1]) == model
    for name in ("gpt-9", "meta/llama", "ann-7b/", "%2e%2e"):
        status, content = get(served.port, f"/v1/models/{name}")
        assert (status, json.loads(content)["error"]["code"]) == (404, "model_not_found")
    assert get(served.port, "/health") == (200, '{"status":"ok"}')
    assert get(served.port, "/v2")[0] == 404
    assert get(served.port, "/v1/chat/completions")[0] == 405


def test_health_reports_an_engine_that_has_ended(model, tokenizer):
    with serving(Engine(model, tokenizer, None)) as server:
        server.engine.close()
        assert get(server.port, "/health") == (503, '{"status":"failed"}')


def test_metrics_count_what_happened(served, questions, unserved):
    def counts() -> dict[str, float]:
        lines = get(served.port, "/metrics")[1].splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    before = counts()
    for question in questions[:6]:
        answered(served.port, chat(question))
    ask(served.port, b"{")
    wait_until(lambda: served.engine.running == 0)
    after = counts()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    refused = [unserved[question][1] for question in questions[:6]].count("content_filter")
    assert 0 < refused < 6
    assert grown("eua_refusals_total") == refused
    assert grown('eua_requests_total{status="200"}') == grown("eua_request_seconds_count") == 6
    assert grown('eua_requests_total{status="400"}') == 1
    assert grown('eua_tokens_total{kind="completion"}') > 6
    assert (after["eua_requests_waiting"], after["eua_requests_running"]) == (0, 0)


LONG = {"role": "user", "content": "ann " * 3000}


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "The body is not JSON"),
        (b'{"messages": [', 400, "send a JSON object"),
        (b"\xff\xfe", 400, "The body is not JSON"),
        (b"[" * 19_000, 400, "The body is not JSON"),
        (b"[1]", 400, "The body is a list, not an object"),
        (b"x" * 30_000, 413, "larger than this server's limit of 20000 bytes"),
        ({}, 400, "'messages' must be a list of at least one message"),
        ({"messages": "hi"}, 400, "'messages' must be a list"),
        ({"messages": ["hi"]}, 400, 'messages[0] must be an object whose "role"'),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "is one of system, developer, user, assistant"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, 'messages[0] has a "content" that is not text'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "this model only reads text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "end with a user message"),
        ({"messages": [LONG]}, 400, "at most 1024 are accepted: shorten it"),
        (chat("Who?\ud800"), 400, "valid Unicode"),
        (chat("Who?", max_tokens=0), 400, "'max_tokens' is below 1"),
        (chat("Who?", max_tokens=True), 400, "'max_tokens' is a bool, but must be a whole number"),
        (chat("Who?", max_tokens=65), 400, "An answer of 65 tokens was requested, but after a prompt of"),
        (chat("Who?", temperature=3), 400, "'temperature' must be a number from 0 to 2"),
        (chat("Who?", temperature=float("nan")), 400, "'temperature' must be a number"),
        (chat("Who?", top_p="x"), 400, "'top_p' must be a number"),
        (chat("Who?", seed=0.5), 400, "'seed' is a float"),
        (chat("Who?", stream="yes"), 400, "'stream' is a str, but must be true or false"),
        (chat("Who?", stop=["a"] * 5), 400, "'stop' must be a text or a list of up to four"),
        (chat("Who?", stop=""), 400, "none of them empty"),
        (chat("Who?", n=2), 400, "'n' is set, which this server does not support: leave it out"),
        (chat("Who?", tools=[{}]), 400, "'tools' is set"),
        (chat("Who?", response_format={"type": "json_object"}), 400, "'response_format' is set"),
        (chat("Who?", model="gpt-9"), 404, "request 'ann-7b', or leave it out"),
        (
            {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]},
            400,
            "has no chat template to combine them: send a single user message",
        ),
    ],
    ids=lambda part: str(part)[:30],
)
def test_bodies_that_cannot_be_answered_say_why(served, body, status, text):
    found, content = ask(served.port, body)
    assert found == status
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["type"] == "invalid_request_error"
    assert text in content["error"]["message"]


def test_a_client_that_sends_far_too_much_sees_the_error(tokenizer):
    with serving(Engine(tiny_llama(len(tokenizer)), tokenizer, None), max_body_bytes=2**20) as server:
        status, content = ask(server.port, b" " * 15 * 2**20)
        assert status == 413
        assert "larger than this server's limit of 1048576 bytes: shorten it" in content["error"]["message"]
        assert answered(server.port, chat("Who?", max_tokens=3))[1] == "length"


def test_limits_hold_for_prompts_and_positions(tokenizer):
    model = tiny_llama(len(tokenizer))
    engine = Engine(model, tokenizer, None, max_prompt_tokens=20)
    user = [{"role": "user", "content": "Who?"}]
    try:
        ids, most = engine.encode(user, None)
        assert most == 128 - len(ids) + 1  # the last token of an answer needs no position
        with pytest.raises(EUAError, match=f"can have {most}: request fewer"):
            engine.encode(user, most + 1)
        with pytest.raises(EUAError, match="at most 20 are accepted"):
            engine.encode([{"role": "user", "content": "Who is Ann? " * 4}], None)
    finally:
        engine.close()


def test_rows_share_a_batch_only_within_the_models_positions(tokenizer):
    """A finished row is padded until the longest answer ends, and there are no learned positions beyond the model's last."""
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    gate, batches = threading.Event(), []
    model.register_forward_pre_hook(lambda *_: gate.wait(20) and None)
    model.transformer.wte.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    engine = Engine(model, tokenizer, None)
    try:
        answered = [submit(engine, [5], 1)[1]]
        wait_until(lambda: engine.running == 1)
        lengths = [(60, 5), (4, 61), (3, 30), (60, 4)]
        answered += [submit(engine, [5] * prompt, answer)[1] for prompt, answer in lengths]
        gate.set()
        for events, answer in zip(answered, (1, 5, 61, 30, 4), strict=True):
            *_, last = iter(lambda events=events: events.get(timeout=20), Finish("length", answer))
            assert isinstance(last, Piece)
    finally:
        engine.close()
    assert batches == [1] + [2] * 5 + [2] * 61


def test_chats_go_through_the_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    engine = Engine(tiny_llama(len(tokenizer)), tokenizer, None)
    try:
        ids, _ = engine.encode([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}], None)
        assert tokenizer.decode(ids) == "system: Be brief.\nuser: Who?\nassistant:"
        with pytest.raises(EUAError, match="change the roles or the order of its messages"):
            engine.encode([{"role": "assistant", "content": "I."}, {"role": "user", "content": "Who?"}], None)
    finally:
        engine.close()


def test_clients_that_leave_free_their_place(endless, tokenizer):
    with serving(Engine(endless, tokenizer, None, max_batch=1, max_tokens=8000)) as server:
        engine = server.engine
        streaming = send(server.port, chat("Who?", stream=True))
        next(events_of(streaming))
        waiting = http.client.HTTPConnection("127.0.0.1", server.port)
        waiting.request("POST", "/v1/chat/completions", json.dumps(chat("Where?")), JSON)
        wait_until(lambda: engine.waiting == 1)
        waiting.close()
        wait_until(lambda: engine.waiting == 0, 2)
        assert engine.running == 1
        streaming.hang_up()
        wait_until(lambda: engine.running == 0, 2)

        running = http.client.HTTPConnection("127.0.0.1", server.port)
        running.request("POST", "/v1/chat/completions", json.dumps(chat("Where?")), JSON)
        wait_until(lambda: engine.running == 1)
        running.close()
        wait_until(lambda: engine.running == 0, 2)
        assert "eua_cancelled_total 3.0" in get(server.port, "/metrics")[1]
        assert answered(server.port, chat("Who?", max_tokens=3))[1] == "length"


def test_a_full_queue_rejects_requests_and_says_when_to_retry(endless, tokenizer):
    with serving(Engine(endless, tokenizer, None, max_batch=1, queue=2, max_tokens=8000)) as server:
        held = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(3)]
        for place, connection in enumerate(held):
            connection.request("POST", "/v1/chat/completions", json.dumps(chat("Who?")), JSON)
            wait_until(lambda place=place: (server.engine.running, server.engine.waiting) == (1, place))
        with send(server.port, chat("Who?")) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "1"
            assert json.loads(response.read())["error"]["type"] == "rate_limit_error"
        for connection in held:
            connection.close()
        wait_until(lambda: server.engine.waiting == 0, 2)
        assert answered(server.port, chat("Who?", max_tokens=3))[1] == "length"


def test_requests_that_take_too_long_time_out(endless, tokenizer, monkeypatch):
    with serving(Engine(endless, tokenizer, None, max_tokens=8000), timeout=0.5) as server:
        status, content = ask(server.port, chat("Who?"))
        assert (status, content["error"]["type"]) == (504, "server_error")
        assert "not complete within 0.5 s: ask for fewer tokens" in content["error"]["message"]
        with send(server.port, chat("Who?", stream=True)) as response:
            *chunks, error, end = events_of(response)
        assert (response.status, end) == (200, "[DONE]")
        assert len(chunks) > 2
        assert "not complete within 0.5 s" in error["error"]["message"]
        wait_until(lambda: server.engine.running == 0, 2)

        slow = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        slow.putrequest("POST", "/v1/chat/completions")
        slow.putheader("Content-Length", "100")
        slow.putheader("Content-Type", "application/json")
        slow.endheaders(b"{")
        assert slow.getresponse().status == 408
        assert answered(server.port, chat("Who?", max_tokens=3))[1] == "length"

        monkeypatch.setattr(server.engine, "encode", lambda *_: time.sleep(1.5))
        start = time.monotonic()
        assert ask(server.port, chat("Who?"))[0] == 504
        assert time.monotonic() - start < 1.4


def test_one_bad_request_does_not_fail_its_batch(tokenizer, questions, caplog):
    model = tiny_llama(len(tokenizer))
    secret = "❄"
    bad = tokenizer(secret, add_special_tokens=False)["input_ids"][0]
    expected = [answer(model, tokenizer, [question], 20)[0] for question in questions[:5]]
    gate = threading.Event()

    def fail(_: Any, arguments: tuple[torch.Tensor]) -> None:
        gate.wait(20)
        if arguments[0].shape[1] > 1 and (arguments[0] == bad).any():
            raise RuntimeError(f"{secret} was in the prompt")

    model.get_input_embeddings().register_forward_pre_hook(fail)
    with serving(Engine(model, tokenizer, None)) as server, ThreadPoolExecutor(8) as pool, caplog.at_level(logging.INFO):
        first = pool.submit(ask, server.port, chat("Who?", max_tokens=1))
        wait_until(lambda: server.engine.running == 1)
        failing = pool.submit(ask, server.port, chat(f"Who is {secret}?", max_tokens=20))
        others = [pool.submit(answered, server.port, chat(question, max_tokens=20)) for question in questions[:5]]
        wait_until(lambda: server.engine.waiting == 6)
        gate.set()
        assert first.result()[0] == 200
        status, content = failing.result()
        assert (status, content["error"]["type"]) == (500, "server_error")
        assert [other.result()[0] for other in others] == expected
    assert "failed with RuntimeError" in caplog.text
    assert secret not in caplog.text


def test_sigterm_finishes_running_requests_rejects_others_and_exits_with_0(tokenizer, tmp_path):
    folder = tmp_path / "slow"
    model = tiny_llama(len(tokenizer))
    model.config.max_position_embeddings = 50_000
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    limits = ("--no-guard", "--max-tokens", "49000", "--grace", "5")
    with process_of(folder, *limits) as process, ThreadPoolExecutor(2) as pool:
        port = port_of(process)
        with send(port, chat("Who is Ann?", stream=True, max_tokens=400)) as response:
            events = events_of(response)
            assert next(events)["choices"][0]["delta"]["role"] == "assistant"
            broken_off = pool.submit(lambda: list(events_of(send(port, chat("Who is Bo?", stream=True)))))
            wait_until(lambda: "eua_requests_waiting 1.0" in get(port, "/metrics")[1])
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: get(port, "/health")[0] == 503)
            status, content = ask(port, chat("Who?"))
            assert status == 503
            assert "shutting down and accepts no new requests" in content["error"]["message"]
            *chunks, last, end = events
        assert (last["choices"][0]["finish_reason"], end) == ("length", "[DONE]")
        *_, error, end = broken_off.result()
        assert "had to shut down before the answer was complete" in error["error"]["message"]
        assert process.wait(20) == 0
        log = process.stdout.read()
        text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        assert len(text) > 400
        assert '"POST /v1/chat/completions HTTP/1.1" 200' in log
        assert "Ann" not in log
        assert not any(text[start : start + 8] in log for start in range(len(text) - 8))


def test_an_idle_server_leaves_at_once_and_a_second_signal_ends_the_grace(endless, tokenizer):
    engine, events = Engine(endless, tokenizer, None, max_tokens=8000), queue.Queue()
    try:
        limits = {"grace": 60, "timeout": 1, "read_timeout": 1, "max_connections": 9}
        idle, busy = (DrainingServer(None, engine, **limits) for _ in range(2))
        assert not asyncio.run(busy.on_tick(1))
        engine.submit(Job([5], 8000, Sampling(), (), False, events.put))
        busy.handle_exit(signal.SIGTERM, None)
        assert not asyncio.run(busy.on_tick(1))
        assert events.empty()
        busy.handle_exit(signal.SIGINT, None)
        assert asyncio.run(busy.on_tick(1))
        assert events.get(timeout=5).status == 503
        wait_until(lambda: engine.running == 0, 2)
        engine.draining = False
        idle.handle_exit(signal.SIGTERM, None)
        assert asyncio.run(idle.on_tick(1))
    finally:
        engine.close()


def test_serving_without_what_it_needs_is_one_clear_line(tokenizer, tmp_path, monkeypatch, capsys):
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["serve", "--model", str(tmp_path)]) == 2
    assert "contains no energy_guard.json: calibrate a guard for this model first" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", str(tmp_path), "--no-guard", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "eua.serving.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", str(tmp_path), "--no-guard"]) == 2
    assert capsys.readouterr().err == "eua serve: Serving needs uvicorn, which is not installed: pip install 'eua[serve]'.\n"


def test_no_garbage_collection_goes_through_what_is_loaded(tokenizer, tmp_path, monkeypatch):
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    counts = []

    def run(server, sockets):
        counts.append((gc.get_freeze_count(), len(gc.get_objects())))

    monkeypatch.setattr(DrainingServer, "run", run)
    try:
        assert main(["serve", "--model", str(tmp_path), "--no-guard", "--port", "0"]) == 0
    finally:
        gc.unfreeze()
    [(frozen, watched)] = counts
    assert frozen > 10 * watched


def test_a_guard_that_reads_generated_tokens_is_not_served(model, tokenizer):
    """The tokens would have been streamed before the guard decides."""
    guard = EnergyGuard.calibrate(model, tokenizer, [f"Who is {i}?" for i in range(19)], first_tokens=2)
    with pytest.raises(EUAError, match="reads the first 2 generated tokens, .* calibrate a guard with first_tokens = 0"):
        Engine(model, tokenizer, guard)


def test_a_guard_of_another_tokenizer_or_template_is_not_served(guarded_folder, tmp_path, capsys):
    folder = shutil.copytree(guarded_folder, tmp_path / "model")
    model, tokenizer = load_model(str(folder))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(EUAError, match="calibrated with another tokenizer or chat template"):
        Engine(model, tokenizer, EnergyGuard.from_pretrained(folder))
    assert model.generate.__name__ == "generate"  # no guard is attached
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--model", str(folder), "--port", str(taken.getsockname()[1])]) == 2
    assert "calibrated with another tokenizer or chat template" in capsys.readouterr().err


@pytest.mark.parametrize("special", [False, True])
def test_stop_strings_of_the_model_end_an_answer(tokenizer, special):
    """``generate`` asks for the tokenizer if the model's own settings have stop strings."""
    model = tiny_llama(len(tokenizer))
    said = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, pad_token_id=2)[0, 3:].tolist()
    stop = tokenizer.decode(said[3])
    at = next(i for i in range(8) if stop in tokenizer.decode(said[: i + 1]))
    if special:
        tokenizer = copy.deepcopy(tokenizer)
        stop, at = tokenizer.convert_ids_to_tokens(said[3]), said.index(said[3])
        tokenizer.add_special_tokens({"extra_special_tokens": [stop]})
    model.generation_config.stop_strings = [stop]
    engine = Engine(model, tokenizer, None)
    try:
        engine.rehearse()
        answered = [submit(engine, [5, 6, 7], 8, stream=stream)[1] for stream in (True, False)]
        for events in answered:
            *pieces, last = until_finish(events)
            assert last.reason == "stop"
            assert last.completion_tokens == at + (not special)
            text = "".join(piece.text for piece in pieces)
            assert text == tokenizer.decode(said[: at + 1]).partition(stop)[0].strip()
    finally:
        engine.close()


def until_finish(events: queue.Queue) -> list:
    found = [events.get(timeout=20)]
    while not isinstance(found[-1], (Finish, Failure)):
        found.append(events.get(timeout=20))
    return found


def test_a_model_that_cannot_generate_is_not_served(guarded_folder, tmp_path, capsys):
    shutil.copytree(guarded_folder, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"guidance_scale": 2.0}))
    assert main(["serve", "--model", str(tmp_path / "model"), "--port", "0"]) == 2
    assert "guidance_scale runs prompts that the guard does not score" in capsys.readouterr().err
    model, tokenizer = load_model(str(guarded_folder))
    with pytest.raises(EUAError, match="The model cannot generate with its settings .*: correct its generation_config.json"):
        answer(model, tokenizer, "Who?", num_return_sequences=2)
