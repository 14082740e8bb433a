"""Continuous batching over the device of `fakes`: admission, chunks, preemption, sharing, endings.

`Sim` drives the scheduler as the loop does, with up to one step in flight, and checks the books.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import CapacityError, ContextOverflow
from engine.plan import StateMove, StepPlan
from engine.request import FinishReason, Request, TokenEvent
from engine.scheduler import Scheduler
from engine.sequence import State
from engine.stats import Counters
from tests.engine.fakes import CONFIG, FakePending, FakeRunner, config, expected_tokens, prompt_logprob, request

CAPACITY = (CONFIG.num_pages - 1) * CONFIG.page_size


@dataclass
class Sim:
    """A scheduler, its device, and everything that came out."""

    config: EngineConfig = CONFIG
    depth: int = 0  # steps that may be in flight while the next is planned
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    endings: dict[tuple[str, int], FinishReason] = field(default_factory=dict)
    events: list[TokenEvent] = field(default_factory=list)
    seeds: dict[tuple[str, int], int] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config, Counters())
        self.runner = FakeRunner(self.config)
        self.in_flight: deque[FakePending] = deque()

    def add(self, name: str, prompt: Any, **params: Any) -> Request:
        made = request(name, prompt, **params)
        self.scheduler.add(made)
        self.requests[name] = made
        self.seeds |= {(name, s.index): s.seed for s in self.scheduler.waiting if s.request is made}
        return made

    def step(self) -> StepPlan | None:
        """Plan and launch; then read what is too many in flight."""
        plan = self.scheduler.plan()
        if plan is not None:
            self.in_flight.append(self.runner.launch(plan))
        while len(self.in_flight) > (self.depth if plan is not None else 0):
            pending = self.in_flight.popleft()
            self.take(self.scheduler.commit(pending.plan, pending.result()))
        self.scheduler.check()
        return plan

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            key = event.request_id, event.index
            assert key not in self.endings, f"{key} got news after its ending"
            self.events.append(event)
            self.tokens.setdefault(key, []).extend(event.token_ids)
            if event.finish_reason is not None:
                self.endings[key] = event.finish_reason

    def run(self, max_steps: int = 2000) -> list[StepPlan]:
        plans = []
        for _ in range(max_steps):
            busy = bool(self.in_flight)
            plan = self.step()
            if plan is not None:
                plans.append(plan)
            elif not busy:
                assert not list(self.scheduler.sequences()), "nothing can run, yet somebody waits"
                return plans
        raise AssertionError("no end")

    def abort(self, name: str) -> None:
        self.take(self.scheduler.abort(name))
        self.scheduler.check()

    def check_tokens(self) -> None:
        """Every choice that came to its own end has exactly the model's tokens."""
        for (name, index), reason in self.endings.items():
            expected = expected_tokens(self.requests[name], self.seeds[name, index], self.config.max_model_len)
            got = self.tokens[name, index]
            assert got == (expected if reason is not FinishReason.ABORT else expected[: len(got)]), (name, index)


# -- never fits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field_name"),
    [
        (63, 1, None),  # max_model_len is 64
        (64, 0, None),
        (64, 1, "prompt"),
        (64, None, "prompt"),
        (65, 0, "prompt"),
        (63, 2, "max_tokens"),
        (1, 63, None),
        (1, 64, "max_tokens"),
        (63, None, None),
        (0, 1, "prompt"),
    ],
)
def test_context_is_the_bound(prompt: int, max_tokens: int | None, field_name: str | None) -> None:
    sim = Sim()
    if field_name is not None:
        with pytest.raises(ContextOverflow) as error:
            sim.add("a", prompt, max_tokens=max_tokens)
        assert error.value.param == field_name and not list(sim.scheduler.sequences())
        return
    sim.add("a", prompt, max_tokens=max_tokens)
    sim.run()
    sim.check_tokens()
    assert sim.endings == {("a", 0): FinishReason.LENGTH}
    assert len(sim.tokens["a", 0]) == (64 - prompt if max_tokens is None else max_tokens)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "length"),
    [(18, 1, 19), (19, 1, 20), (20, 0, 20), (20, 1, None), (20, None, None), (21, 0, None), (19, None, 20)],
)
def test_pages_are_the_bound(prompt: int, max_tokens: int | None, length: int | None) -> None:
    """Five pages of four tokens: a sequence of 20 tokens runs alone, one of 21 never would."""
    sim = Sim(config(num_pages=6))
    if length is None:
        with pytest.raises(ContextOverflow, match="KV cache; there are 20 in all"):
            sim.add("a", prompt, max_tokens=max_tokens)
        return
    sim.add("a", prompt, max_tokens=max_tokens)
    sim.run()
    assert prompt + len(sim.tokens["a", 0]) == length and sim.endings["a", 0] is FinishReason.LENGTH


# -- chunks and budgets -----------------------------------------------------------------------


def test_a_prompt_goes_in_chunks_within_the_budget() -> None:
    sim = Sim()
    sim.add("a", 37, max_tokens=2)
    plans = sim.run()
    assert [plan.num_prefill_tokens for plan in plans] == [16, 16, 5, 0]
    assert [row.samples for plan in plans for row in plan.prefill_rows] == [False, False, True]
    sim.check_tokens()


def test_several_prompts_share_a_step_up_to_its_rows() -> None:
    sim = Sim(config(max_prefill_rows=3))
    for name in "abcd":
        sim.add(name, 3, max_tokens=1)
    first, second = sim.run()
    assert [row.seq.request.request_id for row in first.prefill_rows] == ["a", "b", "c"]
    assert [row.seq.request.request_id for row in second.prefill_rows] == ["d"]


def test_decoding_rides_along_with_prefill_for_one_token() -> None:
    sim = Sim()
    sim.add("a", 4, max_tokens=20)
    sim.step()
    assert [row.count for row in (sim.step() or pytest.fail()).decode_rows] == [3]
    sim.add("b", 40, max_tokens=4)
    for _ in range(3):
        plan = sim.step()
        assert plan is not None and plan.prefill_rows and [row.count for row in plan.decode_rows] == [1]
    plan = sim.step()
    assert plan is not None and [row.count for row in plan.decode_rows] == [3, 3]
    sim.run()
    sim.check_tokens()


def test_max_tokens_zero_draws_nothing() -> None:
    for depth in (0, 1):
        sim = Sim(depth=depth)
        sim.add("a", 37, max_tokens=0)
        sim.run()
        assert sim.tokens == {("a", 0): []} and sim.endings == {("a", 0): FinishReason.LENGTH}
        assert len(sim.events) == 1


def test_first_come_first_served() -> None:
    """A short request does not overtake a long one that waits for pages."""
    sim = Sim(config(num_pages=12))
    sim.add("a", 30, max_tokens=10)
    sim.add("long", 40, max_tokens=1)
    sim.add("short", 2, max_tokens=1)
    sim.run()
    assert list(sim.endings) == [("a", 0), ("long", 0), ("short", 0)]
    sim.check_tokens()


def chunks(plan: StepPlan | None) -> dict[str, int]:
    """Prompt tokens of each request in a step."""
    assert plan is not None
    return {row.seq.request.request_id: row.count for row in plan.prefill_rows}


def test_short_prompts_do_not_wait_for_a_long_one_that_is_being_read() -> None:
    sim = Sim()
    sim.add("long", 62, max_tokens=2)
    assert chunks(sim.step()) == {"long": 16}
    for name, length in (("short", 6), ("next", 20), ("rival", 30)):
        sim.add(name, length, max_tokens=1)
    assert chunks(sim.step()) == {"long": 8, "short": 6, "next": 2}
    assert chunks(sim.step()) == {"long": 8, "next": 8}  # rival has no less to read than half of 30
    assert chunks(sim.step()) == {"long": 8, "next": 8}
    assert chunks(sim.step()) == {"long": 14, "next": 2}
    assert chunks(sim.step()) == {"long": 8, "rival": 8}  # which fits behind the rest of it
    sim.run()
    assert list(sim.endings) == [("short", 0), ("next", 0), ("long", 0), ("rival", 0)]
    sim.check_tokens()


def test_a_long_prompt_is_held_up_by_no_more_than_its_own_time() -> None:
    """A short one comes with every step; it is read in twice the steps that it takes alone."""
    sim, steps = Sim(), 0
    sim.add("long", 63, max_tokens=1)
    while ("long", 0) not in sim.endings:
        sim.add(f"short {steps}", 8, max_tokens=1)
        assert chunks(sim.step())["long"] >= 8
        steps += 1
    assert 2 * 4 - 1 <= steps <= 2 * 4


def test_prompts_of_one_length_are_read_one_after_the_other() -> None:
    """The first of them would gain nothing, and all others lose."""
    sim = Sim()
    for name in "abc":
        sim.add(name, 30, max_tokens=1)
    found = [chunks(plan) for plan in sim.run() if plan.prefill_rows]
    assert found == [{"a": 16}, {"a": 14, "b": 2}, {"b": 16}, {"b": 12, "c": 4}, {"c": 16}, {"c": 10}]


# -- preemption -------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1])
def test_the_newest_are_preempted_and_nothing_is_lost(depth: int) -> None:
    sim = Sim(config(num_pages=14), depth)
    for name in "abcd":
        sim.add(name, 6, max_tokens=30)
    preempted: list[str] = []
    before: Counter[str] = Counter()
    while list(sim.scheduler.sequences()):
        sim.step()
        now = Counter({s.request.request_id: s.num_preemptions for s in sim.scheduler.sequences()})
        preempted += list((now - before).keys())
        before |= now
        orders = [s.order for s in sim.scheduler.running]
        waiting = [s.order for s in sim.scheduler.waiting]
        assert orders == sorted(orders) and waiting == sorted(waiting)
        assert not orders or not waiting or max(orders) < min(waiting), "somebody was overtaken"
    assert preempted and "a" not in preempted
    assert sim.scheduler.counters.num_preemptions == sum(before.values())
    assert sum(before.values()) < 12, "recomputing must not be the main work"
    sim.check_tokens()
    assert len(sim.endings) == 4


def test_what_ran_starts_again_with_other_pages() -> None:
    sim = Sim()
    for name in "ab":
        sim.add(name, 9, max_tokens=7)
    sim.step()
    sim.step()
    with pytest.raises(CapacityError, match="may become 16 tokens long; there would be pages for"):
        sim.scheduler.check_capacity(config(num_pages=2))
    fewer = config(num_pages=CONFIG.num_pages - 1)
    sim.scheduler.check_capacity(fewer)
    sim.scheduler.restart(fewer)
    sim.scheduler.check()
    assert not sim.scheduler.running and sim.scheduler.cache.pool.num_pages == fewer.num_pages
    sim.run()
    sim.check_tokens()


def test_nobody_is_admitted_into_the_next_page_of_the_running() -> None:
    sim = Sim(config(num_pages=8))
    sim.add("a", 12, max_tokens=12)
    sim.add("b", 16, max_tokens=1)
    assert [row.seq.request.request_id for row in (sim.step() or pytest.fail()).prefill_rows] == ["a"]
    sim.run()
    sim.check_tokens()
    assert sim.scheduler.counters.num_preemptions == 0


# -- sharing ----------------------------------------------------------------------------------


def test_choices_share_the_pages_of_their_prompt() -> None:
    sim = Sim()
    sim.add("a", 13, n=4, max_tokens=3, seed=5)
    most = 0
    while sim.step() is not None:
        most = max(most, sim.scheduler.cache.pool.num_held)
    assert most == 3 + 4, "three full pages once, and for each choice one that it writes itself"
    assert len(set(sim.seeds.values())) == 4
    sim.check_tokens()
    cached = [e.num_cached_tokens for e in sim.events if e.finish_reason is not None]
    assert sorted(cached) == [0, 12, 12, 12]


def test_without_prefix_cache_nothing_is_shared() -> None:
    sim = Sim(config(enable_prefix_caching=False, max_num_batched_tokens=64))
    sim.add("a", 13, n=4, max_tokens=3)
    most = 0
    while sim.step() is not None:
        most = max(most, sim.scheduler.cache.pool.num_held)
    assert most == 16
    sim.check_tokens()


def test_an_equal_prompt_is_found_but_its_last_token_is_computed() -> None:
    sim = Sim()
    prompt = list(range(16))
    for name, salt in (("a", ""), ("b", ""), ("c", "other")):
        sim.add(name, prompt, max_tokens=3, salt=salt)
        sim.run()
    assert [e.num_cached_tokens for e in sim.events if e.finish_reason] == [0, 12, 0]
    assert sim.scheduler.counters.prefix_hits_tokens == 12 and sim.scheduler.counters.prefix_queries_tokens == 48
    sim.check_tokens()


@pytest.mark.parametrize(("max_tokens", "cached"), [(17, 24), (18, 24), (19, 28), (20, 28)])
def test_output_is_found_by_the_next_turn(max_tokens: int, cached: int) -> None:
    """All full pages with KV: the last token has none, it was never fed."""
    sim = Sim()
    first = sim.add("a", 10, max_tokens=max_tokens)
    sim.run()
    sim.add("b", [*first.prompt_token_ids, *sim.tokens["a", 0], 1, 2], max_tokens=3)
    sim.run()
    assert sim.events[-1].num_cached_tokens == cached
    sim.check_tokens()


# -- recurrent states -------------------------------------------------------------------------


def stateful(checkpoints: int, **changes: object) -> Sim:
    return Sim(config(state_checkpoints=checkpoints, **changes))


def ask(sim: Sim, name: str, prompt: list[int]) -> int:
    """Tokens of the prompt that were not computed."""
    sim.add(name, prompt, max_tokens=2)
    sim.run()
    sim.check_tokens()
    return sim.events[-1].num_cached_tokens


def test_a_prompt_continues_from_the_last_page_border_of_an_equal_one() -> None:
    """Of those before its last token."""
    sim = stateful(4, max_num_batched_tokens=64)
    prompt = list(range(20))
    asked = [("a", prompt), ("b", prompt), ("c", [*prompt, 7, 8]), ("d", [*prompt, 7]), ("e", prompt[:9])]
    assert [ask(sim, name, tokens) for name, tokens in asked] == [0, 16, 16, 20, 0]
    moves = [row.state for plan in sim.runner.plans for row in plan.prefill_rows]
    assert moves[:3] == [StateMove(-1, 5, 16), StateMove(5), StateMove(5, 6, 4)]


def test_where_prompts_part_a_state_is_kept() -> None:
    """The second one of a stem finds where it ends, and leaves a state there for the third."""
    sim = stateful(4, max_num_batched_tokens=64)
    stem = list(range(17))
    prompts = {"a": [*stem, *range(50, 56)], "b": [*stem, *range(60, 69)], "c": [*stem, 70, 71]}
    assert [ask(sim, name, prompt) for name, prompt in prompts.items()] == [0, 0, 16]
    assert [row.count for plan in sim.runner.plans for row in plan.prefill_rows] == [23, 16, 10, 3]


def test_each_chunk_leaves_a_state() -> None:
    sim = stateful(8, max_num_batched_tokens=10)
    ask(sim, "a", list(range(35)))
    moves = [row.state for plan in sim.runner.plans for row in plan.prefill_rows]
    assert [move.copy_at for move in moves if move] == [8, 10, 8, 2]  # after tokens 8, 20, 28 and 32
    assert [ask(sim, f"b{n}", [*range(n), 99]) for n in (9, 21, 31)] == [8, 20, 28]


def test_choices_wait_for_the_state_of_their_prompt() -> None:
    sim = stateful(1)
    sim.add("a", 13, n=4, max_tokens=3, seed=5)
    sim.run()
    sim.check_tokens()
    assert sorted(e.num_cached_tokens for e in sim.events if e.finish_reason) == [0, 12, 12, 12]


def test_checkpoints_go_least_recently_used_first() -> None:
    sim = stateful(2)
    for name, first in (("a", 1), ("b", 2), ("a2", 1), ("c", 3)):
        ask(sim, name, [first] * 5)
    assert [ask(sim, name, [first] * 5) for name, first in (("a3", 1), ("b2", 2))] == [4, 0]


def test_without_checkpoints_nothing_is_reused() -> None:
    sim = stateful(0)
    assert [ask(sim, name, list(range(20))) for name in "ab"] == [0, 0]
    assert [row.count for plan in sim.runner.plans for row in plan.prefill_rows] == [16, 4, 16, 4]


def test_states_of_a_faulty_prompt_are_forgotten() -> None:
    """Also where its pages were known before, and the state was its own."""
    sim = stateful(2, max_num_batched_tokens=64)
    stem = list(range(12))
    ask(sim, "a", [*stem, *range(50, 60)])
    sim.runner.faulty.add("bad")
    sim.add("bad", [*stem, 77], max_tokens=3)  # leaves a state at the end of the stem, in a page of a
    sim.run()
    assert sim.endings.pop(("bad", 0)) is FinishReason.ERROR
    assert ask(sim, "b", [*stem, 78]) == 0


# -- prompt logprobs --------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_prompt_logprobs_are_whole_and_never_from_the_cache(depth: int, max_tokens: int) -> None:
    sim = Sim(depth=depth)
    prompt = [(7 * i) % 100 for i in range(41)]
    sim.add("warm", prompt, max_tokens=1)
    sim.run()
    sim.add("a", prompt, max_tokens=max_tokens, prompt_logprobs=2, n=2)
    sim.run()
    sim.check_tokens()
    got = [e for e in sim.events if e.prompt_logprobs is not None]
    assert [(e.request_id, e.index) for e in got] == [("a", 0)] and got[0].num_cached_tokens == 0
    found = got[0].prompt_logprobs
    assert found is not None and len(found) == 41 and found[0] is None
    for position, item in enumerate(found[1:], start=1):
        assert item is not None and item.token_id == prompt[position]
        assert item.logprob == prompt_logprob(prompt[position], position) and len(item.top) == 2


def test_prompt_logprobs_survive_preemption() -> None:
    for depth in (0, 1):
        sim = Sim(config(num_pages=14, max_num_batched_tokens=5), depth)
        sim.add("a", 8, max_tokens=40)
        sim.add("b", 8, max_tokens=30)
        for _ in range(6):
            sim.step()
        sim.add("c", 23, max_tokens=4, prompt_logprobs=0)
        sim.run()
        sim.check_tokens()
        (found,) = [e.prompt_logprobs for e in sim.events if e.prompt_logprobs is not None]
        assert [p and p.logprob for p in found][1:] == [
            prompt_logprob(t, i) for i, t in enumerate(sim.requests["c"].prompt_token_ids) if i
        ]


# -- endings ----------------------------------------------------------------------------------


def test_a_stop_token_ends_only_after_min_tokens() -> None:
    first = expected_tokens(request("a", 5, max_tokens=12), 0)
    sim = Sim()
    for name, params in {
        "now": {"stop_token_ids": (first[0],)},
        "later": {"min_tokens": 4, "end": (first[0],)},
    }.items():
        sim.add(name, request("a", 5).prompt_token_ids, max_tokens=12, seed=0, **params)
    sim.run()
    assert sim.tokens["now", 0] == first[:1] and sim.endings["now", 0] is FinishReason.STOP
    assert sim.tokens["later", 0] == first and sim.endings["later", 0] is FinishReason.LENGTH
    assert [e.stop_token_id for e in sim.events if e.request_id == "now"] == [first[0]]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("steps", range(7))
def test_abort_in_every_state(depth: int, steps: int) -> None:
    """Queued, between chunks, sampled, decoding, preempted; with and without a step in flight."""
    sim = Sim(config(num_pages=20), depth)
    sim.add("keep", 6, max_tokens=30)
    sim.add("gone", 30, max_tokens=20, n=2)
    for _ in range(steps):
        sim.step()
    sim.abort("gone")
    sim.abort("gone")
    sim.abort("unknown")
    assert sim.endings[("gone", 0)] is sim.endings[("gone", 1)] is FinishReason.ABORT
    sim.run()
    assert sim.endings[("keep", 0)] is FinishReason.LENGTH
    sim.check_tokens()
    assert not sim.scheduler.cache.pool.num_held and len(sim.scheduler._free_slots) == 4


def test_finish_twice_and_while_in_flight_is_harmless() -> None:
    sim = Sim(depth=1)
    sim.add("a", 6, max_tokens=30)
    sim.step()
    sim.step()
    seq = next(s for s in sim.scheduler.sequences() if (s.request.request_id, s.index) == ("a", 0))
    assert sim.scheduler.in_flight(seq)
    sim.scheduler.finish(seq)
    sim.scheduler.finish(seq)
    sim.add("b", 6, max_tokens=5)  # takes the slot while the old step is in flight
    sim.run()
    assert ("a", 0) not in sim.endings and seq.state is State.FINISHED and not sim.scheduler.in_flight(seq)
    sim.check_tokens()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_faulty_row_ends_alone_and_its_pages_are_forgotten(depth: int) -> None:
    sim = Sim(depth=depth)
    prompt = list(range(20))
    sim.runner.faulty.add("bad")
    sim.add("good", 9, max_tokens=9)
    sim.add("bad", prompt, max_tokens=9)
    sim.run()
    assert sim.endings == {("good", 0): FinishReason.LENGTH, ("bad", 0): FinishReason.ERROR}
    assert "not finite" in (next(e for e in sim.events if e.finish_reason is FinishReason.ERROR).error or "")
    sim.add("again", prompt, max_tokens=3)
    sim.run()
    assert sim.events[-1].num_cached_tokens == 0
    del sim.endings["bad", 0]
    sim.check_tokens()


def test_fail_all_ends_everybody_and_forgets_everything() -> None:
    sim = Sim(depth=1)
    prompt = list(range(20))
    for i in range(6):
        sim.add(f"r{i}", prompt, max_tokens=9)
    sim.step()
    sim.step()
    sim.in_flight.clear()
    sim.take(sim.scheduler.fail_all("why"))
    sim.scheduler.check()
    assert list(sim.endings.values()) == [FinishReason.ERROR] * 6 and {e.error for e in sim.events[-6:]} == {"why"}
    sim.runner.reset()
    sim.add("after", prompt, max_tokens=9)
    sim.run()
    assert sim.events[-1].num_cached_tokens == 0
    sim.endings = {("after", 0): sim.endings["after", 0]}
    sim.check_tokens()


def test_counters() -> None:
    sim = Sim()
    sim.add("a", 10, max_tokens=7, n=2)
    sim.add("b", 5, max_tokens=0)
    sim.run()
    counters = sim.scheduler.counters
    assert counters.prompt_tokens == 15 and counters.generation_tokens == 14 and counters.num_preemptions == 0


def test_seeds() -> None:
    """Given seeds repeat; without one, requests differ, and the engine's seed decides."""

    def seeds(base: int, *given: int | None) -> list[int]:
        sim = Sim(config(seed=base))
        for i, seed in enumerate(given):
            sim.add(f"r{i}", 3, n=2, seed=seed)
        return list(sim.seeds.values())

    assert seeds(0, 5, 5)[:2] == seeds(1, None, 5)[2:] and seeds(0, 5)[0] == 5
    assert seeds(0, None, None) == seeds(0, None, None) != seeds(1, None, None)
    assert len(set(seeds(0, None, None, 5, -5))) == 8
    assert all(0 <= seed < 1 << 64 for seed in seeds(0, -1, 2**64 - 1, None))


# -- random days ------------------------------------------------------------------------------


def random_day(seed: int, **changes: object) -> Sim:
    """Anything at any time; progress is bounded, and every token is right."""
    rng = random.Random(seed)
    sim = Sim(
        config(
            num_pages=rng.choice([17, 18, 20, 33]),
            max_num_batched_tokens=rng.choice([3, 7, 16]),
            max_prefill_rows=rng.choice([1, 3]),
            decode_steps=rng.choice([1, 3, 6]),
            max_num_seqs=rng.choice([1, 2, 4]),
            enable_prefix_caching=rng.random() < 0.8,
            **changes,
        ),
        depth=rng.choice([0, 1, 1, 2]),
    )
    stem = [rng.randrange(100) for _ in range(30)]
    for i in range(40):
        if i < 12 or rng.random() < 0.2:
            prompt = stem[: rng.randrange(30)] + [rng.randrange(100) for _ in range(rng.choice([1, 2, 9, 20]))]
            room = 64 - len(prompt)
            sim.add(
                f"r{i}",
                prompt,
                max_tokens=rng.choice([0, 1, 5, room, None]),
                n=rng.choice([1, 1, 2, 3]),
                stop_token_ids=tuple(rng.sample(range(251), 8)),
                salt=rng.choice(["", "", "x"]),
                prompt_logprobs=rng.choice([None, None, 1]),
            )
        for _ in range(rng.randrange(4)):
            sim.step()
        if rng.random() < 0.1:
            sim.abort(f"r{rng.randrange(40)}")
    patience = 0
    while list(sim.scheduler.sequences()):
        known = sum(map(len, sim.tokens.values())), len(sim.endings)
        sim.step()
        news = (sum(map(len, sim.tokens.values())), len(sim.endings)) != known
        patience = 0 if news else patience + 1
        assert patience < 64, "steps without news for anybody"
    sim.run()
    return sim


@pytest.mark.parametrize("block", range(4))
def test_random_days(block: int) -> None:
    num_steps, num_preemptions, num_hits = 0, 0, 0
    for seed in range(block * 25, block * 25 + 25):
        sim = random_day(seed)
        sim.check_tokens()
        choices = sum(made.params.n for made in sim.requests.values())
        assert len(sim.endings) == choices, "every choice has one ending"
        assert not sim.scheduler.cache.pool.num_held
        for event in sim.events:
            if event.prompt_logprobs is not None:
                assert len(event.prompt_logprobs) == len(sim.requests[event.request_id].prompt_token_ids)
        num_steps += len(sim.runner.plans)
        num_preemptions += sim.scheduler.counters.num_preemptions
        num_hits += sim.scheduler.counters.prefix_hits_tokens
    assert num_steps > 1000 and num_preemptions > 20 and num_hits > 1000


@pytest.mark.parametrize("checkpoints", [0, 1, 4])
def test_random_days_with_states(checkpoints: int) -> None:
    """The same with a recurrent state a sequence: hits need a checkpoint, and few must do."""
    num_preemptions, num_hits = 0, 0
    for seed in range(400, 430):
        sim = random_day(seed, state_checkpoints=checkpoints)
        sim.check_tokens()
        assert len(sim.endings) == sum(made.params.n for made in sim.requests.values())
        assert not sim.scheduler.cache.pool.num_held
        num_preemptions += sim.scheduler.counters.num_preemptions
        num_hits += sim.scheduler.counters.prefix_hits_tokens
    assert num_preemptions > 10 and (num_hits > 300) == (checkpoints > 0)


def test_the_device_of_these_tests_notices_a_wrong_page() -> None:
    sim = Sim()
    sim.add("a", 20, max_tokens=20)
    sim.step()
    sim.step()
    slot = sim.runner.slots[sim.scheduler.running[0].slot]
    slot.table[1], slot.table[2] = slot.table[2], slot.table[1]
    sim.run()
    with pytest.raises(AssertionError):
        sim.check_tokens()
