"""What the server can carry when the model costs nothing: streams over HTTP from a fake device.

    python -m benchmarks.front_end     # --help

A child serves `benchmarks.fake_device` through the real engine, scheduler, tokenizer and HTTP server. Its device takes
as long for a step as the wanted rate of tokens allows; this process opens the streams (raw sockets, so that the client
stays cheap) and counts. Told are tokens and frames a second, CPU microseconds of the server's process by frame and by
token, the phases of the engine's thread and the event loop's lag, as `/metrics` has them. `--device-steps` tokens come
with each frame. With `--long-prompt` a text of so many tokens is sent again and again meanwhile, to be tokenized only.

Writes benchmarks/results/<date>-fake-front-end.json; the last line on stdout is the same JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.engines import free_port, process, until_ready
from benchmarks.fake_device import FakeDevice, fake_engine
from engine.config import DEFAULT_MODEL, EngineOptions
from engine.phases import PHASES
from engine.start import model_path
from engine.text import load_tokenizer
from server.config import ServerOptions
from server.lifecycle import ModelHandle, Report
from server.process import run

PROMPT_TOKENS, HOST = 32, "127.0.0.1"


def serve(port: int, device: FakeDevice, **options: Any) -> int:
    """The child: until a signal. `options` are those of `fake_engine`."""

    def launch(report: Report) -> ModelHandle:
        tokenizer = load_tokenizer(model_path(EngineOptions()), None)
        engine = fake_engine(device, tokenizer, **options)
        engine.model_name = DEFAULT_MODEL
        return engine.start()

    return run(launch, ServerOptions(host=HOST, port=port))


@dataclass
class Seen:
    """By all streams, since it was set to zero."""

    frames: int = 0

    def of(self, data: bytes) -> None:
        self.frames += data.count(b"data: {")


async def stream(port: int, number: int, tokens: int, seen: Seen, opened: asyncio.Semaphore) -> None:
    ids = ",".join(str(1000 + (number * 31 + i) % 30_000) for i in range(PROMPT_TOKENS))
    body = f'{{"prompt":[{ids}],"max_tokens":{tokens},"ignore_eos":true,"stream":true}}'.encode()
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                 b"content-length: %d\r\n\r\n%b" % (len(body), body))  # fmt: skip
    opened.release()
    try:
        while data := await reader.read(1 << 16):
            seen.of(data)
    finally:
        writer.close()


async def load(port: int, pid: int, streams: int, seconds: float, long_prompt: int) -> dict[str, float]:
    """The steady state: all streams run, for so long."""
    seen, opened = Seen(), asyncio.Semaphore(0)
    tasks = [asyncio.create_task(stream(port, i, 1 << 13, seen, opened)) for i in range(streams)]
    for _ in tasks:
        await opened.acquire()
    while metric(await asyncio.to_thread(scrape, port), "vllm:num_requests_running") < streams:
        await asyncio.sleep(0.2)
    if long_prompt:
        tasks.append(asyncio.create_task(tokenize(port, long_prompt)))
    await asyncio.sleep(1)
    before, start_s, own_s = await asyncio.to_thread(snapshot, port, pid), time.perf_counter(), time.process_time()
    seen.frames = 0
    await asyncio.sleep(seconds)
    frames, elapsed_s, own_s = seen.frames, time.perf_counter() - start_s, time.process_time() - own_s
    after = await asyncio.to_thread(snapshot, port, pid)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return rates(before, after, frames, elapsed_s) | {"client_cpu_share": round(own_s / elapsed_s, 2)}


def rates(before: dict[str, float], after: dict[str, float], frames: int, elapsed_s: float) -> dict[str, float]:
    grown = {name: after[name] - before[name] for name in after}
    cpu_us, tokens = 1e6 * grown["cpu_s"], grown["tokens"]
    return {
        "tokens_per_s": round(tokens / elapsed_s),
        "frames_per_s": round(frames / elapsed_s),
        "server_cpu_share": round(cpu_us / 1e6 / elapsed_s, 2),
        "server_cpu_us_per_frame": round(cpu_us / max(frames, 1), 1),
        "server_cpu_us_per_token": round(cpu_us / max(tokens, 1), 1),
        "lag_p99_at_most_ms": quantile_ms({name: n for name, n in grown.items() if name.startswith("le")}, 0.99),
        **{f"loop_{phase}_share": round(grown[phase] / elapsed_s, 3) for phase in PHASES if phase in grown},
    }


async def tokenize(port: int, num_tokens: int) -> None:
    """Texts of about so many tokens, one after the other, until cancelled."""
    text = "The quick brown fox jumps over the lazy dog. " * (num_tokens // 10)
    body = b'{"prompt":"%b"}' % text.encode()
    request = (b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
               b"content-length: %d\r\n\r\n%b" % (len(body), body))  # fmt: skip
    while True:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(request)
        while await reader.read(1 << 16):
            pass
        writer.close()


def metric(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=30) as answer:
        return answer.read().decode()


def snapshot(port: int, pid: int) -> dict[str, float]:
    text = scrape(port)
    found = {"tokens": metric(text, "vllm:generation_tokens_total"), "cpu_s": cpu_seconds(pid)}
    lags = re.finditer(r'^octavo_event_loop_lag_seconds_bucket{le="([^"]+)"} (\S+)$', text, re.MULTILINE)
    phases = re.finditer(r'^octavo_loop_seconds_total{[^}]*phase="(\w+)"} (\S+)$', text, re.MULTILINE)
    return found | {f"le{m[1]}": float(m[2]) for m in lags} | {m[1]: float(m[2]) for m in phases}


def cpu_seconds(pid: int) -> float:
    """Of all threads of the process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def quantile_ms(buckets: dict[str, float], share: float) -> float:
    """The upper end of the bucket that holds it."""
    whole = buckets["le+Inf"]
    ends = sorted((float(name[2:]), count) for name, count in buckets.items())
    return next(1e3 * end for end, count in ends if count >= share * whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--device-steps", type=int, default=8, help="tokens that a sequence draws in one device call")
    parser.add_argument("--tokens-per-s", type=float, default=20_000, help="that the device would draw")
    parser.add_argument("--long-prompt", type=int, default=0, help="tokens of a text that is tokenized all the while")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # this is the child
    args = parser.parse_args()
    step_s = args.streams * args.device_steps / args.tokens_per_s
    if args.port is not None:
        return serve(
            args.port, FakeDevice(step_s), max_num_seqs=args.streams, max_model_len=1 << 14,
            decode_steps=args.device_steps, max_num_batched_tokens=8192, max_queued_requests=2 * args.streams,
            enable_prefix_caching=False,
        )  # fmt: skip
    port = free_port()
    with process([sys.executable, "-m", "benchmarks.front_end", *sys.argv[1:], "--port", str(port)]) as child:
        for _ in until_ready(child, port):
            pass
        found = asyncio.run(load(port, child.pid, args.streams, args.seconds, args.long_prompt))
    row = {
        "streams": args.streams,
        "tokens_a_frame": args.device_steps,
        "asked_tokens_per_s": args.tokens_per_s,
        "long_prompt_tokens": args.long_prompt,
    } | found
    print(report.table(("", "value"), list(row.items())))
    report.finish("front-end", "fake", row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
