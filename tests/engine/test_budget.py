"""The prompt budget by itself, and in the loop over a device whose steps take as long as their tokens."""

from __future__ import annotations

import pytest

from benchmarks.fake_device import FakeDevice, fake_engine
from engine.budget import PromptBudget
from engine.config import EngineOptions
from engine.errors import InvalidParam
from engine.plan import PendingStep, StepPlan
from engine.request import Request, SamplingParams
from tests.engine.clock import Clock

BUCKETS = (32, 64, 128, 256)


def test_without_a_target_or_anybody_to_wait_all_that_fits() -> None:
    assert PromptBudget(BUCKETS, 250, None).tokens(9) == 250
    assert PromptBudget(BUCKETS, 250, 0.001).tokens(0) == 250


def test_the_smallest_is_tried_first_and_is_never_refused() -> None:
    budget = PromptBudget(BUCKETS, 250, 0.010)
    assert budget.tokens(1) == 32
    budget.observe(20, 0.5)
    assert budget.tokens(1) == 32


def test_larger_ones_are_tried_while_even_twice_the_time_would_do() -> None:
    budget, seen = PromptBudget(BUCKETS, 250, 0.010), []
    for _ in range(5):
        tokens = budget.tokens(4)
        seen.append(tokens)
        budget.observe(tokens, 0.001 + 0.00005 * tokens)  # 32: 2.6 ms, 64: 4.2, 128: 7.4, 256: 13.8
    assert seen == [32, 64, 128, 128, 128], "after 64, 128 promises 8.4 ms; after 128, 256 promises 14.8"


def test_one_slow_step_is_not_held_against_a_bucket_for_good() -> None:
    budget = PromptBudget(BUCKETS, 250, 0.010)
    budget.observe(32, 0.002)
    budget.observe(64, 0.300)
    assert budget.tokens(1) == 128, "32 tokens in 2 ms are at most 128 in 8"
    budget.observe(32, 1.0)
    assert budget.tokens(1) == 32
    for _ in range(40):
        budget.observe(32, 0.002)
    assert budget.tokens(1) == 128


def test_fewer_tokens_count_for_the_bucket_that_holds_them() -> None:
    budget = PromptBudget(BUCKETS, 250, 0.010)
    budget.observe(33, 0.004)
    assert budget.expected_s(64) == 0.004 and budget.expected_s(32) == float("inf")


@pytest.mark.parametrize("bad", [0, -1, True, "5"])
def test_bad_targets_are_refused_by_name(bad: object) -> None:
    with pytest.raises(InvalidParam, match="tpot_slo_ms"):
        EngineOptions(tpot_slo_ms=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(("slo_ms", "stalls", "longest"), [(None, False, 512), (20.0, False, 128), (20.0, True, 128)])
def test_running_sequences_wait_no_longer_than_the_target(
    clock: Clock, slo_ms: float | None, stalls: bool, longest: int
) -> None:
    """stalls: the host is held up after the first launch, so that it finds that step done at once."""
    device = FakeDevice(step_s=0.002, token_s=0.0001)  # 128 tokens: 14.8 ms, 256: 27.6
    engine = fake_engine(
        device, max_num_seqs=4, max_model_len=4096, max_num_batched_tokens=512, tpot_slo_ms=slo_ms, decode_steps=1
    )
    got: list[int] = []

    def submit(name: str, prompt: int, tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, detokenize=False)
        ids = tuple(hash((name, i)) % 40_000 for i in range(prompt))
        engine.submit(Request(request_id=name, prompt_token_ids=ids, params=params), lambda deltas: None)
        engine.read_inbox(block=False)

    submit("runs", 20, 400)
    for _ in range(4):
        engine.run_once_overlapped()
    launch = engine.runner.launch

    def spy(plan: StepPlan) -> PendingStep:
        if plan.prefill_rows and plan.decode_rows:
            got.append(plan.num_prefill_tokens)
        pending = launch(plan)
        if stalls and len(got) == 1:
            clock.sleep(0.1)
        return pending

    engine.runner.launch = spy  # type: ignore[method-assign]
    submit("long", 3000, 5)
    while engine.scheduler.prompts or engine.scheduler.waiting:
        engine.run_once_overlapped()
    assert sum(got) == 3000, "the whole prompt, beside the one that runs"
    assert max(got) == longest
