"""The load client against a server whose tokens are known: it counts and times right, and no failure is lost."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import serve
from benchmarks.client import CHAT, Endpoint, Exchange, LoadError, complete, endpoint, read
from benchmarks.load import Ask, Target, closed_loop, open_loop
from benchmarks.prompts import Prompt
from server.cli import main
from tests.server.conftest import Running
from tests.server.fakes import ByteTokenizer, output_ids


def letters(prompt: str, count: int) -> str:
    return bytes(output_ids(tuple(prompt.encode()), count)).decode()


def ask(text: str, count: int) -> Ask:
    return Ask(Prompt(text, tuple(text.encode())), count)


def target(live: Running, **fields: object) -> Target:
    return Target(Endpoint("127.0.0.1", live.port), fields)


def test_counts_times_and_text_of_a_stream(live: Running) -> None:
    sample = asyncio.run(complete(endpoint(live.url), {"prompt": "hello", "max_tokens": 9, "ignore_eos": True}))
    assert sample.text == letters("hello", 9)
    assert (sample.num_prompt_tokens, sample.num_output_tokens) == (5, 9)
    assert len(sample.times_s) == 9 and sample.start_s < sample.first_s <= sample.end_s
    body = {"messages": [{"role": "user", "content": "=abc"}], "max_tokens": 9}
    assert asyncio.run(complete(endpoint(live.url, CHAT), body)).text == "abc"


def test_pace_of_the_server_is_what_is_measured(live: Running) -> None:
    """20 ms a token: no request is faster (single tokens may come late), and requests of two streams overlap."""
    live.engine.pace_s = 0.02
    load = closed_loop(target(live), [ask("one", 10), ask("two", 10), ask("three", 4)], 2)
    assert [s.text for s in load.samples] == [letters("one", 10), letters("two", 10), letters("three", 4)]
    assert all(s.ttft_s + 9 * s.tpot_s >= 9 * 0.019 for s in load.samples if s.num_output_tokens == 10)
    one, two, three = load.samples
    assert two.start_s < one.first_s and three.start_s >= min(one.end_s, two.end_s)
    assert 0 < load.client_cpu_share < 1


def test_what_is_sent_beside_a_load_is_not_of_it(live: Running) -> None:
    live.engine.pace_s = 0.02
    load = closed_loop(target(live), [ask("one", 30)], 1, beside=[ask("long", 2), ask("longer", 2)])
    assert [s.text for s in load.samples] == [letters("one", 30)]
    texts = [s.text for s in load.beside]
    assert texts[:3] == [letters("long", 2), letters("longer", 2), letters("long", 2)], "over and over"
    with pytest.raises(LoadError, match="HTTP 400"):
        closed_loop(target(live), [ask("one", 30)], 1, beside=[ask("x", 99999)])


def test_an_open_loop_sends_at_its_times_whatever_runs(live: Running) -> None:
    live.engine.pace_s = 0.03
    load = open_loop(target(live), [ask("one", 8), ask("two", 8), ask("three", 1)], [0.0, 0.01, 0.05])
    starts = [s.start_s - load.samples[0].start_s for s in load.samples]
    assert starts == pytest.approx([0.0, 0.01, 0.05])
    assert load.samples[2].first_s < load.samples[0].end_s
    assert all(s.error is None for s in load.samples) and load.send_lag_s >= 0


def test_every_failure_is_counted_by_its_kind(live: Running) -> None:
    """Refused, failed on the way, too few tokens (=ab ends itself), and one that is right."""
    asks = [ask("x", 99999), ask("FAULT", 5), ask("=ab", 9), ask("good", 3)]
    errors = [s.error for s in closed_loop(target(live, ignore_eos=True), asks, 4).samples]
    assert errors == ["HTTP 400", "error in the stream: engine_error", "3 tokens of 9", None]
    with pytest.raises(LoadError, match=r"HTTP 400: .*temprature"):
        asyncio.run(complete(endpoint(live.url), {"prompt": "x", "temprature": 1}))


def test_no_server_and_a_silent_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        here = Target(Endpoint("127.0.0.1", silent.getsockname()[1]), {})
        assert closed_loop(here, [ask("x", 1)], 1, timeout_s=0.1).samples[0].error == "timeout"
    assert closed_loop(here, [ask("x", 1)], 1).samples[0].error == "no connection"
    for url in ("127.0.0.1:80", "ftp://a"):
        with pytest.raises(LoadError, match="is not a URL"):
            endpoint(url)


def test_streams_are_read_whatever_way_their_bytes_are_cut() -> None:
    """An event torn over two HTTP chunks and three blocks has the time of its last byte."""
    first, last = (json.dumps({"choices": [{"text": t}]}) for t in ("a b", "c\u2028"))
    usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}})
    body = f"data: {first}\n\n: comment\n\ndata: {last}\n\ndata: {usage}\n\ndata: [DONE]\n\n".encode()
    cut = body.index(b"b") + 1
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:cut], body[cut:])) + b"0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    wire = head + chunked
    places = [len(head), len(head) + 4 + cut, wire.index(b": comment"), wire.index(b"[DONE]"), len(wire)]
    blocks = [(float(i), wire[a:b]) for i, (a, b) in enumerate(zip([0, *places], places, strict=False))]
    sample = read(Exchange(0.0, blocks))
    assert (sample.text, sample.times_s, sample.error) == ("a bc\u2028", (2.0, 3.0), None)
    assert (sample.num_prompt_tokens, sample.num_output_tokens) == (4, 2)
    plain = b"HTTP/1.1 200 OK\r\n\r\n" + body
    assert read(Exchange(0.0, [(1.0, plain)])).text == "a bc\u2028"
    for torn, error in (
        (plain[:-20], "cut short"),
        (b"", "cut short"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {\n", "unreadable"),
    ):
        assert str(read(Exchange(0.0, [(1.0, torn)])).error).startswith(error)
    unused = plain.replace(b"usage", b"usag_")
    assert read(Exchange(0.0, [(1.0, unused)])).error == "no usage"


def test_the_command(
    live: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two levels on two servers (one, under two names): figures in table, JSON and page; texts sent again are equal."""
    monkeypatch.setattr(serve, "load_tokenizer", lambda path: ByteTokenizer())
    monkeypatch.setattr(serve, "resolve_model", lambda *words: path)
    path = tmp_path / "model"
    argv = ["bench", "serve", "--url", live.url, "--peer", f"other={live.url}/v1", "--concurrency", "1,2"]
    argv += ["--input-len", "12", "--output-len", "6", "--num-prompts", "4", "--slo", "ttft_ms=5000"]
    argv += ["--html", str(tmp_path / "page.html"), "--result-dir", str(tmp_path)]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert [json.loads(file.read_text()) for file in tmp_path.glob("*-cpu-serve.json")] == [result]
    assert list(result["servers"]) == ["server", "other"]
    page = (tmp_path / "page.html").read_text()
    for rows in result["servers"].values():
        assert [row["concurrency"] for row in rows] == [1, 2]
        for row in rows:
            assert (row["completed"], row["errors"], row["output_tokens"]) == (4, {}, 24)
            assert row["repeated"] == {"requests": 2, "equal": 2, "agreement": 1.0}
            assert row["good_share"] == 1.0
            speed = f"{row['output_tokens_per_s']:.1f}"
            assert f"<td>{speed}</td>" in page and speed in out and speed in err
    assert "<svg" in page and "http://" not in page.replace(live.url, "").replace("http://www.w3.org", "")
    prompts = Counter(bytes(request.prompt_token_ids) for request in live.engine.submitted)
    assert set(prompts.values()) == {2, 4}  # each server once; those sent again twice


def test_a_server_that_answers_nothing_good_is_an_error(
    live: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "load_tokenizer", lambda path: ByteTokenizer())
    monkeypatch.setattr(serve, "resolve_model", lambda *words: tmp_path)
    argv = ["bench", "serve", "--url", live.url, "--rate", "50", "--num-prompts", "3", "--output-len", "99999"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    row = json.loads(out.splitlines()[-1])["servers"]["server"][0]
    assert (row["completed"], row["errors"]) == (0, {"HTTP 400": 3})
    assert "3 of 3 requests failed: HTTP 400" in err and "context_length_exceeded" in err
    live.engine.stop()
    assert main(["bench", "serve", "--url", "http://127.0.0.1:1"]) == 1
    assert "/v1/models answers nothing" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", live.url, "--dtype", "float32"]) == 1
    assert "dtype" in capsys.readouterr().err
