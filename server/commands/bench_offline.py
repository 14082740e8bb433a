"""`octavo bench offline`: batches through `LLM` in this process."""

from __future__ import annotations

from benchmarks import offline
from engine.config import EngineOptions
from server.commands.bench import BenchOfflineOptions


def run(engine_options: EngineOptions, options: BenchOfflineOptions) -> int:
    return offline.run(engine_options, options)
