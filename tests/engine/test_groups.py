"""Several groups of requests under one scheduler: balanced, in step, and each with its own books. No JAX."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.groups import GroupedScheduler, scheduler_of
from engine.plan import DecodeResult, RowResult, StepPlan, StepResult
from engine.scheduler import Scheduler
from engine.stats import Counters
from sharding.shards import Axis, Shards
from tests.engine.fakes import CONFIG, FakeRunner, columns, expected_tokens, request

DIVIDED = Shards((Axis("data", 3),), (("requests", ("data",)),))


def config(**changes: object) -> EngineConfig:
    return replace(CONFIG, shards=DIVIDED, **changes)  # type: ignore[arg-type]


def grouped(**changes: object) -> GroupedScheduler:
    made = scheduler_of(config(**changes), Counters())
    assert isinstance(made, GroupedScheduler)
    return made


class Devices:
    """A fake device a group; a step is prefill or decode for all of them."""

    def __init__(self, config: EngineConfig) -> None:
        self.groups = [FakeRunner(config) for _ in range(config.num_groups)]

    def run(self, plan: StepPlan) -> StepResult:
        if plan.prefill_rows and any(row.count != 1 for row in plan.decode_rows):
            raise AssertionError("rows that ride along draw one token")
        parts = [plan.of_group(group) for group in range(len(self.groups))]
        done = [
            runner.launch(part).result() if part.prefill_rows or part.decode_rows else StepResult((), columns(()), ())
            for runner, part in zip(self.groups, parts, strict=True)
        ]
        prefill, decode = [iter(result.prefill) for result in done], [iter(rows_of(result.decode)) for result in done]
        prompt = [iter(result.prompt_logprobs) for result in done]
        return StepResult(
            tuple(next(prefill[row.seq.group]) for row in plan.prefill_rows),
            columns([next(decode[row.seq.group]) for row in plan.decode_rows]),
            tuple(next(prompt[row.seq.group]) for row in plan.prefill_rows),
        )


def rows_of(result: DecodeResult) -> list[RowResult]:
    return [result[i] for i in range(len(result.num_drawn))]


def step(scheduler: GroupedScheduler, devices: Devices) -> StepPlan | None:
    plan = scheduler.plan()
    if plan is not None:
        scheduler.commit(plan, devices.run(plan))
    scheduler.check()
    return plan


def test_one_group_is_a_plain_scheduler() -> None:
    assert isinstance(scheduler_of(CONFIG, Counters()), Scheduler)


def test_requests_go_where_least_is_to_do() -> None:
    scheduler, devices = grouped(), Devices(config())
    for i in range(6):
        scheduler.add(request(str(i), 9, max_tokens=20))
        step(scheduler, devices)
    assert [len(group.running) for group in scheduler.groups] == [2, 2, 2]
    scheduler.abort("1")
    scheduler.add(request("new", 9))
    assert [seq.group for seq in scheduler.waiting] == [1], "a choice of group 1 ended"
    scheduler.add(request("choices", 9, n=3))
    assert len({seq.group for seq in scheduler.waiting if seq.request.request_id == "choices"}) == 1


def test_groups_prefill_and_decode_together() -> None:
    scheduler, devices = grouped(), Devices(config())
    scheduler.add(request("a", 9, max_tokens=30))
    step(scheduler, devices)
    plan = step(scheduler, devices)
    assert plan is not None and [row.count for row in plan.decode_rows] == [CONFIG.decode_steps]
    scheduler.add(request("b", 9, max_tokens=30))
    plan = step(scheduler, devices)
    assert plan is not None and len(plan.prefill_rows) == 1
    assert [row.count for row in plan.decode_rows] == [1], "it rides along with the other group's prompt"
    assert [plan.of_group(group).prefill_rows for group in range(3)] == [(), plan.prefill_rows, ()]


def test_tokens_are_proposed_for_all_groups_or_none() -> None:
    scheduler, devices = grouped(draft_tokens=3), Devices(config(draft_tokens=3))
    for name in "ab":
        scheduler.add(request(name, 9, max_tokens=30))
    step(scheduler, devices)
    plan = step(scheduler, devices)
    assert plan is not None and (plan.drafts, list(plan.decode_rows.counts)) == (3, [4, 4])
    scheduler.add(request("c", 9, max_tokens=30))
    plan = step(scheduler, devices)
    assert plan is not None and plan.prefill_rows and (plan.drafts, list(plan.decode_rows.counts)) == (0, [1, 1])


def test_requests_without_a_seed_get_their_own() -> None:
    scheduler = grouped()
    for i in range(6):
        scheduler.add(request(str(i), 9))
    assert len({seq.seed for seq in scheduler.waiting}) == 6


@pytest.mark.parametrize("seed", range(5))
def test_tokens_do_not_depend_on_the_group(seed: int) -> None:
    rng = random.Random(seed)
    pages = rng.choice([CONFIG.num_pages, 12])
    scheduler, devices = grouped(num_pages=pages), Devices(config(num_pages=pages))
    seqs = []
    for i in range(12):
        scheduler.add(request(str(i), rng.randrange(1, 20), max_tokens=rng.randrange(1, 12)))
        seqs += [seq for seq in scheduler.waiting if seq.request.request_id == str(i)]
        plan = scheduler.plan()
        if plan is not None:
            scheduler.commit(plan, devices.run(plan))
    while (plan := scheduler.plan()) is not None:
        scheduler.commit(plan, devices.run(plan))
        scheduler.check()
    assert not scheduler.running and not scheduler.waiting and not scheduler.num_held_pages
    assert {seq.group for seq in seqs} == {0, 1, 2}
    for seq in seqs:
        assert seq.token_ids[seq.prompt_len :] == expected_tokens(seq.request, seq.seed)
