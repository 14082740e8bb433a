"""From options to an engine: the model is found, and what it is for decides which engine serves it."""

from __future__ import annotations

from pathlib import Path

from engine.bundle import beside, write_bundle
from engine.config import EngineOptions, cache_root
from engine.errors import InvalidParam
from engine.executables import Report
from engine.load import closed_set, load_engine, load_runner
from engine.loop import Engine
from engine.pooling.engine import PoolingEngine
from engine.pooling.load import load_pooling_engine, pooling_closed_set, pools
from engine.registry import resolve_model
from engine.replica import Replica


def load_any_engine(
    options: EngineOptions, report: Report = lambda phase, done, of: None, replica: Replica | None = None
) -> Engine | PoolingEngine:
    """A warmed-up engine whose thread is not started yet. Raises OctavoError with the cause.

    report(phase, done, of) is called from this thread as phases go on. replica: which this process leads.
    """
    report("find model", 0, 1)
    path = model_path(options)
    if not pools(options, path):
        return load_engine(options, path, report, replica)
    if replica is not None:
        raise InvalidParam("multihost", "a model that embeds or scores runs in one process")
    return load_pooling_engine(options, path, report)


def follow(options: EngineOptions, replica: Replica) -> None:
    """A process of a replica that another leads: returns when that one leaves."""
    runner, _ = load_runner(options, model_path(options), lambda phase, done, of: None, replica)
    replica.follow(runner)


def write_programs(options: EngineOptions, out: Path | None, report: Report) -> tuple[Path, dict[str, int]]:
    """Compile what serving the model takes, into a bundle at `out` (None: beside the checkpoint); the bytes of each
    program. Reads no weights. Raises OctavoError."""
    if options.programs is not None:
        raise InvalidParam("programs", "is for what loads them")
    report("find model", 0, 1)
    path = model_path(options)
    found = pooling_closed_set(options, path) if pools(options, path) else closed_set(options, path)
    folder = out or beside(path)
    return folder, write_bundle(folder, *found, report)


def model_path(options: EngineOptions) -> Path:
    return resolve_model(options.model, cache_dir=cache_root(options.cache_dir), revision=options.revision)
