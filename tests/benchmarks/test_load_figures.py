"""Statistics of loads against numpy on made-up timelines, arrivals, lengths, and the search for the best rate."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import numpy as np
import pytest

from benchmarks.client import Sample
from benchmarks.figures import figures, output_tokens_per_s, parse_slo
from benchmarks.load import Asker, Load, arrival_times, whole
from benchmarks.prompts import MIXES, Cutter, make_prompts, mixed_lengths
from benchmarks.serve import agreement
from benchmarks.sweep import best, sweep
from engine.errors import InvalidParam
from engine.text import Tokenizer
from tests.server.fakes import ByteTokenizer


def timeline(rng: np.random.Generator, error: str | None = None) -> Sample:
    """A made-up request: 1 to 30 chunks of one or more tokens."""
    start = rng.uniform(0, 10)
    times = start + np.cumsum(rng.uniform(0.001, 0.3, rng.integers(1, 30)))
    tokens = 0 if error else len(times) + int(rng.integers(0, 3))
    return Sample(start, tuple(times.tolist()), int(rng.integers(1, 99)), tokens, "x" * tokens, error)


def test_figures_are_numpys() -> None:
    rng = np.random.default_rng(0)
    samples = [timeline(rng, "timeout" if i % 10 == 3 else None) for i in range(80)]
    slo = parse_slo("ttft_ms=200,tpot_ms=160,e2el_ms=4000")
    found = figures(samples, slo)
    done = [s for s in samples if s.error is None]
    starts, firsts = np.array([s.start_s for s in done]), np.array([s.times_s[0] for s in done])
    ends, tokens = np.array([s.times_s[-1] for s in done]), np.array([s.num_output_tokens for s in done])
    several = tokens > 1
    wanted = {
        "ttft_ms": 1e3 * (firsts - starts),
        "tpot_ms": 1e3 * (ends - firsts)[several] / (tokens[several] - 1),
        "itl_ms": 1e3 * np.concatenate([np.diff(s.times_s) for s in done]),
        "e2el_ms": 1e3 * (ends - starts),
    }
    for name, values in wanted.items():
        for percent in (50, 90, 99):
            assert found[f"{name}_p{percent}"] == pytest.approx(np.percentile(values, percent))
        assert found[f"{name}_mean"] == pytest.approx(values.mean())
        assert dict(found[f"{name}_quantiles"])[25] == pytest.approx(np.percentile(values, 25))
    seconds = max(s.times_s[-1] for s in samples) - min(s.start_s for s in samples)
    assert found["output_tokens_per_s"] == pytest.approx(tokens.sum() / seconds)
    assert found["output_tokens_per_s"] == pytest.approx(output_tokens_per_s(samples))
    assert (found["requests"], found["completed"], found["errors"]) == (80, 72, {"timeout": 8})
    each = np.where(several, 1e3 * (ends - firsts) / np.maximum(tokens - 1, 1), 0)
    good = (wanted["ttft_ms"] <= 200) & (each <= 160) & (wanted["e2el_ms"] <= 4000)
    assert 0 < good.sum() < 72
    assert found["good_share"] == pytest.approx(good.sum() / 80)
    assert found["goodput_requests_per_s"] == pytest.approx(good.sum() / seconds)
    assert found["goodput_tokens_per_s"] == pytest.approx(tokens[good].sum() / seconds)


def test_figures_where_there_is_nothing() -> None:
    failed = Sample(1.0, (), 0, 0, "why", "HTTP 500")
    found = figures([failed, failed], parse_slo("ttft_ms=1"))
    assert (found["completed"], found["errors"], found["goodput_requests_per_s"]) == (0, {"HTTP 500": 2}, 0.0)
    assert found["error_examples"] == {"HTTP 500": "why"} and "ttft_ms_p50" not in found
    assert figures([])["requests"] == 0
    with pytest.raises(Exception, match="HTTP 500: why"):
        whole(Load((failed,), 0.0))


def test_a_limit_is_kept_at_its_very_value() -> None:
    sample = Sample(0.0, (0.5, 1.0), 1, 3, "x")  # TTFT 500, TPOT 250, end to end 1000
    for text, good in (
        ("ttft_ms=500", True),
        ("ttft_ms=499", False),
        ("tpot:250", True),
        ("tpot:249 ttft:9999", False),
    ):
        assert parse_slo(text).good(sample) is good, text
    assert parse_slo("e2el_ms=1000,ttft_ms=500,tpot_ms=250").good(sample)


@pytest.mark.parametrize("text", ["", "ttft", "ttft_ms=0", "ttft_ms=nan", "speed=1", "itl_ms=5", "ttft=1,ttft_ms=2"])
def test_wrong_slos_are_named(text: str) -> None:
    with pytest.raises(InvalidParam, match="slo"):
        parse_slo(text)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_gaps_that_were_asked_for(burstiness: float) -> None:
    """Mean gap 1 / rate, squared variation 1 / burstiness; a Poisson process' gaps are exponential (Kolmogorov)."""
    times = arrival_times(5.0, burstiness, 20_000, seed=1)
    gaps = np.diff([0.0, *times])
    assert gaps.min() >= 0 and times == arrival_times(5.0, burstiness, 20_000, seed=1)
    assert times != arrival_times(5.0, burstiness, 20_000, seed=2)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.1)
    ordered = np.sort(gaps)
    distance = np.abs(np.arange(1, len(gaps) + 1) / len(gaps) - (1 - np.exp(-5.0 * ordered))).max()
    assert bool(distance < 1.63 / np.sqrt(len(gaps))) is (burstiness == 1.0)  # 1 % of true samples are further apart


def test_mixed_lengths_have_their_median_and_range() -> None:
    for mix in MIXES.values():
        lengths = np.array(mixed_lengths(mix, 4000, seed=3))
        assert np.median(lengths, axis=0) == pytest.approx([mix.input_median, mix.output_median], rel=0.1)
        for values, (low, high) in zip(lengths.T, (mix.input_range, mix.output_range), strict=True):
            assert low <= values.min() and values.max() <= high


def test_prompts_have_their_lengths_and_begin_differently() -> None:
    tokenizer = cast(Tokenizer, ByteTokenizer())
    cutter = Cutter(tokenizer, seed=0)
    found = [cutter.cut(length) for length in (5, 300, 40, 1) * 20]
    assert [len(p.token_ids) for p in found] == [5, 300, 40, 1] * 20
    assert all(tuple(p.text.encode()) == p.token_ids for p in found)
    assert len({p.token_ids[:4] for p in found}) == len(found)
    assert make_prompts(tokenizer, 9, 3, seed=7) == make_prompts(tokenizer, 9, 3, seed=7)
    with pytest.raises(InvalidParam, match="no place left"):
        cutter.cut(10**9)


def test_prompts_may_begin_alike_and_go_on_differently() -> None:
    ask = Asker(cast(Tokenizer, ByteTokenizer()), 0, 20, 3, shared_prefix_len=50)
    prompts = [one.prompt for one in (*ask(8), *ask(8))]
    assert {len(p.token_ids) for p in prompts} == {70} and len({p.text[:50] for p in prompts}) == 1
    assert len({p.token_ids[50:54] for p in prompts}) == len(prompts)
    assert all(p.prompt.token_ids[:50] != prompts[0].token_ids[:50] for p in ask.long(60))


def queue(rate: float, capacity: float, count: int = 300) -> dict:
    """Figures of a server that answers one request after the other, `capacity` a second, under Poisson arrivals."""
    free, samples = 0.0, []
    for due in arrival_times(rate, 1.0, count, seed=5):
        free = max(free, due) + 1 / capacity
        samples.append(Sample(due, (free,), 1, 1, "x"))
    return {"rate": rate} | figures(samples, parse_slo("ttft_ms=1000"))


@pytest.mark.parametrize("start", [1.0, 200.0])
def test_the_sweep_finds_a_known_capacity(start: float) -> None:
    """40 a second, whose queue may last a second: the best rate is near it from wherever the search starts."""
    rows = sweep(lambda rate: queue(rate, 40.0), start, attainment=0.9)
    assert best(rows)["rate"] == pytest.approx(40, rel=0.15)
    assert best(rows)["goodput_requests_per_s"] == pytest.approx(40, rel=0.15)
    held = [row["rate"] for row in rows if row["good_share"] >= 0.9]
    failed = [row["rate"] for row in rows if row["good_share"] < 0.9]
    assert max(held) < min(failed) and min(failed) / max(held) < 1.1
    assert len(rows) == len({row["rate"] for row in rows}) < 16


def test_a_sweep_without_an_end_stops() -> None:
    assert len(sweep(lambda rate: {"rate": rate, "good_share": 1.0}, 1.0, 0.9)) == 13
    rates = [row["rate"] for row in sweep(lambda rate: {"rate": rate, "good_share": 0.0}, 1.0, 0.9)]
    assert len(rates) == 13 and all(b == a / 2 for a, b in pairwise(rates))


def test_agreement_is_the_shared_beginning() -> None:
    assert [agreement("abcd", other) for other in ("abxd", "abcd", "", "abcdef")] == [0.5, 1.0, 0.0, 1.0]
