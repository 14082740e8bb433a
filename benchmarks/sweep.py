"""The rate of an open loop with the best goodput: doubled while it holds, then bisected between what held and what
did not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

DOUBLINGS, BISECTIONS = 12, 4


def sweep[Row: Mapping[str, Any]](measure: Callable[[float], Row], start_rate: float, attainment: float) -> list[Row]:
    """The figures at every rate that was tried, in requests a second and in that order. A rate holds when at least
    `attainment` of its requests are good. When the first one does not hold it is halved until one does."""
    found: list[Row] = []

    def holds(rate: float) -> bool:
        found.append(measure(rate))
        return found[-1]["good_share"] >= attainment

    low = high = start_rate
    factor = 2.0 if holds(start_rate) else 0.5
    for _ in range(DOUBLINGS):
        rate = low * factor
        if holds(rate) == (factor > 1):
            low = high = rate
            continue
        low, high = min(low, rate), max(high, rate)
        break
    else:
        return found
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return found


def best[Row: Mapping[str, Any]](rows: Sequence[Row]) -> Row:
    """The one with the most good requests a second; of equal ones the lowest rate."""
    return max(rows, key=lambda row: (row["goodput_requests_per_s"], -row["rate"]))
