"""`octavo bench startup`: how long `octavo serve` takes to be ready."""

from __future__ import annotations

from benchmarks import report, startup
from engine.config import EngineOptions
from server.commands.bench import BenchStartupOptions


def run(engine_options: EngineOptions, options: BenchStartupOptions) -> int:
    return startup.run(engine_options, options.repeats, options.backend, report.folder(options.result_dir))
