"""The host's part of a step, over a device of no cost: counted in calls, as seconds are a busy machine's affair."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from types import FrameType
from typing import Any

import pytest

from benchmarks.fake_device import FakeDevice, fake_engine
from benchmarks.steps import Load, chrome_trace, measure, submit
from engine.loop import Engine
from engine.phases import PHASES, Span
from engine.request import Request, SamplingParams, TextDelta
from engine.text.pieces import Pieces

LETTERS = {i: b" %d" % i for i in range(49152)}


class Words:
    pieces = Pieces(plain=LETTERS, all=LETTERS, leading_space=False)


def engine_of(batch: int, device: FakeDevice | None = None, **options: Any) -> Engine:
    made = {"max_num_seqs": batch, "max_model_len": 2048, "decode_steps": 1, "max_queued_requests": 10_000} | options
    return fake_engine(device or FakeDevice(), Words(), **made)  # type: ignore[arg-type]


def calls_of_a_step(batch: int, steps: int = 32, cached: Load | None = None, **options: Any) -> float:
    """Calls of Python functions, the C ones not counted; over as many steps as there are tokens in two pages.

    cached: prompts that came before, and left their pages in the prefix cache.
    """
    engine = engine_of(batch, **options)
    if cached is not None:
        submit(engine, cached, 1)
        while engine.run_once_overlapped():
            pass
    submit(engine, Load(batch, 100), 500)
    while engine.scheduler.prompts or len(engine.scheduler.running) < batch:
        engine.run_once_overlapped()
    engine.run_once_overlapped()
    calls = 0

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        for _ in range(steps):
            engine.run_once_overlapped()
    finally:
        sys.setprofile(None)
    return calls / steps


def test_a_sequence_costs_few_calls_a_step() -> None:
    few, many = calls_of_a_step(8), calls_of_a_step(72)
    each = (many - few) / 64
    assert 2 <= each <= 4, "a push, a sink; and a page every sixteenth step"
    assert few - 8 * each <= 180
    assert calls_of_a_step(72, enable_prefix_caching=False) < many


def test_cached_pages_cost_a_step_nothing_but_their_eviction() -> None:
    """In a pool that is full of them, each new page takes the place of one: half a page a step for 8 sequences."""
    alone, evicting = (
        calls_of_a_step(8),
        [calls_of_a_step(8, cached=Load(count, 1600), num_pages=100 * count + 1) for count in (8, 64)],
    )
    assert abs(evicting[1] - evicting[0]) < 1, "however many there are"
    assert 1 < evicting[0] - alone < 10


def test_a_sequence_that_wants_more_than_tokens_costs_its_own_calls_alone() -> None:
    """The counter-check: what is off the smooth path is counted."""
    engine = engine_of(8)
    calls = 0

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_name == "_commit_row"

    for i in range(8):
        params = SamplingParams(max_tokens=200, logprobs=0 if i == 3 else None)
        engine.submit(Request(request_id=str(i), prompt_token_ids=(i, 1, 2), params=params), lambda deltas: None)
    engine.read_inbox(block=False)
    engine.run_once()
    sys.setprofile(count)
    for _ in range(16):
        engine.run_once()
    sys.setprofile(None)
    assert calls == 16


def test_one_dispatch_and_one_vector_a_step() -> None:
    device = FakeDevice()
    engine = engine_of(4, device)
    sent = []
    for executable in engine.runner.executables.values():  # type: ignore[attr-defined]
        inner = executable.__class__.__call__
        executable.__class__ = type("Spied", (executable.__class__,), {
            "__call__": lambda self, *groups, inner=inner: sent.append(groups) or inner(self, *groups)
        })  # fmt: skip
    submit(engine, Load(4, 50), 20)
    steps = 0
    while engine.run_once_overlapped():
        steps += 1
    assert len(sent) == device.steps == sum(engine.stats().steps.values()) >= 20
    assert all(len(vectors) == 1 for *_, vectors in sent)


def test_every_token_comes_out_once() -> None:
    engine = engine_of(3, decode_steps=4)
    got: dict[str, list[TextDelta]] = {}
    for name in "abc":
        request = Request(request_id=name, prompt_token_ids=(1, 2, ord(name)), params=SamplingParams(max_tokens=50))
        engine.submit(request, got.setdefault(name, []).extend)
    engine.read_inbox(block=False)
    while engine.run_once_overlapped():
        engine.scheduler.check()
    for deltas in got.values():
        tokens = [token for delta in deltas for token in delta.token_ids]
        assert len(tokens) == 50 and "".join(delta.text for delta in deltas) == "".join(f" {t}" for t in tokens)


@pytest.mark.parametrize("caching", [True, False])
def test_memory_does_not_grow_with_steps(caching: bool) -> None:
    engine = engine_of(4, num_pages=60, enable_prefix_caching=caching)
    name = 0

    def steps(count: int) -> None:
        nonlocal name
        for _ in range(count):
            while len(engine.outbox) + engine._num_submitted < 6:
                params = SamplingParams(max_tokens=30)
                prompt = tuple(name * 7 % 4000 + i for i in range(40))
                engine.submit(
                    Request(request_id=str(name), prompt_token_ids=prompt, params=params), lambda deltas: None
                )
                name += 1
                engine.read_inbox(block=False)
            engine.run_once_overlapped()
        gc.collect()

    tracemalloc.start()
    try:
        steps(400)  # by now every page is known
        before, _ = tracemalloc.get_traced_memory()
        steps(800)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert name > 100 and after - before < 20_000


def test_the_device_waits_little_for_a_host_that_is_faster() -> None:
    device = FakeDevice(step_s=0.03)
    timed = measure(engine_of(4, device), Load(4, 20), 8, device)
    assert timed.device_us == pytest.approx(30_000, rel=0.3)
    assert timed.idle_us is not None and timed.idle_us < 10_000
    assert timed.phases_us["wait"] > 15_000 and timed.host_us < 15_000


def test_without_overlap_it_waits_for_all_of_it() -> None:
    device = FakeDevice(step_s=0.002)
    engine = engine_of(4, device)
    submit(engine, Load(4, 20), 20)
    while engine.run_once():
        pass
    host_s = sum(seconds for phase, seconds in engine.counters.phases.seconds.items() if phase != "wait")
    assert device.idle_s > 0.5 * host_s > 0


def test_a_trace_has_every_span() -> None:
    spans = [Span(phase, 1.0 + i, 1.5 + i) for i, phase in enumerate(PHASES)]
    events = list(chrome_trace(spans))
    assert [event["name"] for event in events] == list(PHASES)
    assert events[0] == {"name": "plan", "ph": "X", "ts": 1e6, "dur": 5e5, "pid": 0, "tid": 0}
