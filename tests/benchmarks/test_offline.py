"""`octavo bench offline` around an `LLM` whose tokens and pace are known."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import pytest

from benchmarks import offline
from engine import SamplingParams
from server.cli import main
from tests.server.fakes import ByteTokenizer


class FakeLLM:
    """Answers with the wanted number of tokens after 20 ms; what it was asked is kept."""

    asked: ClassVar[list[list[list[int]]]]
    options: ClassVar[dict[str, Any]]
    short = 0

    def __init__(self, **options: Any) -> None:
        type(self).asked, type(self).options = [], options
        self.engine = SimpleNamespace(tokenizer=ByteTokenizer())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def generate(self, prompts: list[list[int]], params: Sequence[SamplingParams]) -> list[SimpleNamespace]:
        time.sleep(0.02)
        self.asked.append(prompts)
        counts = [(one.max_tokens or 0) - self.short for one in params]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * count)]) for count in counts]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    monkeypatch.setattr(offline, "LLM", FakeLLM)
    monkeypatch.setattr(FakeLLM, "short", 0)
    return FakeLLM


def test_rounds_of_other_prompts_each(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["bench", "offline", "some-model", "--dtype", "float32", "--num-prompts", "5", "--rounds", "2"]
    assert main([*argv, "--input-len", "9", "--output-len", "4", "--result-dir", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (fake.options["model"], fake.options["dtype"]) == ("some-model", "float32")
    assert [len(batch) for batch in fake.asked] == [5, 5, 5]
    assert len({tuple(prompt[:4]) for batch in fake.asked for prompt in batch}) == 15
    assert (result["requests"], result["input_tokens"], result["output_tokens"]) == (10, 90, 40)
    assert 0.04 <= result["duration_s"] < 2
    assert result["input_tokens_per_s"] == pytest.approx(result["output_tokens_per_s"] * 9 / 4, rel=1e-3)
    assert result["requests_per_s"] == pytest.approx(result["output_tokens_per_s"] / 4, rel=1e-3)
    assert 20 / 0.02 > result["output_tokens_per_s"] > 10
    assert [json.loads(file.read_text()) for file in tmp_path.iterdir()] == [result]


def test_a_file_of_prompts(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abc", "max_tokens": 3}\n{"prompt": [1, 2]}\n')
    assert main(["bench", "offline", "--dataset-path", str(file), "--output-len", "6"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert fake.asked == [[[97, 98, 99], [1, 2]]]
    assert (result["input_tokens"], result["output_tokens"]) == (5, 9)
    for text, words in (("{", "line 1 is not"), ('{"text": "a"}', "line 1 is not"), ("", "has no lines")):
        file.write_text(text)
        assert main(["bench", "offline", "--dataset-path", str(file)]) == 1
        assert words in capsys.readouterr().err


def test_outputs_of_another_length_are_an_error(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    fake.short = 1
    assert main(["bench", "offline", "--num-prompts", "2", "--input-len", "4", "--output-len", "6"]) == 1
    assert "outputs of [5] tokens, not of [6]" in capsys.readouterr().err
