"""`octavo batch`'s files: a run that is killed anywhere and started again loses and repeats nothing.

The answers here are a formula of the request, so every line of the output can be checked by hand.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from server.batch import BatchError, BatchLine, ResultFile, check_input, read_lines, run_batch
from server.local import Answer


def write_input(path: Path, count: int) -> None:
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": f"p{i}"}}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


async def echo(line: BatchLine) -> Answer:
    """Odd requests need longer than even ones, and every tenth is refused."""
    number = int(line.custom_id[1:])
    await asyncio.sleep(0.001 * (number % 2))
    if number % 10 == 9:
        error = {"message": "bad", "type": "invalid_request_error", "param": "prompt", "code": "invalid_value"}
        return Answer(400, {"error": error})
    return Answer(200, {"text": line.body["prompt"], "usage": {"completion_tokens": number}})


def run(input_path: Path, output_path: Path, answer=echo, max_in_flight: int = 4) -> list[Answer]:
    async def go() -> list[Answer]:
        seen: list[Answer] = []
        results = ResultFile(output_path, check_input(input_path))
        try:
            await run_batch(input_path, results, answer, max_in_flight, seen.append)
        finally:
            await results.close()
        return seen

    return asyncio.run(go())


def check_output(path: Path, count: int) -> None:
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(r["custom_id"] for r in results) == sorted(f"r{i}" for i in range(count))
    for result in results:
        number = int(result["custom_id"][1:])
        assert set(result) == {"id", "custom_id", "response", "error"}
        if number % 10 == 9:
            assert result["error"] == {"code": "invalid_value", "message": "bad"}
            assert result["response"]["status_code"] == 400
        else:
            assert result["error"] is None
            assert result["response"]["status_code"] == 200
            assert result["response"]["body"]["text"] == f"p{number}"
            assert result["response"]["body"]["usage"] == {"completion_tokens": number}


def test_every_request_gets_one_result(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 50)
    seen = run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert sum(answer.num_output_tokens for answer in seen) == sum(i for i in range(50) if i % 10 != 9)
    check_output(tmp_path / "out.jsonl", 50)
    assert run(tmp_path / "in.jsonl", tmp_path / "out.jsonl") == []  # nothing is left to do
    check_output(tmp_path / "out.jsonl", 50)


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_torn_last_line_is_cut_and_answered_again(tmp_path: Path, cut: int) -> None:
    write_input(tmp_path / "in.jsonl", 12)
    run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(whole[:-cut])
    assert len(run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")) == 1
    check_output(tmp_path / "out.jsonl", 12)


KILLED = """
    import asyncio, sys
    from pathlib import Path
    from server.batch import ResultFile, check_input, run_batch
    from server.local import Answer

    async def answer(line):
        await asyncio.sleep(0.002)
        number = int(line.custom_id[1:])
        if number % 10 == 9:
            error = {"message": "bad", "type": "t", "param": None, "code": "invalid_value"}
            return Answer(400, {"error": error})
        return Answer(200, {"text": line.body["prompt"], "usage": {"completion_tokens": number}})

    async def go():
        source = Path(sys.argv[1])
        results = ResultFile(Path(sys.argv[2]), check_input(source))
        await run_batch(source, results, answer, 3, lambda _: None)

    asyncio.run(go())
"""


def test_killed_run_resumes(tmp_path: Path) -> None:
    """SIGKILL at whatever instant, four times; then to the end. Each run gets further."""
    write_input(tmp_path / "in.jsonl", 400)
    (tmp_path / "run.py").write_text(textwrap.dedent(KILLED))
    output = tmp_path / "out.jsonl"
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "in.jsonl"), str(output)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    size = 0
    for _ in range(4):
        process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 30
        while (output.stat().st_size if output.exists() else 0) < size + 2000:
            assert time.monotonic() < deadline, "the run makes no progress"
            assert process.poll() is None, "the run ended before it was killed"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        size = output.stat().st_size
    subprocess.run(command, env=environment, check=True, timeout=60)
    check_output(output, 400)


def test_at_most_the_window_is_in_flight(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 30)
    now, most = 0, 0

    async def counting(line: BatchLine) -> Answer:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.002)
        now -= 1
        return await echo(line)

    run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", counting, max_in_flight=5)
    assert most == 5


def test_a_run_that_fails_keeps_what_it_has(tmp_path: Path) -> None:
    """An engine that dies ends the run with its error; the requests under way have no result."""
    write_input(tmp_path / "in.jsonl", 20)

    async def dies(line: BatchLine) -> Answer:
        if line.custom_id == "r8":
            raise BatchError("the engine died")
        return await echo(line)

    with pytest.raises(BatchError, match="the engine died"):
        run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", dies)
    kept = [json.loads(line)["custom_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "r8" not in kept
    assert 0 < len(kept) < 20
    run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    check_output(tmp_path / "out.jsonl", 20)


def test_full_disk_ends_the_run_and_can_be_resumed(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 40)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))
    try:
        with pytest.raises(BatchError, match="cannot be written"):
            run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    check_output(tmp_path / "out.jsonl", 40)


def test_second_run_on_the_same_output_is_refused(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 3)
    first = ResultFile(tmp_path / "out.jsonl", {"r0"})
    with pytest.raises(BatchError, match="another run"):
        ResultFile(tmp_path / "out.jsonl", {"r0"})
    asyncio.run(first.close())
    run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("precious notes\n", "not a result of a batch"),
        ('{"custom_id": "other", "response": null}\n', "no result of this input"),
        ('{"custom_id": "r0"}\n{"custom_id": "r0"}\n', "second result"),
    ],
)
def test_foreign_output_is_not_touched(tmp_path: Path, text: str, message: str) -> None:
    write_input(tmp_path / "in.jsonl", 3)
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(BatchError, match=message):
        run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == text


GOOD = '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: must be a JSON object"),
        (GOOD.replace('"a"', "3"), "line 2: custom_id must be a text"),
        (GOOD.replace("POST", "GET"), "line 2: method must be POST, got 'GET'"),
        (GOOD.replace("completions", "images"), "line 2: url must be one of /v1/chat/completions, "),
        (GOOD.replace("{}", '"x"'), "line 2: body must be a JSON object"),
        (GOOD.replace('"body"', '"boddy"'), "line 2: unknown field 'boddy'"),
        (GOOD, "custom_id 'a' stands twice"),
    ],
)
def test_bad_input_is_refused_before_the_first_answer(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(GOOD + "\n" + line + "\n")
    with pytest.raises(BatchError, match=message):
        run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_empty_and_missing_input(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n\n")
    with pytest.raises(BatchError, match="holds no requests"):
        check_input(tmp_path / "in.jsonl")
    with pytest.raises(BatchError, match="No such file"):
        list(read_lines(tmp_path / "none.jsonl"))
