"""`octavo bench startup` around the fake server: phases, and a process that dies."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks import engines, startup
from benchmarks.client import LoadError
from engine.config import EngineOptions


@contextmanager
def fake_process(options: EngineOptions) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The model's name is what happens at launch."""
    port = engines.free_port()
    command = [sys.executable, "-m", "tests.server.serve_fake", str(port), options.model, "1"]
    with engines.process(command, cwd=engines.ROOT, stdout=subprocess.DEVNULL) as child:
        yield child, port


def test_a_start_has_phases_that_add_up_and_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "octavo_process", fake_process)
    start = startup.start_once(EngineOptions(model="ok"), None)
    assert sum(start.phases_s.values()) == pytest.approx(start.ready_s, abs=0.05)
    assert start.ready_s > 0 and start.first_answer_s > 0 and start.peak_rss_mib
    found = startup.summary([start])
    assert (found["ready_s"], found["ready_s_all"]) == (round(start.ready_s, 2), [round(start.ready_s, 2)])


def test_a_dead_server_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "octavo_process", fake_process)
    with pytest.raises(LoadError, match="exit code 1"):
        startup.start_once(EngineOptions(model="fail"), None)
