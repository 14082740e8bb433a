"""`octavo bench startup`: how long `octavo serve` takes to be ready."""

from __future__ import annotations

from pathlib import Path

from benchmarks import startup
from engine.config import EngineOptions
from server.commands.bench import BenchStartupOptions


def run(engine_options: EngineOptions, options: BenchStartupOptions) -> int:
    folder = None if options.result_dir is None else Path(options.result_dir)
    return startup.run(engine_options, options.repeats, options.backend, folder)
