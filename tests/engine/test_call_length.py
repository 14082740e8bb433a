"""The length of decode calls by itself, and in the loop over a device whose calls take as long as their tokens."""

from __future__ import annotations

import pytest

from benchmarks.fake_device import FakeDevice, fake_engine
from engine.call_length import CallLength
from engine.plan import PendingStep, StepPlan
from engine.request import Request, SamplingParams
from tests.engine.clock import Clock

BUCKETS = (8, 16, 32)


def test_without_a_limit_always_the_most() -> None:
    assert CallLength(BUCKETS, 1, 5, None).tokens(3, others_wait=True) == 5


def test_as_many_as_a_call_holds() -> None:
    length = CallLength(BUCKETS, 2, 32, 0.020)
    assert length.tokens(3, others_wait=False) == 2, "nothing is known yet"
    length.observe(8, 2, 0.005)
    assert length.tokens(8, others_wait=False) == 8
    assert length.tokens(8, others_wait=True) == 2
    assert length.tokens(9, others_wait=False) == 2, "more sequences may take longer"
    length.observe(16, 2, 0.060)
    assert length.tokens(9, others_wait=False) == 2, "no fewer, however long they take"
    length.observe(32, 2, 1e-6)
    assert length.tokens(17, others_wait=False) == 32


def test_what_takes_longer_now_is_noticed() -> None:
    length = CallLength(BUCKETS, 1, 32, 0.020)
    length.observe(8, 4, 0.004)
    assert length.tokens(1, others_wait=False) == 20
    for _ in range(40):
        length.observe(8, 4, 0.020)
    assert length.tokens(1, others_wait=False) == 4


@pytest.mark.parametrize("queued", [False, True])
def test_calls_of_the_loop_are_as_long_as_they_may_be(clock: Clock, queued: bool) -> None:
    device = FakeDevice(step_s=0.002, turn_s=0.001)
    engine = fake_engine(device, max_num_seqs=2, max_model_len=2048, max_num_batched_tokens=64)
    config, got = engine.config, list[int]()
    assert (config.fewest_decode_steps, config.decode_steps, config.decode_call_s) == (2, 8, 0.04)
    launch = engine.runner.launch

    def spy(plan: StepPlan) -> PendingStep:
        got.append(plan.num_steps)
        return launch(plan)

    engine.runner.launch = spy  # type: ignore[method-assign]
    for name in ("a", "b", "c") if queued else ("a",):
        params = SamplingParams(max_tokens=200, detokenize=False)
        request = Request(request_id=name, prompt_token_ids=tuple(range(20)), params=params)
        engine.submit(request, lambda deltas: None)
        engine.read_inbox(block=False)
    while engine.run_once_overlapped() and not (queued and not engine.scheduler.waiting):
        pass
    decoding = [count for count in got if count > 1]
    assert set(decoding) == {2} if queued else decoding.count(8) > 20 and decoding.count(2) < 4, decoding
