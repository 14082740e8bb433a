"""Every way to fail over HTTP: status, envelope, retry headers, request id; and nothing leaks."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import time

import httpx
import pytest

from engine.errors import EngineStopped, OctavoError
from server.app import build_app
from server.lifecycle import Lifecycle
from server.limits import OPEN_PATHS
from server.metrics import Metrics
from tests.server.conftest import OPTIONS
from tests.server.fakes import FakeEngine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LEAK = re.compile(r"0x[0-9a-f]{4,}|/home|/work|\.py\b|Traceback|object at|secret")


def envelope(answer: httpx.Response, status: int, code: str | None) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["code"] == code
    assert not LEAK.search(answer.text)
    assert answer.headers["x-request-id"]
    return error


def retry_s(answer: httpx.Response) -> float:
    assert 1 <= int(answer.headers["retry-after"]) <= 75
    return int(answer.headers["retry-after-ms"]) / 1000


async def test_paths_methods_and_types(client):
    envelope(await client.get("/nope"), 404, "unknown_url")
    envelope(await client.post("/v1/"), 404, "unknown_url")
    envelope(await client.get(CHAT), 405, "method_not_allowed")
    envelope(await client.post("/v1/models"), 405, "method_not_allowed")
    envelope(
        await client.post(CHAT, content=b"a=1", headers={"content-type": "text/plain"}), 415, "unsupported_media_type"
    )


async def test_unknown_model(client):
    for path, body in ((CHAT, {"messages": [{"role": "user", "content": "x"}]}), (COMPLETIONS, {"prompt": "x"})):
        error = envelope(await client.post(path, json=body | {"model": "other"}), 404, "model_not_found")
        assert error["param"] == "model" and "fake-model" in error["message"]
    envelope(await client.get("/v1/models/other"), 404, "model_not_found")
    envelope(await client.get("/v1/models/a/b"), 404, "model_not_found")


async def test_context_overflow_names_the_field(client, engine: FakeEngine):
    limit = engine.config.max_model_len
    for count, tokens, status in ((limit - 1, 1, 200), (limit - 1, 2, 400), (limit, 1, 400), (limit + 1, 1, 400)):
        answer = await client.post(COMPLETIONS, json={"prompt": [97] * count, "max_tokens": tokens})
        assert answer.status_code == status
    assert envelope(answer, 400, "context_length_exceeded")["param"] == "prompt"


async def test_full_queue_is_429_with_a_time_to_come_back(client, engine: FakeEngine):
    engine.gate.clear()
    answer = await client.post(COMPLETIONS, json={"prompt": ["x"] * 65, "max_tokens": 1})
    error = envelope(answer, 429, "queue_full")
    assert error["type"] == "rate_limit_error" and 3.0 <= retry_s(answer) <= 3.75
    # A list is admitted whole or not at all: what had been taken in is gone again.
    assert len(engine.submitted) == 64 and engine.num_running == 0
    assert set(engine.aborted) == {r.request_id for r in engine.submitted}


async def test_fault_of_the_engine_is_500_with_a_fixed_text(client, engine: FakeEngine):
    answer = await client.post(COMPLETIONS, json={"prompt": ["ok", "FAULT"], "max_tokens": 900})
    envelope(answer, 500, "engine_error")
    assert answer.headers["x-should-retry"] == "false"
    assert engine.num_running == 0  # the neighbour of the same HTTP request is freed
    assert (await client.post(COMPLETIONS, json={"prompt": "ok"})).status_code == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_fault_in_a_stream_is_one_error_event_and_done(client, path):
    body = {"messages": [{"role": "user", "content": "FAULT"}]} if path == CHAT else {"prompt": "FAULT"}
    answer = await client.post(path, json=body | {"stream": True, "max_tokens": 9})
    assert answer.status_code == 200
    *chunks, error, done, tail = answer.text.split("\n\n")
    assert (done, tail) == ("data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_error"
    assert all("error" not in json.loads(c.removeprefix("data: ")) for c in chunks)
    assert all(json.loads(c.removeprefix("data: "))["choices"][0]["finish_reason"] is None for c in chunks)
    assert not LEAK.search(answer.text)


async def test_unexpected_exception_is_500_with_a_fixed_text(client, engine: FakeEngine, monkeypatch):
    def broken(request, sink):
        raise ZeroDivisionError("secret /home/x.py at 0x7fffff")

    monkeypatch.setattr(engine, "submit", broken)
    envelope(await client.post(COMPLETIONS, json={"prompt": "x"}), 500, None)

    def foreign(request, sink):
        raise OctavoError("secret of another layer")

    monkeypatch.setattr(engine, "submit", foreign)
    envelope(await client.post(COMPLETIONS, json={"prompt": "x"}), 500, None)

    def stopped(request, sink):
        raise EngineStopped("secret")

    monkeypatch.setattr(engine, "submit", stopped)
    answer = await client.post(COMPLETIONS, json={"prompt": "x"})
    envelope(answer, 503, "engine_stopped")
    assert retry_s(answer) >= 1


async def test_body_cap(client):
    fits = {"prompt": "x" * (OPTIONS.max_body_bytes - 100)}
    envelope(await client.post(COMPLETIONS, json=fits), 400, "context_length_exceeded")
    answer = await client.post(COMPLETIONS, content=b"x" * (OPTIONS.max_body_bytes + 1), headers=JSON)
    envelope(answer, 413, "request_too_large")
    assert answer.headers["connection"] == "close"

    async def chunks():
        for _ in range(OPTIONS.max_body_bytes // 2**16 + 2):
            yield b" " * 2**16

    envelope(await client.post(COMPLETIONS, content=chunks(), headers=JSON), 413, "request_too_large")


JSON = {"content-type": "application/json"}


async def test_request_id_is_the_clients_if_it_is_sane(client):
    for given, kept in (("abc-1.2_3", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("é", False)):
        answer = await client.get("/version", headers={"x-request-id": given.encode()})
        assert (answer.headers["x-request-id"] == given) is kept
    for path in ("/health", "/nope", "/metrics"):
        assert (await client.get(path)).headers["x-request-id"]
    answer = await client.post(COMPLETIONS, json={"prompt": "x", "stream": True, "request_id": "mine"})
    assert answer.headers["x-request-id"] and '"id":"cmpl-mine"' in answer.text


# -- not ready, draining, dead -----------------------------------------------------------------


async def serve(lifecycle: Lifecycle, **options) -> httpx.AsyncClient:
    app = build_app(lifecycle, Metrics(lifecycle), dataclasses.replace(OPTIONS, **options))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_before_it_is_ready(engine: FakeEngine):
    lifecycle = Lifecycle()
    lifecycle.report("compiling", 2, 5)
    async with await serve(lifecycle) as client:
        ready = await client.get("/ready")
        assert ready.status_code == 503
        assert ready.json().items() >= {"status": "compiling", "progress": 0.4, "done": 2, "of": 5}.items()
        assert ready.json()["elapsed_s"] >= 0
        assert (await client.get("/ping")).status_code == 200
        assert (await client.get("/health")).status_code == 503
        assert b"octavo_ready 0.0" in (await client.get("/metrics")).content
        for path in (CHAT, COMPLETIONS, "/tokenize"):
            answer = await client.post(path, json={"prompt": "x"})
            assert "compiling" in envelope(answer, 503, "not_ready")["message"] and retry_s(answer) >= 1
        lifecycle.ready(engine)
        ready = (await client.get("/ready")).json()
        assert ready["status"] == "ready" and list(ready["phases_s"]) == ["starting", "compiling"]
        assert sum(ready["phases_s"].values()) == pytest.approx(ready["elapsed_s"], abs=0.003)
        assert (await client.get("/health")).status_code == 200


async def test_ready_is_said_when_requests_are_taken(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch):
    lifecycle, seen, report = Lifecycle(), [], Lifecycle.report

    def spied(self: Lifecycle, phase: str, done: int, of: int) -> None:
        report(self, phase, done, of)
        seen.append((self.status, self.generating()))

    monkeypatch.setattr(Lifecycle, "report", spied)
    lifecycle.ready(engine)
    assert seen == [("ready", engine)]


async def test_draining_refuses_new_work_and_stays_alive(client, lifecycle: Lifecycle):
    lifecycle.draining = True
    ready = await client.get("/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "draining")
    assert (await client.get("/health")).status_code == 200
    answer = await client.post(COMPLETIONS, json={"prompt": "x"})
    envelope(answer, 503, "shutting_down")
    assert retry_s(answer) >= 1


async def test_dead_engine(client, engine: FakeEngine):
    engine.kill()
    for path in ("/health", "/ready", "/ping"):
        assert (await client.get(path)).status_code == 503
    envelope(await client.post(COMPLETIONS, json={"prompt": "x"}), 503, "engine_stopped")


# -- the key -----------------------------------------------------------------------------------


async def test_api_key_guards_every_path_but_the_probes(lifecycle: Lifecycle):
    assert {"/health", "/ready", "/ping"} == OPEN_PATHS
    closed = [CHAT, COMPLETIONS, "/v1/models", "/metrics", "/version", "/tokenize", "/nope", "//health", "/health/"]
    wrong = ["", "Bearer", "Bearer ", "Bearer wrong", "Basic key-1", "key-1", "Bearer key-12", "Bearer kéy"]
    async with await serve(lifecycle, api_key="key-1") as client:
        for path in sorted(OPEN_PATHS):
            assert (await client.get(path)).status_code == 200
        for path in closed:
            for header in wrong:
                answer = await client.get(path, headers=[(b"authorization", header.encode())])
                assert envelope(answer, 401, "invalid_api_key")["type"] == "authentication_error"
            host = {"host": "test/health"}  # a path must not come from the Host header
            assert (await client.get(path, headers=host)).status_code == 401
        good = {"authorization": "Bearer key-1"}
        assert (await client.get("/v1/models", headers=good)).status_code == 200
        assert (await client.get("/nope", headers=good)).status_code == 404


async def test_served_model_name(lifecycle: Lifecycle):
    async with await serve(lifecycle, served_model_name="mine") as client:
        answer = await client.post(COMPLETIONS, json={"prompt": "x", "model": "mine"})
        assert answer.json()["model"] == "mine"
        envelope(await client.post(COMPLETIONS, json={"prompt": "x", "model": "fake-model"}), 404, "model_not_found")


async def test_without_a_tokenizer_ids_go_in_and_out():
    engine = FakeEngine(tokenizer=None)
    lifecycle = Lifecycle()
    lifecycle.ready(engine)
    async with await serve(lifecycle) as client:
        fields = {"max_tokens": 1, "return_token_ids": True, "logprobs": 1}
        choice = (await client.post(COMPLETIONS, json={"prompt": [97], **fields})).json()["choices"][0]
        assert choice["token_ids"] == [116] and choice["logprobs"]["tokens"] == ["token_id:116"]
        assert envelope(await client.post(COMPLETIONS, json={"prompt": "x"}), 400, "invalid_value")["param"] == "prompt"
        answer = await client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]})
        assert envelope(answer, 400, "invalid_value")["param"] == "messages"
        envelope(await client.post("/tokenize", json={"prompt": "x"}), 400, "invalid_value")
    engine.stop()


# -- over a real socket ------------------------------------------------------------------------


def talk(port: int, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Send the parts, then read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        try:
            for part in parts:
                sock.sendall(part)
                time.sleep(pause_s)
        except OSError:
            pass  # the server has closed already
        found = b""
        while chunk := _receive(sock):
            found += chunk
        return found


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except ConnectionResetError:
        return b""


def head(*lines: str) -> bytes:
    return "\r\n".join(
        ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", *lines, "", ""]
    ).encode()


def test_oversize_and_broken_requests_on_a_socket(live):
    assert b" 413 " in talk(live.port, head("content-length: 999999999"))
    flood = [b"10000\r\n" + b" " * 0x10000 + b"\r\n"] * 100
    assert b" 413 " in talk(live.port, head("transfer-encoding: chunked"), *flood)
    assert b" 400 " in talk(live.port, head("content-length: -5"))
    assert b" 400 " in talk(live.port, head("x-long: " + "y" * 2**17))
    assert b" 400 " in talk(live.port, b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 2**17)  # never ends
    assert b" 408 " in talk(live.port, head("content-length: 50") + b"{")  # and then silence
    # Slow headers and silent connections are closed, too.
    assert talk(live.port, *[b"GET / HTTP/1.1\r\n", *[b"x: y\r\n"] * 20], pause_s=0.05) == b""
    assert talk(live.port) == b""
    assert httpx.get(live.url + "/health").status_code == 200


@pytest.mark.parametrize("kib", [63, 130, 1024])
def test_long_body_is_no_long_header(live, kib: int):
    """The last read of a body once counted as headers: what was longer than their bound got a bare 400."""
    raw = json.dumps({"prompt": "ab", "max_tokens": 2, "user": "u" * (kib << 10)}).encode()
    request = head(f"content-length: {len(raw)}", "connection: close") + raw
    assert talk(live.port, request).startswith(b"HTTP/1.1 200")
    half = len(request) // 2
    assert talk(live.port, request[:500], request[500:half], request[half:], pause_s=0.02).startswith(b"HTTP/1.1 200")


def test_many_small_chunks_are_one_body(live):
    body = json.dumps({"prompt": "=abc"}).encode()
    chunked = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in body) + b"0\r\n\r\n"
    assert b'"text":"abc"' in talk(live.port, head("transfer-encoding: chunked", "connection: close") + chunked)


def test_health_answers_while_long_prompts_are_read(live):
    """Parsing and tokenizing run in threads; the probes must not wait for them."""
    body = json.dumps({"prompt": ["x" * 1000] * 60, "max_tokens": 1}).encode()
    with httpx.Client(base_url=live.url) as http:
        http.get("/health")
        for _ in range(5):
            assert http.post(COMPLETIONS, content=body, headers=JSON).status_code == 200
            start_s = time.monotonic()
            assert http.get("/health").status_code == 200
            assert time.monotonic() - start_s < 0.5
