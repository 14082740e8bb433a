"""`generate`, `chat` and `batch` against an engine whose every answer can be worked out by hand."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineOptions
from engine.request import SamplingParams
from server.cli import main, parse
from server.commands import batch, chat, generate
from server.commands.options import BatchOptions, ChatOptions, GenerateOptions
from server.commands.terminal import AnswerError
from server.local import LocalServer
from tests.server.fakes import ByteTokenizer, FakeEngine, output_ids


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    fake = FakeEngine(tokenizer=ByteTokenizer())

    @contextmanager
    def running(options: EngineOptions) -> Iterator[FakeEngine]:
        yield fake

    monkeypatch.setattr(batch, "running_engine", running)
    for module in (chat, generate):
        monkeypatch.setattr(module, "generating_engine", running)
    yield fake
    fake.stop()


def letters(prompt: str, count: int, index: int = 0) -> str:
    return bytes(output_ids(tuple(prompt.encode()), count, index)).decode()


def test_generate_streams_the_continuation(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hello", "--max-tokens", "7"]) == 0
    assert capsys.readouterr().out == letters("hello", 7) + "\n"


def test_generate_hands_every_sampling_flag_to_the_engine(engine: FakeEngine) -> None:
    argv = ["generate", "hi", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "5", "--min-p", "0.1", "--seed", "3"]
    argv += ["--presence-penalty", "1", "--frequency-penalty", "0.5", "--repetition-penalty", "1.1", "--stop", "zz"]
    argv += ["--stop-token-ids", "9", "--ignore-eos", "--max-tokens", "4", "--min-tokens", "2", "--n", "2"]
    argv += ["--logit-bias", '{"7": -1}', "--allowed-token-ids", "97", "--allowed-token-ids", "98", "--bad-words", "q"]
    argv += ["--include-stop-str-in-output", "--no-skip-special-tokens"]
    _, (_, _, wanted) = parse(argv)
    assert main(argv) == 0
    assert engine.submitted[0].params == wanted
    assert wanted != SamplingParams(max_tokens=4)


def test_generate_with_the_chat_template(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hello", "--chat", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == letters("user:hello;", 3) + "\n"


def test_generate_prints_every_answer(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hello", "--n", "2", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == f"--- 1\n{letters('hello', 3)}\n--- 2\n{letters('hello', 3, 1)}\n"


def test_generate_tells_the_engines_refusal(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x" * 5000]) == 1
    assert "octavo: error: " in capsys.readouterr().err


def test_fault_in_the_middle_of_a_stream_is_an_error(engine: FakeEngine) -> None:
    with pytest.raises(AnswerError, match="failed on this request"):
        asyncio.run(generate.generate(engine, GenerateOptions(prompt="FAULT"), SamplingParams()))


def talk(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, lines: str, system: str | None = None) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat.converse(engine, ChatOptions(system=system), SamplingParams(max_tokens=3))


def test_chat_keeps_the_conversation(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(engine, monkeypatch, "one\n\ntwo\n/exit\nthree\n", system="be kind")
    first = letters("system:be kind;user:one;", 3)
    second = letters(f"system:be kind;user:one;assistant:{first};user:two;", 3)
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    assert len(engine.submitted) == 2


def test_chat_reset_and_refusal(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question that the engine refuses leaves no trace in the history; /reset leaves nothing at all."""
    talk(engine, monkeypatch, f"one\n{'x' * 5000}\ntwo\n/reset\n/help\none\n")
    first = letters("user:one;", 3)
    second = letters(f"user:one;assistant:{first};user:two;", 3)
    out, err = capsys.readouterr()
    assert out == f"{first}\n{second}\n{first}\n"
    assert "/exit ends" in err


def line(custom_id: str, url: str = "/v1/completions", **body: object) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n"


def results(path: Path) -> dict[str, dict]:
    found = [json.loads(text) for text in path.read_text().splitlines()]
    return {result["custom_id"]: result for result in found}


def test_batch_answers_as_the_server_would(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_url = "/v1/chat/completions"
    lines = [
        line("good", model="fake-model", prompt="hello", max_tokens=5),
        line("chat", chat_url, messages=[{"role": "user", "content": "hello"}], max_tokens=4, logprobs=True),
        line("bad field", prompt="hello", temprature=1),
        line("bad value", prompt="hello", temperature=9),
        line("bad model", model="gpt-4o", prompt="hello"),
        line("stream", prompt="hello", stream=True),
        line("fault", prompt="FAULT", max_tokens=5),
        line("long", prompt="x" * 5000),
    ]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    assert main(["batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--no-progress"]) == 0
    found = results(tmp_path / "out.jsonl")
    assert len(found) == 8
    assert found["good"]["response"]["status_code"] == 200
    assert found["good"]["error"] is None
    assert found["good"]["response"]["body"]["choices"][0]["text"] == letters("hello", 5)
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["content"] == letters("user:hello;", 4)
    assert len(found["chat"]["response"]["body"]["choices"][0]["logprobs"]["content"]) == 4
    status = {name: found[name]["response"]["status_code"] for name in found}
    assert status == {
        "good": 200, "chat": 200, "bad field": 400, "bad value": 400, "bad model": 404, "stream": 400, "fault": 500,
        "long": 400,
    }  # fmt: skip
    param = {name: found[name]["response"]["body"]["error"]["param"] for name in found if status[name] != 200}
    assert param["bad field"] == "temprature"
    assert param["bad value"] == "temperature"
    assert found["bad model"]["error"]["code"] == "model_not_found"
    assert found["long"]["error"]["code"] == "context_length_exceeded"
    assert "8 of 8 results" in capsys.readouterr().err


def test_batch_knows_the_model_by_the_name_it_is_given(engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(line("a", model="gpt-4o", prompt="hello", max_tokens=2))
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert main(["batch", *files, "--served-model-name", "gpt-4o", "--no-progress"]) == 0
    assert results(tmp_path / "out.jsonl")["a"]["response"]["body"]["model"] == "gpt-4o"


def test_batch_resumes_after_the_engine_died(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text("".join(line(f"r{i}", prompt=f"p{i}", max_tokens=30) for i in range(60)))
    argv = ["batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--max-in-flight", "4"]
    fifth = engine.submit

    def submit(request, sink) -> None:
        if len(engine.submitted) == 20:
            engine.failure = "the device is gone"
        fifth(request, sink)

    engine.submit = submit  # type: ignore[method-assign]
    assert main([*argv, "--no-progress"]) == 1
    assert "the engine stopped (the device is gone); the same command goes on from here" in capsys.readouterr().err
    kept = results(tmp_path / "out.jsonl")
    assert 0 < len(kept) <= 20
    engine.failure, engine.submit = None, fifth  # type: ignore[method-assign]
    assert main([*argv, "--no-progress"]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 60
    texts = {name: r["response"]["body"]["choices"][0]["text"] for name, r in results(tmp_path / "out.jsonl").items()}
    assert texts == {f"r{i}": letters(f"p{i}", 30) for i in range(60)}


def test_batch_offers_a_request_again_while_the_queue_is_full(engine: FakeEngine, tmp_path: Path) -> None:
    """64 places, n=40 each: only one fits at a time. n=100 never fits, and is told so when it is alone."""
    busy = engine.stats
    engine.stats = lambda: replace(busy(), num_waiting=0)  # type: ignore[method-assign]
    fits = [line(f"r{i}", prompt=f"p{i}", n=40, max_tokens=2) for i in range(3)]
    (tmp_path / "in.jsonl").write_text("".join([*fits, line("never", prompt="p", n=100, max_tokens=2)]))
    options = BatchOptions(input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"), progress=False)
    assert batch.run(EngineOptions(), options) == 0
    status = {name: r["response"]["status_code"] for name, r in results(tmp_path / "out.jsonl").items()}
    assert status == {"r0": 200, "r1": 200, "r2": 200, "never": 429}


def test_files_are_checked_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "running_engine", None)  # calling it would fail with another error
    (tmp_path / "in.jsonl").write_text("nonsense\n")
    assert main(["batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]) == 1
    assert "line 1: not JSON" in capsys.readouterr().err


def test_leaving_a_stream_frees_its_slot(engine: FakeEngine) -> None:
    engine.pace_s = 0.01

    async def leave_early() -> int:
        stream = LocalServer(engine).stream("/v1/completions", {"prompt": "hello", "max_tokens": 1000})
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(5):  # of the 10 s that the stream would have taken
            while engine.num_running:
                await asyncio.sleep(0.01)
        return engine.num_running

    assert asyncio.run(leave_early()) == 0
    assert engine.aborted
