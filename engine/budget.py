"""How many prompt tokens a step computes beside sequences that decode: as many as they are willing to wait for.

Plain bookkeeping without a clock. With chunked prefill a step takes as long as its chunk (Sarathi-Serve, Agrawal et al.
2024), so the measured time of a step by its token bucket says which chunk keeps the time per output token (TPOT).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.means import Means


@dataclass(slots=True)
class PromptBudget:
    """Chooses among token buckets by the time that steps of each were seen to take. tpot_s None: always the most."""

    buckets: tuple[int, ...]  # ascending
    most: int  # tokens of any step; the last bucket holds them
    tpot_s: float | None
    _seconds: Means = field(default_factory=Means)  # by bucket, of its steps with decode rows

    def tokens(self, num_decoding: int) -> int:
        """Of the next step: all that fit where nobody decodes, else the largest bucket that is expected to be in time.

        Never less than the smallest bucket: prompts go on even where the target cannot be met.
        """
        if self.tpot_s is None or not num_decoding:
            return self.most
        in_time = [bucket for bucket in self.buckets if self.expected_s(bucket) <= self.tpot_s]
        return min(self.most, max(in_time, default=self.buckets[0]))

    def expected_s(self, bucket: int) -> float:
        """Measured, or by a smaller bucket's time if that promises less: twice the tokens take at most twice as long.

        Infinite where nothing as small was measured: the smallest bucket is tried first, and a time that was once
        measured too long, on a busy machine say, is corrected by what smaller ones take.
        """
        known = (seconds * max(1.0, bucket / of) for of, seconds in self._seconds.known.items() if of <= bucket)
        return min(known, default=float("inf"))

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step with decode rows computed so many prompt tokens."""
        bucket = next(bucket for bucket in self.buckets if bucket >= num_tokens)
        self._seconds.add(bucket, seconds)
