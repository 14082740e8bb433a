"""Several groups of devices under one engine, each with its own slots, pages and requests (data-parallel attention).

One `Scheduler` a group; a step is one program for all of them, so that they decode or prefill together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from engine.config import EngineConfig
from engine.plan import DecodeRows, StepPlan, StepResult
from engine.prefix_cache import PrefixCache
from engine.request import Request, TokenEvent
from engine.scheduler import Scheduler, Together
from engine.sequence import Sequence
from engine.stats import Counters


class GroupedScheduler:
    """The schedulers of all groups behind the face of one; a request goes to the group that has least to do."""

    def __init__(self, config: EngineConfig, counters: Counters) -> None:
        self.groups = [Scheduler(config, counters, group) for group in range(config.num_groups)]
        first = self.groups[0]
        self.prompt_budget, self.call_length = first.prompt_budget, first.call_length
        self.speculation = first.speculation  # which the others do not ask
        for group in self.groups:
            group.prompt_budget, group.call_length = self.prompt_budget, self.call_length

    @property
    def waiting(self) -> list[Sequence]:
        return [seq for group in self.groups for seq in group.waiting]

    @property
    def running(self) -> list[Sequence]:
        return [seq for group in self.groups for seq in group.running]

    @property
    def prompts(self) -> list[Sequence]:
        return [seq for group in self.groups for seq in group.prompts]

    @property
    def num_held_pages(self) -> int:
        return sum(group.num_held_pages for group in self.groups)

    @property
    def cache(self) -> PrefixCache:
        """Of the first group: research borrows pages there."""
        return self.groups[0].cache

    def sequences(self) -> Iterator[Sequence]:
        return itertools.chain.from_iterable(group.sequences() for group in self.groups)

    def validate(self, request: Request) -> int:
        return self.groups[0].validate(request)

    def add(self, request: Request) -> None:
        """All choices of a request stay together: they share their prompt's pages."""
        min(self.groups, key=lambda group: (len(group.running) + len(group.waiting), group.num_held_pages)).add(request)

    def abort(self, request_id: str) -> list[TokenEvent]:
        return [event for group in self.groups for event in group.abort(request_id)]

    def end(self, request_id: str, index: int) -> None:
        for group in self.groups:
            group.end(request_id, index)

    def plan(self) -> StepPlan | None:
        """The next step of all groups; where one has prompts to compute, the others' rows ride along, and where tokens
        are proposed, they are for all."""
        mixed = any(group.has_prompts for group in self.groups)
        drafts = 0 if mixed else self.speculation.drafts(sum(len(group.running) for group in self.groups))
        plans = [plan for group in self.groups if (plan := group.plan(Together(mixed, drafts))) is not None]
        if not plans:
            return None
        prefill = tuple(row for plan in plans for row in plan.prefill_rows)
        admitted = tuple(seq for plan in plans for seq in plan.admitted)
        decode = DecodeRows.of(row for plan in plans for row in plan.decode_rows)
        wants_logprobs = any(plan.wants_logprobs for plan in plans)
        return StepPlan(prefill, decode, admitted, drafts, wants_logprobs)

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        events = []
        for index, group in enumerate(self.groups):
            part = plan.of_group(index)
            if not part.prefill_rows and not part.decode_rows:
                continue  # it planned no step
            prefill = [i for i, row in enumerate(plan.prefill_rows) if row.seq.group == index]
            decode = [i for i, seq in enumerate(plan.decode_rows.seqs) if seq.group == index]
            of_group = StepResult(
                tuple(result.prefill[i] for i in prefill),
                result.decode.take(np.asarray(decode, np.intp)),
                tuple(result.prompt_logprobs[i] for i in prefill),
            )
            events += group.commit(part, of_group)
        return events

    def fail_all(self, message: str) -> list[TokenEvent]:
        return [event for group in self.groups for event in group.fail_all(message)]

    def check_capacity(self, config: EngineConfig) -> None:
        for group in self.groups:
            group.check_capacity(config)

    def restart(self, config: EngineConfig) -> None:
        for group in self.groups:
            group.restart(config)

    def check(self) -> None:
        for group in self.groups:
            group.check()


def scheduler_of(config: EngineConfig, counters: Counters) -> Scheduler | GroupedScheduler:
    return Scheduler(config, counters) if config.num_groups == 1 else GroupedScheduler(config, counters)
