"""Where the loop's thread spends a step: plain sums that are always kept, and on demand the spans themselves."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

# In the order of a step. `wait` is for the device, and the reading of its results.
PHASES = ("plan", "build", "dispatch", "wait", "commit", "detokenize", "emit")


@dataclass(frozen=True, slots=True)
class Span:
    """One phase of one step, on `time.perf_counter`'s clock."""

    phase: str
    start_s: float
    end_s: float


@dataclass(slots=True)
class Phases:
    """A stopwatch: `begin`, then a `lap` at the end of each phase. Used by the loop's thread alone."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    spans: list[Span] | None = None  # a list: every lap is added to it
    _last_s: float = 0.0

    def begin(self) -> None:
        self._last_s = time.perf_counter()

    def lap(self, phase: str) -> None:
        now_s = time.perf_counter()
        self.seconds[phase] += now_s - self._last_s
        if self.spans is not None:
            self.spans.append(Span(phase, self._last_s, now_s))
        self._last_s = now_s
