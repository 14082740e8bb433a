"""A few seconds of `make soak`, and that what it looks for would be seen."""

from __future__ import annotations

import json

import pytest

from benchmarks import soak
from benchmarks.soak import Answer, Memory, counted, expect, unchunked


@pytest.mark.model
def test_a_short_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--seconds", "3"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["kinds"]) == {"completion", "chat", "choices", "leaves", "refused"}
    assert found["tokens"] > 0 and found["wrong"] == [] and found["growth_mb_in_10k"] is None


def test_wrong_answers_are_seen() -> None:
    assert expect(Answer(500, b"oops"), 200) == "status 500: b'oops'"
    assert counted({"completion_tokens": 3}, 3) is None and counted({"completion_tokens": 2}, 3) == "2 tokens of 3"
    whole = b'data: {"a":1}\n\ndata: [DONE]\n\n'
    assert Answer(200, whole).events == [{"a": 1}]
    with pytest.raises(ValueError, match="cut short"):
        _ = Answer(200, whole[:-10]).events
    assert unchunked(b"3\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\n\r\n") == b"abc0123456789abcdef"


def test_growth_is_judged_by_requests_once_there_are_enough() -> None:
    steady = [Memory([1000 * i for i in range(n)], [10**8 + 200_000 * (i % 2) for i in range(n)]) for n in (9, 30)]
    assert steady[0].growth_mb() is None
    assert abs(steady[1].growth_mb() or 9) < 0.3
    leaking = Memory([1000 * i for i in range(30)], [10**8 + 300_000 * i for i in range(30)])
    assert leaking.growth_mb() == pytest.approx(3.0)
