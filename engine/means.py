"""Running means of measurements by bucket, of which the latest count most."""

from __future__ import annotations

from dataclasses import dataclass, field

WEIGHT = 0.2  # of a new measurement


@dataclass(slots=True)
class Means:
    known: dict[int, float] = field(default_factory=dict)  # by bucket

    def add(self, bucket: int, value: float) -> None:
        before = self.known.get(bucket)
        self.known[bucket] = value if before is None else before + WEIGHT * (value - before)
