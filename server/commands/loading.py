"""An engine for a command of the terminal: loaded with its progress on stderr, stopped at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from engine.config import EngineOptions
from engine.errors import InvalidParam
from engine.loop import Engine
from engine.pooling.engine import PoolingEngine
from engine.start import load_any_engine


class LoadingLine:
    """Tells phases and progress: one line that changes on a terminal, a line a phase elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._phase = ""

    def __call__(self, phase: str, done: int, of: int) -> None:
        if self._is_terminal:
            print(f"\r\x1b[Koctavo: {phase} {done} of {of}", end="", file=sys.stderr, flush=True)
        elif phase != self._phase:
            print(f"octavo: {phase}", file=sys.stderr)
        self._phase = phase

    def clear(self) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def running_engine(options: EngineOptions) -> Iterator[Engine | PoolingEngine]:
    """Raises OctavoError when the model cannot be loaded."""
    line = LoadingLine()
    try:
        engine = load_any_engine(options, line)
    finally:
        line.clear()
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@contextmanager
def generating_engine(options: EngineOptions) -> Iterator[Engine]:
    """For commands that generate. Raises OctavoError when the model cannot be loaded, or does not."""
    with running_engine(options) as engine:
        if isinstance(engine, PoolingEngine):
            raise InvalidParam("model", f"{engine.model_name} is for {engine.task}; it generates no text")
        yield engine
