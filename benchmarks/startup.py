"""Seconds from process start to ready for `octavo serve`, cold and warm: `octavo bench startup`.

Cold means: no compiled program on disk (a fresh cache folder; the model file is already here,
as downloading measures the network). Warm means: the same command again with that folder. Each
is done several times and the median is reported. Start-up is paid by whoever waits for a
replica, so its phases, as `/ready` tells them, are timed too. Peak memory is told up to the end
of loading (weights should be held once) and up to ready (compiling takes more). One request is
answered after ready; of the default model its text is checked.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import engines, report
from benchmarks.client import Endpoint, LoadError, complete
from engine.config import DEFAULT_MODEL, EngineOptions, cache_root
from engine.registry import resolve_model

REQUEST = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
ANSWER = " Paris"  # of the default model


@dataclass(frozen=True)
class Start:
    """One start: when it was ready, how long each phase was seen, and what memory it took."""

    ready_s: float
    phases_s: dict[str, float]
    loading_rss_mib: float | None  # peak until the weights were loaded; compiling takes more
    peak_rss_mib: float | None
    first_answer_s: float  # a request right after ready, 1 token


def start_once(options: EngineOptions, answer: str | None) -> Start:
    """One start and one request of one token, whose text must be `answer` unless that is None. Raises LoadError."""
    start_s = time.perf_counter()
    with engines.octavo_process(options) as (child, port):
        seen: list[tuple[str, float]] = [("process", 0.0)]
        loading = None
        for status, phase in engines.until_ready(child, port):
            now_s = time.perf_counter() - start_s
            name = "ready" if status == 200 else phase
            if name and name != seen[-1][0]:
                seen.append((name, now_s))
            if phase == "load weights":
                loading = _peak_rss_mib(child.pid)
        peak = _peak_rss_mib(child.pid)
        found = asyncio.run(complete(Endpoint("127.0.0.1", port), REQUEST))
        if answer is not None and found.text != answer:
            raise LoadError(f"the first answer is {found.text!r}, not {answer!r}")
    phases = {name: round(end - begin, 2) for (name, begin), (_, end) in itertools.pairwise(seen)}
    return Start(seen[-1][1], phases, loading, peak, found.end_s - found.start_s)


def _peak_rss_mib(pid: int) -> float | None:
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 1024, 1)


def summary(starts: list[Start]) -> dict[str, object]:
    peaks = [s.peak_rss_mib for s in starts if s.peak_rss_mib is not None]
    middle = sorted(starts, key=lambda s: s.ready_s)[len(starts) // 2]
    return {
        "ready_s": round(statistics.median(s.ready_s for s in starts), 2),
        "ready_s_all": [round(s.ready_s, 2) for s in starts],
        "phases_s": middle.phases_s,
        "loading_rss_mib": max((s.loading_rss_mib for s in starts if s.loading_rss_mib is not None), default=None),
        "peak_rss_mib": max(peaks, default=None),
        "first_answer_ms": round(1000 * statistics.median(s.first_answer_s for s in starts), 1),
    }


def measure(options: EngineOptions, repeats: int) -> dict[str, list[Start]]:
    """Cold and warm starts in turn: each pair has a cache folder of its own."""
    model = resolve_model(options.model, cache_root(options.cache_dir), options.revision)
    starts: dict[str, list[Start]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            ours = replace(options, model=str(model), revision=None, cache_dir=cache)
            for kind in starts.values():
                kind.append(start_once(ours, ANSWER if options.model == DEFAULT_MODEL else None))
    return starts


def run(options: EngineOptions, repeats: int, backend: str, folder: Path | None) -> int:
    """Measures, prints the table and the result."""
    found = {kind: summary(starts) for kind, starts in measure(options, repeats).items()}
    columns = ("ready_s", "loading_rss_mib", "peak_rss_mib", "first_answer_ms", "phases_s")
    print(report.table(("start", *columns), [[kind, *(f[name] for name in columns)] for kind, f in found.items()]))
    versions = report.versions("octavo", "jax", "jaxlib")
    report.finish(
        "startup", backend, {"model": options.model, "repeats": repeats, "versions": versions} | found, folder
    )
    return 0
