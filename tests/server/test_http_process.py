"""The server as a process: start, drain on a signal, exit codes."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.ports import free_ports

ROOT = Path(__file__).parents[2]


class Server:
    def __init__(self, mode: str, port: int, timeout_s: float) -> None:
        command = [sys.executable, "-m", "tests.server.serve_fake", str(port), mode, str(timeout_s)]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{port}"

    def until(self, path: str, status: int) -> httpx.Response:
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(self.url + path)
                if answer.status_code == status:
                    return answer
            time.sleep(0.02)
        raise AssertionError(f"{path} never answered {status}")

    def ended(self, timeout_s: float = 10) -> tuple[int, str]:
        _, words = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, words


@contextlib.contextmanager
def server(mode: str, timeout_s: float = 10, port: int | None = None) -> Iterator[Server]:
    found = Server(mode, free_ports() if port is None else port, timeout_s)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.communicate()


class Reader(threading.Thread):
    """Reads one stream to its end, however it ends."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__()
        self.body = {"prompt": "x", "max_tokens": max_tokens, "stream": True}
        self.url, self.text, self.begun = url + "/v1/completions", "", threading.Event()
        self.start()
        assert self.begun.wait(10)

    def run(self) -> None:
        with httpx.stream("POST", self.url, json=self.body, timeout=20) as answer:
            for text in answer.iter_text():
                self.text += text
                self.begun.set()

    def chunks(self) -> list[dict]:
        self.join(20)
        *chunks, done, tail = self.text.split("\n\n")
        assert (done, tail) == ("data: [DONE]", "")
        return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_streams_finish(number):
    with server("ok") as found:
        found.until("/ready", 200)
        reader = Reader(found.url, max_tokens=60)
        found.process.send_signal(number)
        found.until("/ready", 503)
        answer = httpx.post(found.url + "/v1/completions", json={"prompt": "y"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        chunks = reader.chunks()
        assert len(chunks) == 60 and chunks[-1]["choices"][0]["finish_reason"] == "length"
        code, words = found.ended()
        assert code == 0 and "Traceback" not in words


@pytest.mark.parametrize("num_signals", [1, 2])
def test_what_does_not_finish_in_time_ends_with_an_error_event(num_signals):
    with server("ok", timeout_s=0.3 if num_signals == 1 else 60) as found:
        found.until("/ready", 200)
        reader = Reader(found.url, max_tokens=4000)
        for _ in range(num_signals):
            found.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        *chunks, last = reader.chunks()
        assert last["error"]["code"] == "shutting_down"
        assert all(c["choices"][0]["finish_reason"] is None for c in chunks)
        assert found.ended()[0] == 0


def test_idle_server_leaves_at_once():
    with server("ok") as found:
        found.until("/ready", 200)
        start_s = time.monotonic()
        found.process.send_signal(signal.SIGTERM)
        assert found.ended()[0] == 0 and time.monotonic() - start_s < 3


def test_it_listens_and_tells_its_phase_while_loading_and_can_be_stopped():
    with server("slow") as found:
        body = found.until("/ready", 503).json()
        assert (body["status"], body["progress"]) == ("loading weights", 0.25)
        assert httpx.get(found.url + "/ping").status_code == 200
        found.process.send_signal(signal.SIGTERM)
        assert found.ended()[0] == 0


def test_a_launch_that_fails_says_why_in_one_line():
    with server("fail") as found:
        code, words = found.ended()
        assert code == 1 and "octavo: error: model.gguf: tensor 'x' ends after the file\n" in words
        assert "Traceback" not in words
    with server("crash") as found:
        code, words = found.ended()
        assert code == 1 and "start-up failed: ZeroDivisionError" in words


def test_port_in_use_is_said_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as sock, server("slow", port=sock.getsockname()[1]) as found:
        code, words = found.ended()
        assert code == 1 and words.count("\n") == 1 and "is in use" in words and str(sock.getsockname()[1]) in words


def test_death_of_the_engine_ends_the_process_with_an_error():
    with server("dies") as found:
        found.until("/ready", 200)
        reader = Reader(found.url, max_tokens=4000)
        assert reader.chunks()[-1]["error"]["code"] == "engine_error"
        code, words = found.ended()
        assert code == 1 and "octavo: error: the engine died: the loop crashed" in words
