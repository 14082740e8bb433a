"""Clients that go away: whatever their request was doing, it leaves the batch within two steps.

Seen from outside, through /metrics: the pages are back, the slot is free, and the step counter
has moved by no more than a few since the close was noticed.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import openai
import pytest

from tests.e2e.serving import MODEL, Served, ended, is_idle

pytestmark = pytest.mark.model

FOREVER = 8000
STEPS = 2  # a step in flight when the close is noticed, and one that was planned meanwhile
RUNNING, WAITING, USAGE = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"


@contextmanager
def asking(server: Served, **fields: Any) -> Iterator[socket.socket]:
    """A request on a socket of its own, which is closed without a word at the end."""
    body = {"prompt": "Once upon a time", "max_tokens": FOREVER, "temperature": 0, "ignore_eos": True} | fields
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}"
    with server.connect() as sock:
        sock.sendall(head.encode() + b"\r\n\r\n" + raw)
        yield sock


def read_events(sock: socket.socket, count: int) -> None:
    """Wait until so many events of a stream are there; a stream that is kept alive and says nothing is an error."""
    got, deadline_s = b"", time.monotonic() + 60
    while got.count(b"data: ") < count:
        assert time.monotonic() < deadline_s, got
        part = sock.recv(65536)
        assert part, got
        got += part


def gone(server: Served, num_aborted: float) -> None:
    """After a close: the choice counts as aborted, its pages are back, and few steps were computed for it."""
    noticed = server.wait(lambda m: ended(m, "abort") == num_aborted, "an aborted choice")
    after = server.wait_idle()
    assert after["octavo_steps_total"] - noticed["octavo_steps_total"] <= STEPS
    server.wait(lambda m: m["octavo_steps_total"] == after["octavo_steps_total"], "a loop that stands still")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_mid_decode(server: Served, stream: bool) -> None:
    before = server.wait_idle()
    with asking(server, stream=stream) as sock:
        if stream:
            read_events(sock, 5)
        server.wait(lambda m: m["vllm:generation_tokens_total"] > before["vllm:generation_tokens_total"] + 8, "tokens")
        assert server.metric(RUNNING) == 1 and server.metric(USAGE) > 0
    gone(server, ended(before, "abort") + 1)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_mid_prefill(server: Served, stream: bool) -> None:
    """A prompt of many chunks (256 tokens each), left after the first of them."""
    before = server.wait_idle()
    prompt = [1000 + i % 7919 for i in range(6000)]  # equal to no prompt before, so nothing is cached
    if stream:
        prompt.reverse()
    with asking(server, prompt=prompt, max_tokens=100, stream=stream):
        server.wait(lambda m: m.get("octavo_steps_total", 0) > before.get("octavo_steps_total", 0), "a first chunk")
        assert server.metric(RUNNING) == 1
    gone(server, ended(before, "abort") + 1)
    after = server.metrics()
    assert after["vllm:generation_tokens_total"] == before["vllm:generation_tokens_total"]
    computed = after["octavo_tokens_used_total"] - before["octavo_tokens_used_total"]
    assert 0 < computed < 6000


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_queued(server: Served, stream: bool) -> None:
    """Eight run; the ninth waits, and leaves without having cost a step."""
    before = server.wait_idle()
    with ExitStack() as stack:
        for i in range(8):
            stack.enter_context(asking(server, prompt=f"{i} sheep", stream=True))
        server.wait(lambda m: m[RUNNING] == 8, "a full batch")
        with asking(server, prompt=[5] * 2000, max_tokens=99, stream=stream):
            server.wait(lambda m: m[WAITING] == 1, "a queue")
        left = server.wait(lambda m: m[WAITING] == 0, "an empty queue")
        assert left[RUNNING] == 8 and ended(left, "abort") == ended(before, "abort") + 1
        prompts = left["vllm:prefix_cache_queries_total"] - before["vllm:prefix_cache_queries_total"]
        assert prompts < 100  # of the eight alone: the ninth was never admitted
    gone(server, ended(before, "abort") + 9)


def test_one_of_several_leaves(server: Served, client: openai.OpenAI) -> None:
    """The neighbours' answers are what they are alone."""
    fields: dict[str, Any] = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 60, "temperature": 0}
    alone = client.completions.create(**fields).choices[0].text
    server.wait_idle()
    text = ""
    with ExitStack() as stack:
        leaving = stack.enter_context(asking(server, stream=True, n=3, temperature=1.0))
        read_events(leaving, 6)
        for i, chunk in enumerate(client.completions.create(stream=True, **fields)):
            text += chunk.choices[0].text
            if i == 5:
                stack.close()
    assert text == alone
    server.wait_idle()


def test_half_a_request(server: Served) -> None:
    """A client that leaves while its body is on the way never reaches the engine."""
    before = server.wait_idle()
    with server.connect() as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        sock.sendall(b'content-length: 1000\r\n\r\n{"prompt": ')
    after = server.wait_idle()
    assert after["octavo_steps_total"] == before.get("octavo_steps_total", 0)
    assert after["vllm:prompt_tokens_total"] == before["vllm:prompt_tokens_total"]


def test_many_leave_at_once(server: Served, client: openai.OpenAI) -> None:
    before = server.wait_idle()
    with ExitStack() as stack:
        streaming = stack.enter_context(asking(server, prompt="0: a story", stream=True))
        read_events(streaming, 3)  # ahead of the others: which of those run and which wait is left to chance
        for i in range(1, 20):
            stack.enter_context(asking(server, prompt=f"{i}: a story", stream=i % 2 == 0))
        server.wait(lambda m: m[RUNNING] == 8 and m[WAITING] == 12, "a queue")
    gone(server, ended(before, "abort") + 20)
    assert is_idle(server.metrics())
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=3)
    assert answer.usage is not None and answer.usage.completion_tokens == 3
