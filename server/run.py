"""`octavo serve`: the server process around a real engine."""

from __future__ import annotations

from engine.config import EngineOptions
from engine.start import load_any_engine
from server.config import ServerOptions
from server.lifecycle import ModelHandle, Report
from server.process import run, say


def serve(engine_options: EngineOptions, server_options: ServerOptions) -> int:
    """Load a model and serve it until a signal or a failure. Returns the exit code."""

    def launch(report: Report) -> ModelHandle:
        engine = load_any_engine(engine_options, report).start()
        say(f"{engine.model_name}: {engine.config.summary()}")
        return engine

    return run(launch, server_options)
