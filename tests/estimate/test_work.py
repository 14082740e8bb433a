"""FLOPs and bytes that serving tells, against the count of every step taken one by one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.fake_device import MODEL, FakeDevice, fake_engine
from engine.batch import StepKey
from engine.config import Draft
from engine.estimate.count import Count, Span, Step, count_step
from engine.estimate.work import Work
from engine.loop import Engine
from engine.model.known import known_config
from engine.plan import DecodeRow, DecodeRows, PrefillRow, StepPlan
from engine.request import Request, SamplingParams
from engine.sequence import Sequence


def served(engine: Engine, lengths: dict[int, int], tokens: int) -> list[StepPlan]:
    """The plans of requests, a prompt of each length so many times, each continued by so many tokens."""
    plans, launch = [], engine.runner.launch

    def spy(plan: StepPlan):
        plans.append(plan)
        return launch(plan)

    engine.runner.launch = spy  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False)
    for length, count in lengths.items():
        for i in range(count):
            ids = tuple(1 + (i * 977 + j * 31) % 40_000 for j in range(length))
            engine.submit(Request(request_id=f"{length}/{i}", prompt_token_ids=ids, params=params), lambda deltas: None)
    engine.read_inbox(block=False)
    while engine.run_once():
        pass
    engine.runner.launch = launch  # type: ignore[method-assign]
    return plans


def one_by_one(engine: Engine, plans: list[StepPlan]) -> Count:
    """Every turn of every step with its own rows."""
    config, total = engine.config, Count()
    for plan in plans:
        chunks = [Span(row.count, row.start) for row in plan.prefill_rows]
        tokens = next(t for t in (0, *config.token_buckets) if t >= plan.num_prefill_tokens)
        buckets = config.prefill_decode_buckets if tokens else config.decode_buckets
        rows = next(r for r in buckets if r >= len(plan.decode_rows))
        drawn = rows + (config.max_prefill_rows if tokens else 0)
        for turn in range(max(plan.num_steps, 1)):
            spans = (*chunks, *(Span(1, row.start + turn) for row in plan.decode_rows))
            total += count_step(MODEL, config, Step(tokens + rows, drawn, spans))
    return total


@pytest.mark.parametrize("decode_steps", [1, 4])
def test_totals_are_those_of_the_steps(decode_steps: int) -> None:
    engine = fake_engine(
        FakeDevice(), max_num_seqs=8, max_model_len=512, max_num_batched_tokens=128, decode_steps=decode_steps
    )
    plans = served(engine, {128: 4, 64: 2}, 1 + 4 * decode_steps)
    assert any(plan.prefill_rows and plan.decode_rows for plan in plans)
    assert any(not plan.prefill_rows for plan in plans)
    expected, stats = one_by_one(engine, plans), engine.stats()
    assert stats.flops == pytest.approx(expected.all_flops, rel=0.01), "chunks of 128 and of 64 have no mean square"
    assert stats.memory_bytes == pytest.approx(expected.memory_bytes, rel=1e-6)


def test_asking_often_changes_nothing() -> None:
    engine = fake_engine(FakeDevice(), max_num_seqs=8, max_model_len=512, max_num_batched_tokens=128, decode_steps=1)
    seen = [engine.stats()]
    plans = served(engine, {100: 3}, 20)
    seen.append(engine.stats())
    plans += served(engine, {90: 3}, 20)
    seen += [engine.stats(), engine.stats()]
    assert all(one.flops <= other.flops and one.memory_bytes <= other.memory_bytes for one, other in pairwise(seen))
    assert seen[0].flops == 0 and seen[1].flops < seen[2].flops == seen[3].flops
    assert seen[3].memory_bytes == pytest.approx(one_by_one(engine, plans).memory_bytes, rel=1e-6)


def test_a_draft_model_counts_too() -> None:
    """It is fed the two latest tokens, then one proposed one after the other; of prompts it draws nothing."""
    plain = fake_engine(FakeDevice(), max_num_seqs=8, max_model_len=512, max_num_batched_tokens=128).config
    config = replace(plain, draft_tokens=3, draft=Draft(MODEL, plain.dtype, plain.kv_cache_dtype, (), plain.shards))
    work = Work(MODEL, config)
    request = Request(request_id="some", prompt_token_ids=(1,) * 100, params=SamplingParams())
    seqs = [Sequence(request, 0, i, 0, 200, None) for i in range(3)]
    work.add(StepKey(0, 4, 3), StepPlan((), DecodeRows.of(DecodeRow(seq, 99, 4, 0, ()) for seq in seqs), (), 3))
    work.add(StepKey(128, 0), StepPlan((PrefillRow(seqs[0], 0, 100, True, False),), DecodeRows(), (seqs[0],)))
    steps = [
        *(Step(16, 16, (Span(4, 99, 3),)), Step(8, 4, (Span(2, 98, 3),))),
        *(Step(4, 4, (Span(1, start, 3),)) for start in (100, 101)),
        *(Step(128, drawn, (Span(100, 0),)) for drawn in (config.max_prefill_rows, 0)),
    ]
    expected = sum((count_step(MODEL, plain, step) for step in steps), Count())
    assert work.totals() == pytest.approx((expected.all_flops, expected.memory_bytes))


def test_queries_that_verify_over_latents_are_counted_as_absorbed() -> None:
    """64 rows take 64 times the products of one: none expands its context, though there are 320 tokens."""
    model = known_config("deepseek-v2-lite")
    model = replace(model, layers=model.layers[:2])
    config = replace(fake_engine(FakeDevice(), max_num_seqs=64, max_model_len=512).config, draft_tokens=4)
    request = Request(request_id="some", prompt_token_ids=(1,) * 100, params=SamplingParams())

    def flops(rows: int) -> float:
        work, seqs = Work(model, config), [Sequence(request, 0, i, 0, 200, None) for i in range(rows)]
        decode = DecodeRows.of(DecodeRow(seq, 99, 5, 0, ()) for seq in seqs)
        work.add(StepKey(0, rows, 4), StepPlan((), decode, (), 4))
        return work.totals()[0]

    assert flops(64) == pytest.approx(64 * flops(1))
