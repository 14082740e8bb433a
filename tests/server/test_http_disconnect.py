"""A client that goes away frees its place, whatever state its request is in."""

from __future__ import annotations

import json
import socket
import time

import httpx
import pytest

COMPLETIONS = "/v1/completions"


def send(port: int, body: dict) -> socket.socket:
    raw = json.dumps(body).encode()
    lines = [f"POST {COMPLETIONS} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(raw)}"]
    head = "\r\n".join([*lines, "", ""])
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    sock.sendall(head.encode() + raw)
    return sock


def read_until(sock: socket.socket, mark: bytes) -> None:
    found = b""
    while mark not in found:
        part = sock.recv(65536)
        assert part, found
        found += part


def until(condition, timeout_s: float = 5.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", [False, True], ids=["running", "before the first token"])
def test_disconnect_aborts(live, stream, waits):
    live.engine.pace_s = 0.005
    if waits:
        live.engine.gate.clear()
    sock = send(live.port, {"prompt": ["x", "y"], "n": 2, "max_tokens": 4000, "stream": stream})
    assert until(lambda: live.engine.num_running == 4)
    if stream and not waits:
        read_until(sock, b"data: ")
    sock.close()
    assert until(lambda: live.engine.num_running == 0)
    assert set(live.engine.aborted) == {r.request_id for r in live.engine.submitted}
    metrics = httpx.get(live.url + "/metrics").text
    assert 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="fake-model"} 4.0' in metrics


def test_a_finished_request_is_not_aborted(live):
    """The engine would have to remember ended requests otherwise; closing later is no abort."""
    sock = send(live.port, {"prompt": "=abc", "max_tokens": 9, "stream": True})
    read_until(sock, b"[DONE]")
    sock.close()
    time.sleep(0.05)
    assert live.engine.aborted == []


def test_many_disconnects_leave_nothing(live):
    live.engine.pace_s = 0.002
    for i in range(20):
        send(live.port, {"prompt": "x", "max_tokens": 4000, "stream": i % 2 == 0}).close()
    assert until(lambda: live.engine.num_running == 0 and not live.lifecycle._open)
    assert httpx.post(live.url + COMPLETIONS, json={"prompt": "=ok"}).json()["choices"][0]["text"] == "ok"
