"""How many tokens a decode call draws for each sequence: enough to be worth its launch, and few enough that nobody
who comes meanwhile waits for long.

Plain bookkeeping without a clock. The tokens are the same for every length, so that a choice by time changes no output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.means import Means


@dataclass(slots=True)
class CallLength:
    """Chooses by the time that a token was seen to take in the decode program of so many rows. call_s None: always
    the most."""

    buckets: tuple[int, ...]  # rows of decode programs, ascending
    fewest: int
    most: int
    call_s: float | None  # that a call should take at most; the fewest tokens may take longer
    _token_s: Means = field(default_factory=Means)  # by bucket

    def tokens(self, num_seqs: int, *, others_wait: bool) -> int:
        """Of the next call: the fewest while requests wait for a slot that a sequence may leave, and where nothing was
        measured with as many sequences or more."""
        if self.call_s is None:
            return self.most
        token_s = self._token_s.known
        known = [token_s[bucket] for bucket in self.buckets if bucket >= num_seqs and bucket in token_s]
        if others_wait or not known:
            return self.fewest
        return max(self.fewest, min(self.most, int(self.call_s / max(known[0], 1e-9))))

    def observe(self, bucket: int, num_tokens: int, seconds: float) -> None:
        """A call drew up to `num_tokens` a row, one after the other."""
        if num_tokens:
            self._token_s.add(bucket, seconds / num_tokens)
