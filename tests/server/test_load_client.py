"""The benchmarks' load client against a server whose tokens are known: it counts right and notices errors."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.client import LoadError, Round, Sample, complete, figures, percentile, run_round
from benchmarks.serve import agreement, check_counts
from tests.server.conftest import Running
from tests.server.fakes import output_ids


def test_counts_times_and_text_of_a_stream(live: Running) -> None:
    sample = asyncio.run(complete(live.port, {"prompt": "hello", "max_tokens": 9, "ignore_eos": True}))
    assert sample.text == bytes(output_ids(tuple(b"hello"), 9)).decode()
    assert (sample.num_prompt_tokens, sample.num_output_tokens) == (5, 9)
    assert sample.start_s < sample.first_s <= sample.end_s


def test_pace_of_the_server_is_what_is_measured(live: Running) -> None:
    """20 ms a token: TPOT is that or more (the machine may be busy), and a round of two streams overlaps."""
    live.engine.pace_s = 0.02
    bodies = [[{"prompt": text, "max_tokens": 10}] for text in ("one", "two")]
    done = asyncio.run(run_round(live.port, bodies))
    assert [sample.text for sample in done.samples] == [
        bytes(output_ids(tuple(text), 10)).decode() for text in (b"one", b"two")
    ]
    assert all(sample.tpot_s >= 0.019 for sample in done.samples)
    assert done.output_tokens_per_s > 0


@pytest.mark.parametrize("body", [{"prompt": "x", "temprature": 1}, {"prompt": "FAULT", "max_tokens": 5}])
def test_errors_early_and_late_are_raised(live: Running, body: dict) -> None:
    with pytest.raises(LoadError, match=r"400|failed on this request"):
        asyncio.run(complete(live.port, body))


def sample(start_s: float, first_s: float, end_s: float, num_tokens: int, text: str = "abcd") -> Sample:
    return Sample(start_s, first_s, end_s, 128, num_tokens, text)


def test_figures_by_hand() -> None:
    rounds = [Round((sample(0, 1, 3, 11), sample(0, 2, 4, 21))), Round((sample(10, 11, 13, 21),))]
    found = figures(rounds)
    # 32 tokens in 4 s and 21 in 3 s; first tokens after 1, 2 and 1 s; 2 s for 10, 20 and 20 further tokens
    assert found["output_tokens_per_s"] == 7.5
    assert (found["ttft_ms_p50"], found["ttft_ms_p95"]) == (1000, 1900)
    assert (found["tpot_ms_p50"], found["tpot_ms_p95"]) == (100, 190)


def test_percentile_is_linear_between_ranks() -> None:
    assert [percentile([4, 1, 3, 2], p) for p in (0, 50, 95, 100)] == [1, 2.5, pytest.approx(3.85), 4]
    assert percentile([7], 95) == 7


def test_wrong_token_counts_are_noticed() -> None:
    with pytest.raises(LoadError, match="128 prompt and 11 output"):
        check_counts("engine", Round((sample(0, 1, 3, 11),)), [], 128)


def test_agreement_is_the_shared_beginning() -> None:
    ours = {1: [Round((sample(0, 1, 2, 3, "abcd"), sample(0, 1, 2, 3, "abcd")))]}
    theirs = {1: [Round((sample(0, 1, 2, 3, "abxd"), sample(0, 1, 2, 3, "abcd")))]}
    assert agreement(ours, theirs) == 0.75
