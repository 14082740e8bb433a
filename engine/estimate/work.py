"""What one device has done since start-up, by our own count: its FLOPs, and bytes of its memory.

The loop's thread adds up rows and the tokens that they see; the count is taken of their means when somebody asks, which
is exact where costs are linear: not in chunks of different lengths, nor where a window ends within a sequence.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from engine.batch import StepKey
from engine.config import EngineConfig
from engine.draft_model import most_new
from engine.estimate.count import Count, Span, Step, count_step
from engine.model.config import ModelConfig
from engine.plan import StepPlan


@dataclass(slots=True)
class Done:
    """Calls of one program."""

    turns: int = 0  # forward passes
    decoded: int = 0  # sequences, in each turn
    keys: int = 0  # tokens that they saw, their own included
    chunks: int = 0
    chunk_tokens: int = 0
    chunk_starts: int = 0  # tokens before each chunk

    def add(self, plan: StepPlan, turns: int) -> None:
        rows = plan.decode_rows
        self.turns += turns
        self.decoded += len(rows) * turns
        self.keys += turns * sum(rows.starts) + len(rows) * turns * (turns + 1) // 2
        self.chunks += len(plan.prefill_rows)
        self.chunk_tokens += plan.num_prefill_tokens
        self.chunk_starts += sum(row.start for row in plan.prefill_rows)

    def step(self, config: EngineConfig, key: StepKey) -> Step:
        """The mean turn, of one group of requests."""
        width = key.drafts + 1
        of_turn = 1.0 / (self.turns * config.num_groups)
        spans = []
        if self.chunks:
            mean = self.chunk_tokens / self.chunks, self.chunk_starts / self.chunks
            spans.append(Span(*mean, self.chunks * of_turn))  # type: ignore[arg-type]
        if self.decoded:
            spans.append(Span(width, self.keys / self.decoded - 1, self.decoded * of_turn))  # type: ignore[arg-type]
        drawn = key.rows * width + (config.max_prefill_rows if key.tokens else 0)
        return Step(key.tokens + key.rows * width, drawn, tuple(spans), each=width if key.drafts else 0)

    def drafting(self, draft: ModelConfig, config: EngineConfig, key: StepKey) -> Iterator[Step]:
        """What the draft model does beside the mean turn: it reads the chunks, or proposes token by token. That it
        catches up now and then is not counted."""
        spans = self.step(config, key).spans
        if self.chunks:
            yield Step(key.tokens, 0, spans[:1])
        for i in range(key.drafts if self.decoded else 0):
            width = 1 if i else most_new(draft, key.drafts)
            span = replace(spans[0], tokens=width, start=spans[0].start + i - width + 1)
            yield Step(key.rows * width, key.rows, (span,), each=width)


@dataclass(slots=True)
class Work:
    """`add` by the loop's thread, `totals` by any."""

    model: ModelConfig
    config: EngineConfig
    flops: float = 0.0
    memory_bytes: float = 0.0
    _done: dict[StepKey, Done] = field(default_factory=dict)  # not counted yet
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, key: StepKey, plan: StepPlan) -> None:
        turns = 1 if key.tokens or key.drafts else plan.num_steps
        with self._lock:
            self._done.setdefault(key, Done()).add(plan, turns)

    def totals(self) -> tuple[float, float]:
        """(FLOPs, bytes); takes milliseconds for each program that ran since it was last asked."""
        with self._lock:
            done, self._done = self._done, {}
        for key, ran in done.items():
            counted = count_step(self.model, self.config, ran.step(self.config, key))
            if self.config.draft is not None:
                drafting = self.config.draft.model, self.config.of_draft(self.config.draft)
                counted += sum(
                    (count_step(*drafting, step) for step in ran.drafting(drafting[0], self.config, key)), Count()
                )
            self.flops += counted.all_flops * ran.turns
            self.memory_bytes += counted.memory_bytes * ran.turns
        return self.flops, self.memory_bytes

    def adopt(self, config: EngineConfig) -> None:
        """From here on steps are those of `config`."""
        self.totals()
        self.config = config
