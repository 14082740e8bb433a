"""Hours of mixed requests on a server whose model costs nothing: nothing is lost, nothing is kept.

    make soak                                # an hour
    python -m benchmarks.soak --seconds 60

A child serves `benchmarks.fake_device` through the real engine, scheduler, tokenizer and HTTP server, with fewer pages
than its sequences would like, so that some are preempted. Streams of this process send it completions and chats,
several choices, logprobs, prompts that begin alike, clients that hang up, and requests that must be refused. Every
answer is checked: its status, its number of tokens, that a stream ends as it should. In the end the server must be idle
without a page held, and its memory must not have grown by more than 1 MB in 10,000 requests (judged from 10,000 on).

The last line on stdout is JSON; exit code 1 where anything was wrong. `--result-dir` keeps it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.client import chunks
from benchmarks.engines import free_port, process, until_ready
from benchmarks.fake_device import FakeDevice
from benchmarks.front_end import HOST, metric, scrape, serve

STREAMS, SEQUENCES, PAGES, PAGE_TOKENS, MAX_LEN = 24, 16, 160, 16, 1024
STEP_S = 0.0005
QUIET_S = 20.0  # in which the server must come to rest
JUDGED_FROM, MOST_GROWTH_MB = 10_000, 1.0  # requests; a 10,000 of them
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Answer:
    """What came back. status 0: nothing."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream that ended as it should; ValueError of another."""
        lines = [line for line in self.body.split(b"\n\n") if line.startswith(b"data: ")]
        if not lines or lines[-1] != b"data: [DONE]":
            raise ValueError("the stream was cut short")
        return [json.loads(line[6:]) for line in lines[:-1]]


async def ask(port: int, path: str, body: bytes, hang_up: bool = False) -> Answer:
    """One request over a connection of its own. hang_up: leave after the first bytes."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
                     b"content-length: %d\r\n\r\n%b" % (path.encode(), len(body), body))  # fmt: skip
        if hang_up:
            await reader.read(64)
            return Answer(0, b"")
        head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
        chunked = b"transfer-encoding: chunked" in head.lower()
        return Answer(int(head.split(b" ", 2)[1]) if head else 0, unchunked(rest) if chunked else rest)
    finally:
        writer.close()


def unchunked(data: bytes) -> bytes:
    """The content of a chunked body."""
    return b"".join(data[start:end] for start, end in chunks(data, 0))


@dataclass
class Client:
    """Makes requests at random and says what is wrong with an answer."""

    port: int
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def stream(self, until_s: float) -> None:
        kinds = [self.completion, self.chat, self.choices, self.leaves, self.refused]
        while time.monotonic() < until_s:
            kind = self.rng.choices(kinds, (8, 3, 2, 2, 1))[0]
            try:
                problem = await kind()
            except (OSError, ValueError, KeyError, IndexError) as error:
                problem = f"{type(error).__name__}: {error}"
            self.counts[kind.__name__] += 1
            if problem:
                self.wrong.append(f"{kind.__name__}: {problem}")

    def _prompt(self) -> list[int]:
        """Some begin like others, over one or several pages."""
        topic, length = self.rng.randrange(6), self.rng.randint(1, 300)
        shared = [1000 + 7 * topic + i for i in range(min(length, self.rng.choice((0, 40, 160))))]
        return shared + [self.rng.randrange(300, 40_000) for _ in range(length - len(shared))]

    async def _ask(self, path: str, hang_up: bool = False, **body: Any) -> Answer:
        return await ask(self.port, path, json.dumps({"ignore_eos": True, **body}).encode(), hang_up)

    async def completion(self) -> str | None:
        """Streamed, of token ids, with logprobs sometimes."""
        wanted, logprobs = self.rng.randint(1, 200), self.rng.choice((None, None, 2))
        answer = await self._ask(
            COMPLETIONS, prompt=self._prompt(), max_tokens=wanted, stream=True, logprobs=logprobs,
            stream_options={"include_usage": True},
        )  # fmt: skip
        return expect(answer, 200) or counted(answer.events[-1]["usage"], wanted)

    async def chat(self) -> str | None:
        wanted = self.rng.randint(1, 60)
        words = " ".join(self.rng.choices(("red", "fox", "über", "long", "7"), k=self.rng.randint(1, 60)))
        answer = await self._ask(CHAT, messages=[{"role": "user", "content": words}], max_tokens=wanted)
        return expect(answer, 200) or counted(answer.json["usage"], wanted)

    async def choices(self) -> str | None:
        wanted, n = self.rng.randint(1, 40), self.rng.randint(2, 4)
        answer = await self._ask(COMPLETIONS, prompt=self._prompt(), max_tokens=wanted, n=n, temperature=1)
        if problem := expect(answer, 200):
            return problem
        indexes = [choice["index"] for choice in answer.json["choices"]]
        return counted(answer.json["usage"], n * wanted) or (None if indexes == [*range(n)] else f"choices {indexes}")

    async def leaves(self) -> str | None:
        await self._ask(COMPLETIONS, hang_up=True, prompt=self._prompt(), max_tokens=500, stream=True)
        return None

    async def refused(self) -> str | None:
        bad: list[tuple[dict[str, Any], str]] = [
            ({"prompt": [5] * (MAX_LEN + 1)}, "prompt"),
            ({"prompt": [1], "max_tokens": -1}, "max_tokens"),
            ({"prompt": [1 << 40]}, "prompt"),
            ({"prompt": [1], "temprature": 1}, "temprature"),
        ]
        body, name = self.rng.choice(bad)
        answer = await self._ask(COMPLETIONS, **body)
        return expect(answer, 400) or (None if name in answer.json["error"]["message"] else answer.body.decode())


def expect(answer: Answer, status: int) -> str | None:
    return None if answer.status == status else f"status {answer.status}: {answer.body[:200]!r}"


def counted(usage: dict[str, int], wanted: int) -> str | None:
    found = usage["completion_tokens"]
    return None if found == wanted else f"{found} tokens of {wanted}"


@dataclass
class Memory:
    """Resident bytes of a process against the requests that it has answered."""

    requests: list[int] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)

    def sample(self, pid: int, requests: int) -> None:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        self.requests.append(requests)
        self.rss.append(pages * 4096)

    def growth_mb(self) -> float | None:
        """In 10,000 requests, a line through the last two thirds; None: too few for that."""
        start = len(self.rss) // 3
        requests, rss = self.requests[start:], self.rss[start:]
        if len(rss) < 3 or requests[-1] - requests[0] < JUDGED_FROM:
            return None
        return float(np.polyfit(requests, rss, 1)[0]) * 10_000 / 1e6


async def soak(port: int, pid: int, seconds: float, seed: int) -> dict[str, Any]:
    client, memory = Client(port, random.Random(seed)), Memory()
    began_s = time.monotonic()
    tasks = [asyncio.create_task(client.stream(began_s + seconds)) for _ in range(STREAMS)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(min(1.0, seconds / 10))
        memory.sample(pid, client.counts.total())
    await asyncio.gather(*tasks)
    elapsed_s = time.monotonic() - began_s
    held = await at_rest(port)
    growth = memory.growth_mb()
    if growth is not None and growth > MOST_GROWTH_MB:
        client.wrong.append(f"memory grows by {growth:.2f} MB in 10,000 requests")
    text = await asyncio.to_thread(scrape, port)
    return {
        "seconds": round(elapsed_s), "requests": client.counts.total(), "kinds": dict(client.counts),
        "requests_per_s": round(client.counts.total() / elapsed_s),
        "tokens": int(metric(text, "vllm:generation_tokens_total")),
        "preemptions": int(metric(text, "vllm:num_preemptions_total")),
        "rss_mb": round(memory.rss[-1] / 1e6), "growth_mb_in_10k": None if growth is None else round(growth, 2),
        "wrong": [*client.wrong[:20], *held], "num_wrong": len(client.wrong) + len(held),
    }  # fmt: skip


async def at_rest(port: int) -> list[str]:
    """What is still there after a while without requests."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    deadline_s, left = time.monotonic() + QUIET_S, dict[str, float]()
    while time.monotonic() < deadline_s:
        text = await asyncio.to_thread(scrape, port)
        left = {name: value for name in names if (value := metric(text, name))}
        if not left:
            return []
        await asyncio.sleep(0.1)
    return [f"{name} is {value} at rest" for name, value in left.items()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result-dir", help="folder to write the result to, as <date>-fake-soak.json")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # this is the child
    args = parser.parse_args(argv)
    if args.port is not None:
        return serve(
            args.port, FakeDevice(STEP_S), num_pages=PAGES, max_num_seqs=SEQUENCES, max_model_len=MAX_LEN,
            max_num_batched_tokens=512, page_size=PAGE_TOKENS,
        )  # fmt: skip
    port = free_port()
    with process([sys.executable, "-m", "benchmarks.soak", "--port", str(port)]) as child:
        for _ in until_ready(child, port):
            pass
        found = asyncio.run(soak(port, child.pid, args.seconds, args.seed))
    report.finish("soak", "fake", found, report.folder(args.result_dir))
    return 1 if found["num_wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
