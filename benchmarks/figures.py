"""The figures of a load: throughput, latencies by percentile, goodput, and what failed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.client import Sample
from engine.errors import InvalidParam

PERCENTS = (50, 90, 99)
QUANTILES = (1, 10, 25, 50, 75, 90, 95, 99)  # of the distributions that are plotted
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")  # vLLM's names


@dataclass(frozen=True)
class Slo:
    """The most that a good request may take, in milliseconds; one that failed is not good."""

    limits: Mapping[str, float]

    def good(self, sample: Sample) -> bool:
        if sample.error is not None:
            return False
        found = request_latencies(sample)
        return all(found[name] <= most for name, most in self.limits.items())


def parse_slo(text: str) -> Slo:
    """Of "ttft_ms=500,tpot_ms=50"; vLLM's "ttft:500 tpot:50" is read too. Raises InvalidParam."""
    limits: dict[str, float] = {}
    known = [name for name in LATENCIES if name != "itl_ms"]
    for part in text.replace(",", " ").split():
        name, _, value = part.replace(":", "=").partition("=")
        name = name if name.endswith("_ms") else f"{name}_ms"
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in known or name in limits or not limit > 0:
            raise InvalidParam("slo", f"{part!r} is not one of {', '.join(known)} with a positive number, once each")
        limits[name] = limit
    if not limits:
        raise InvalidParam("slo", "names no limit; write it as ttft_ms=500,tpot_ms=50")
    return Slo(limits)


def request_latencies(sample: Sample) -> dict[str, float]:
    """Milliseconds of one request."""
    found = {"ttft_ms": sample.ttft_s, "tpot_ms": sample.tpot_s, "e2el_ms": sample.end_s - sample.start_s}
    return {name: 1e3 * seconds for name, seconds in found.items()}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in order, linear between the two nearest ranks."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def output_tokens_per_s(samples: Sequence[Sample]) -> float:
    """Of all requests together, from the first one's start to the last token. What failed brings no tokens."""
    seconds = max(s.end_s for s in samples) - min(s.start_s for s in samples)
    return sum(s.num_output_tokens for s in samples if s.error is None) / seconds if seconds else 0.0


def figures(samples: Sequence[Sample], slo: Slo | None = None) -> dict[str, Any]:
    """Tokens and requests a second, latencies in milliseconds. A single token has no TPOT, a single chunk no ITL."""
    done = [s for s in samples if s.error is None]
    seconds = max((s.end_s for s in samples), default=0.0) - min((s.start_s for s in samples), default=0.0)
    found: dict[str, Any] = {
        "requests": len(samples),
        "completed": len(done),
        "errors": dict(Counter(s.error for s in samples if s.error is not None)),
        "error_examples": {s.error: s.text[:200] for s in samples if s.error is not None and s.text},
        "duration_s": seconds,
        "input_tokens": sum(s.num_prompt_tokens for s in done),
        "output_tokens": sum(s.num_output_tokens for s in done),
        "requests_per_s": _rate(len(done), seconds),
        "output_tokens_per_s": _rate(sum(s.num_output_tokens for s in done), seconds),
        "total_tokens_per_s": _rate(sum(s.num_prompt_tokens + s.num_output_tokens for s in done), seconds),
    }
    for name, values in latencies(done).items():
        if values:
            found |= {f"{name}_mean": sum(values) / len(values)}
            found |= {f"{name}_p{percent}": percentile(values, percent) for percent in PERCENTS}
            found |= {f"{name}_quantiles": [[percent, percentile(values, percent)] for percent in QUANTILES]}
    if slo is not None:
        good = [s for s in samples if slo.good(s)]
        found["good_share"] = len(good) / len(samples) if samples else 0.0
        found["goodput_requests_per_s"] = _rate(len(good), seconds)
        found["goodput_tokens_per_s"] = _rate(sum(s.num_output_tokens for s in good), seconds)
    return found


def latencies(done: Sequence[Sample]) -> dict[str, list[float]]:
    """Milliseconds in order, of samples without an error."""
    found: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for sample in done:
        of_request = request_latencies(sample)
        if sample.num_output_tokens < 2:
            del of_request["tpot_ms"]
        for name, value in of_request.items():
            found[name].append(value)
        found["itl_ms"] += [1e3 * gap for gap in sample.itl_s]
    return {name: sorted(values) for name, values in found.items()}


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds else 0.0
