"""A load client for OpenAI's streaming completions, and the figures of what it saw.

Raw asyncio on purpose: on a machine where client and server share two cores, a general HTTP
library's cost per chunk would be part of what is measured.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import OctavoError


class LoadError(OctavoError):
    """The server answered something else than the stream that was asked for."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, timed by the client's clock."""

    start_s: float
    first_s: float  # when the first token was here
    end_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    text: str

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.start_s

    @property
    def tpot_s(self) -> float:
        """Seconds a token after the first. Means over chunks: a chunk may hold several tokens."""
        return (self.end_s - self.first_s) / max(1, self.num_output_tokens - 1)


async def complete(port: int, body: dict[str, Any]) -> Sample:
    """POST /v1/completions on this machine with streaming, to its end. Raises LoadError."""
    payload = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    start_s = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + payload)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.split(b"\r\n")[0]:
            raise LoadError(f"{status.splitlines()[0].decode()}: {(await reader.read(2000)).decode(errors='replace')}")
        return await _read_stream(reader, start_s)
    finally:
        writer.close()


async def _read_stream(reader: asyncio.StreamReader, start_s: float) -> Sample:
    """Lines of the event stream; those of the chunked encoding in between carry no 'data:' and are passed over."""
    first_s, end_s, usage, text = 0.0, 0.0, None, []
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            break
        event = json.loads(line[6:])
        if "error" in event:
            raise LoadError(f"error in the stream: {event['error']}")
        usage = event.get("usage") or usage
        if event["choices"]:
            end_s = time.perf_counter()
            first_s = first_s or end_s
            text.append(event["choices"][0]["text"])
    if usage is None or not first_s:
        raise LoadError("the stream ended without tokens or without usage")
    return Sample(start_s, first_s, end_s, usage["prompt_tokens"], usage["completion_tokens"], "".join(text))


@dataclass(frozen=True, slots=True)
class Round:
    """All requests of one round, stream by stream; each stream sent its own one after the other."""

    samples: tuple[Sample, ...]

    @property
    def output_tokens_per_s(self) -> float:
        seconds = max(s.end_s for s in self.samples) - min(s.start_s for s in self.samples)
        return sum(s.num_output_tokens for s in self.samples) / seconds


async def run_round(port: int, bodies: Sequence[Sequence[dict[str, Any]]]) -> Round:
    """`bodies[stream]` are the requests of one stream. All streams start together."""

    async def stream(own: Sequence[dict[str, Any]]) -> list[Sample]:
        return [await complete(port, body) for body in own]

    found = await asyncio.gather(*(stream(own) for own in bodies))
    return Round(tuple(sample for samples in found for sample in samples))


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def figures(rounds: Sequence[Round]) -> dict[str, float]:
    """Output tokens/s (median of the rounds); TTFT and TPOT over all requests, in milliseconds."""
    samples = [sample for r in rounds for sample in r.samples]
    ttft = [1000 * s.ttft_s for s in samples]
    tpot = [1000 * s.tpot_s for s in samples]
    return {
        "output_tokens_per_s": round(statistics.median(r.output_tokens_per_s for r in rounds), 1),
        "ttft_ms_p50": round(percentile(ttft, 50), 1),
        "ttft_ms_p95": round(percentile(ttft, 95), 1),
        "tpot_ms_p50": round(percentile(tpot, 50), 2),
        "tpot_ms_p95": round(percentile(tpot, 95), 2),
        "requests": len(samples),
        "rounds": len(rounds),
    }
