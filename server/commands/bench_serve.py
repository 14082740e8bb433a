"""`octavo bench serve`: load on a server, ours or another."""

from __future__ import annotations

from benchmarks import serve
from engine.config import EngineOptions
from server.commands.bench import BenchServeOptions


def run(engine_options: EngineOptions, options: BenchServeOptions) -> int:
    return serve.run(engine_options, options)
