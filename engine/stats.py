"""Counters of the engine, as plain numbers. The server turns them into metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.phases import Phases


@dataclass(slots=True)
class Counters:
    """Monotonic counts, written by the loop thread alone."""

    num_preemptions: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    draft_tokens: int = 0  # proposed by speculation
    accepted_draft_tokens: int = 0
    texts: int = 0  # embedded or scored
    compiles: int = 0
    compile_s: float = 0.0
    compiles_after_ready: int = 0
    tokens_used: int = 0  # token positions that steps computed for somebody
    tokens_padded: int = 0  # token positions that buckets added
    ready: bool = False
    steps: dict[str, int] = field(default_factory=dict)  # program name -> calls
    step_s: dict[str, float] = field(default_factory=dict)  # program name -> seconds, each from when it could start
    phases: Phases = field(default_factory=Phases)
    work: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)  # FLOPs and bytes of a device, counted when asked
    expert_tokens: np.ndarray | None = None  # int64 [layers with experts, experts], tokens that chose each

    def snapshot(self) -> dict[str, Any]:
        """The fields of `EngineStats` that are counted here, as they stand."""
        names = {f.name for f in dataclasses.fields(self)} - {"ready", "phases", "work"}
        found = {name: getattr(self, name) for name in names}
        found["flops"], found["memory_bytes"] = self.work()
        return found | {"steps": dict(self.steps), "step_s": dict(self.step_s), "phase_s": dict(self.phases.seconds)}

    def chose(self, expert_tokens: np.ndarray | None) -> None:
        """Add a step's choices of experts. The sum is a new array: a reader may hold the old one."""
        if expert_tokens is not None:
            so_far = 0 if self.expert_tokens is None else self.expert_tokens
            self.expert_tokens = so_far + expert_tokens.astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of `Counters` with the gauges of the moment."""

    num_running: int
    num_waiting: int
    kv_usage: float  # held pages / all pages, 0 to 1
    num_preemptions: int
    prefix_queries_tokens: int
    prefix_hits_tokens: int
    prompt_tokens: int
    generation_tokens: int
    compiles: int
    compile_s: float
    compiles_after_ready: int
    steps: Mapping[str, int]
    step_s: Mapping[str, float]
    phase_s: Mapping[str, float]  # of the loop's thread
    tokens_used: int
    tokens_padded: int
    last_step_age_s: float  # since the last committed step; 0 when idle
    flops: float = 0.0  # of one device, as `engine/estimate` counts them
    memory_bytes: float = 0.0  # that it read and wrote, likewise
    texts: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    expert_tokens: np.ndarray | None = None  # as in `Counters`
