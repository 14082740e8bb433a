"""When to speculate: what has measured more tokens a second, for about so many sequences.

Plain bookkeeping without a clock. The tokens are the same either way, so that a choice by time changes no output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRIALS = 4  # steps of each way before they are compared
PROBE_EVERY = 64  # steps, of which the slower way gets the last: texts change
LAGGING_PROBE_EVERY = 256  # a draft model catches up for its probe, with all that was decoded without it
WEIGHT = 0.1  # of a new measurement


@dataclass(slots=True)
class Pace:
    """Of one way to decode, for about so many sequences."""

    tokens_per_s: float = 0.0
    steps: int = 0

    def add(self, tokens_per_s: float) -> None:
        self.steps += 1
        weight = max(WEIGHT, 1 / self.steps)
        self.tokens_per_s += weight * (tokens_per_s - self.tokens_per_s)


@dataclass(slots=True)
class Speculation:
    """Chooses between decode steps with `draft_tokens` proposed tokens a sequence and those with none."""

    draft_tokens: int
    lags: bool = False  # the first step with proposals behind plain ones catches up, which says nothing of the others
    _was_plain: bool = False
    _paces: dict[tuple[int, bool], Pace] = field(default_factory=dict)
    _since_probe: dict[int, int] = field(default_factory=dict)

    def drafts(self, num_seqs: int) -> int:
        """Tokens to propose for each sequence in the next step: draft_tokens or 0."""
        if not self.draft_tokens or not num_seqs:
            return 0
        size = num_seqs.bit_length()
        plain, drafted = self._pace(size, drafted=False), self._pace(size, drafted=True)
        if min(plain.steps, drafted.steps) < TRIALS:
            return self.draft_tokens if drafted.steps < TRIALS else 0
        better = drafted.tokens_per_s > plain.tokens_per_s
        every, steps = (LAGGING_PROBE_EVERY, 2) if self.lags else (PROBE_EVERY, 1)
        since = self._since_probe.get(size, 0) + 1
        self._since_probe[size] = since % every
        probes = since > every - steps
        return self.draft_tokens if better != probes else 0

    def observe(self, num_seqs: int, drafts: int, num_tokens: int, seconds: float) -> None:
        """A decode step of so many sequences drew `num_tokens` in `seconds`."""
        if not self.draft_tokens or not num_seqs or seconds <= 0:
            return
        catches_up = self.lags and self._was_plain and drafts > 0
        self._was_plain = not drafts
        if not catches_up:
            self._pace(num_seqs.bit_length(), drafted=drafts > 0).add(num_tokens / seconds)

    def _pace(self, size: int, *, drafted: bool) -> Pace:
        return self._paces.setdefault((size, drafted), Pace())
