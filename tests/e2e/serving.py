"""An `octavo serve` process for tests: started, waited for, read through /metrics, stopped.

Knows the command line and HTTP only; nothing of the engine is imported here.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent.parent
MODEL = "smollm2-135m-instruct"
# Equal options are equal programs, and those are compiled once; few options are few programs.
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 64}
START_S = 420.0  # with an empty cache every program is compiled
COMMAND = [sys.executable, "-m", "server.cli"]


def flags(**options: object) -> list[str]:
    """None leaves an option to its default."""
    given = {name: value for name, value in options.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def octavo(*argv: str, text: str | None = None, timeout_s: float = START_S) -> subprocess.CompletedProcess[str]:
    """One command of the terminal, run to its end."""
    return subprocess.run(
        [*COMMAND, *argv], cwd=ROOT, input=text, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@dataclass
class Served:
    """A listening server. Every number it gives is what a scraper of /metrics would see."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def metrics(self) -> dict[str, float]:
        """Samples by name, summed over their labels; each sample also stands under name{labels}."""
        found: dict[str, float] = {}
        for line in httpx.get(self.url + "/metrics", timeout=30).text.splitlines():
            if line and not line.startswith("#"):
                key, _, value = line.rpartition(" ")
                name = key.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
                if name != key:
                    found[key] = float(value)
        return found

    def metric(self, name: str) -> float:
        return self.metrics().get(name, 0.0)

    def wait(self, holds: Callable[[dict[str, float]], bool], what: str, timeout_s: float = 60.0) -> dict[str, float]:
        """The metrics as soon as `holds` is true of them."""
        deadline_s = time.monotonic() + timeout_s
        while not holds(found := self.metrics()):
            if time.monotonic() > deadline_s:
                shown = {k: v for k, v in found.items() if "{" not in k and "_bucket" not in k and "_created" not in k}
                raise TimeoutError(f"{what} did not come about: {shown}")
            time.sleep(0.005)
        return found

    def wait_idle(self) -> dict[str, float]:
        """Nothing runs, nothing waits, and no page is held."""
        return self.wait(is_idle, "an idle engine")

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=60)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def ended(metrics: dict[str, float], reason: str) -> float:
    """Choices that ended for `reason`."""
    found = metrics.items()
    return sum(v for k, v in found if k.startswith("vllm:request_success_total{") and f'"{reason}"' in k)


def is_idle(metrics: dict[str, float]) -> bool:
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return all(metrics[name] == 0.0 for name in gauges)


@contextmanager
def running(folder: Path, model: str = MODEL, **options: object) -> Iterator[Served]:
    """A server on a free port; at the end SIGTERM, exit code 0 and a log without a traceback."""
    log = folder / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, "serve", model, "--port", "0", *flags(**(OPTIONS | options))],
            cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    try:
        served = Served(_url(process, log), process, log)
        _wait_ready(served)
        yield served
        assert served.stop() == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()


def _url(process: subprocess.Popen[str], log: Path) -> str:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and process.poll() is None:
        found = re.search(r"listening on (http://\S+),", log.read_text())
        if found:
            return found[1]
        time.sleep(0.05)
    raise RuntimeError(f"no server came up: {log.read_text()}")


def _wait_ready(served: Served) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and served.process.poll() is None:
        if httpx.get(served.url + "/ready", timeout=60).status_code == 200:
            return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not become ready: {served.log.read_text()}")
