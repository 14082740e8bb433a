"""Seconds from process start to ready for `octavo serve` on the default model, cold and warm.

    make bench-startup             # or: python -m benchmarks.startup --help

Cold means: no compiled program on disk (a fresh cache folder; the model file is already here,
as downloading measures the network). Warm means: the same command again with that folder. Each
is done several times and the median is reported. Start-up is paid by whoever waits for a
replica, so its phases, as `/ready` tells them, are timed too. Peak memory is told up to the end
of loading (weights should be held once) and up to ready (compiling takes more). One request is
answered after ready and its text checked.

Writes benchmarks/results/<date>-<backend>-startup.json; the last line on stdout is the same JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import engines, report
from benchmarks.client import LoadError, complete
from engine.config import DEFAULT_MODEL, cache_root
from engine.registry import resolve_model

POLL_S = 0.05
TIMEOUT_S = 600


@dataclass(frozen=True)
class Start:
    """One start: when it was ready, how long each phase was seen, and what memory it took."""

    ready_s: float
    phases_s: dict[str, float]
    loading_rss_mib: float | None  # peak until the weights were loaded; compiling takes more
    peak_rss_mib: float | None
    first_answer_s: float  # a request right after ready, 1 token


def start_once(command: list[str], port: int) -> Start:
    start_s = time.perf_counter()
    with engines.process(command, stdout=subprocess.DEVNULL) as child:
        seen: list[tuple[str, float]] = [("process", 0.0)]
        loading = None
        while True:
            status, body = engines.get_json(f"http://127.0.0.1:{port}/ready")
            now_s = time.perf_counter() - start_s
            if status == 200:
                break
            phase = (body or {}).get("status")
            if phase and phase != seen[-1][0]:
                seen.append((phase, now_s))
            if phase == "load weights":
                loading = _peak_rss_mib(child.pid)
            if child.poll() is not None:
                raise LoadError(f"octavo serve ended with exit code {child.returncode}")
            if now_s > TIMEOUT_S:
                raise LoadError(f"not ready after {TIMEOUT_S} s")
            time.sleep(POLL_S)
        seen.append(("ready", now_s))
        peak = _peak_rss_mib(child.pid)
        body = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
        answer = asyncio.run(complete(port, body))
        if answer.text != " Paris":
            raise LoadError(f"the first answer is {answer.text!r}, not ' Paris'")
    phases = {name: round(end - begin, 2) for (name, begin), (_, end) in itertools.pairwise(seen)}
    return Start(now_s, phases, loading, peak, answer.end_s - answer.start_s)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", default="cpu", help="what octavo runs on; names the result file")
    parser.add_argument("serve_args", nargs="*", help="further arguments of octavo serve, after --")
    args = parser.parse_args()
    model = resolve_model(DEFAULT_MODEL, cache_root())
    cold, warm = [], []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for kind in (cold, warm):
                port = engines.free_port()
                command = [sys.executable, "-m", "server.cli", "serve", str(model), "--cache-dir", cache]
                kind.append(start_once([*command, "--port", str(port), *args.serve_args], port))
    found = {"cold": summary(cold), "warm": summary(warm)}
    columns = ("ready_s", "loading_rss_mib", "peak_rss_mib", "first_answer_ms", "phases_s")
    print(report.table(("start", *columns), [[kind, *(f[name] for name in columns)] for kind, f in found.items()]))
    versions = report.versions("octavo", "jax", "jaxlib")
    weights_mib = round(model.stat().st_size / 2**20, 1)
    shape = {"model": DEFAULT_MODEL, "file_mib": weights_mib, "repeats": args.repeats, "versions": versions}
    report.finish("startup", args.backend, shape | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
