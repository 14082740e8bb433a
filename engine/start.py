"""From options to an engine: the model is found, and what it is for decides which engine serves it."""

from __future__ import annotations

from engine.config import EngineOptions, cache_root
from engine.executables import Report
from engine.load import load_engine
from engine.loop import Engine
from engine.pooling.engine import PoolingEngine
from engine.pooling.load import load_pooling_engine, pools
from engine.registry import resolve_model


def load_any_engine(options: EngineOptions, report: Report = lambda phase, progress: None) -> Engine | PoolingEngine:
    """A warmed-up engine whose thread is not started yet. Raises OctavoError with the cause.

    report(phase, progress 0 to 1) is called from this thread as phases go on.
    """
    report("find model", 0.0)
    path = resolve_model(options.model, cache_dir=cache_root(options.cache_dir), revision=options.revision)
    load = load_pooling_engine if pools(options, path) else load_engine
    return load(options, path, report)
