"""A load client for OpenAI's streaming completions and chat: what arrived, and when.

While requests run it only notes blocks of bytes with their times; they are read when the load is over,
so that on a machine where client and server share cores little of the client is in what is measured.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import urllib.parse
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, cast

from engine.errors import OctavoError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
END = b"data: [DONE]"


class LoadError(OctavoError):
    """The server answered something else than the stream that was asked for."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go, and with which headers."""

    host: str
    port: int
    path: str = COMPLETIONS
    tls: bool = False
    headers: tuple[tuple[str, str], ...] = ()

    def request(self, fields: Mapping[str, Any]) -> bytes:
        """A whole HTTP request for a stream with usage at its end. The server is to close the connection."""
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        payload = json.dumps({**fields, **stream}).encode()
        headers = (("Host", f"{self.host}:{self.port}"), ("Content-Type", "application/json"),
                   ("Content-Length", str(len(payload))), ("Connection", "close"), *self.headers)  # fmt: skip
        head = "".join(f"{name}: {value}\r\n" for name, value in headers)
        return f"POST {self.path} HTTP/1.1\r\n{head}\r\n".encode() + payload

    @property
    def base_url(self) -> str:
        """Up to the paths of the API."""
        prefix = self.path.removesuffix(CHAT).removesuffix(COMPLETIONS)
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}{prefix}"


def endpoint(url: str, path: str = COMPLETIONS, headers: Sequence[tuple[str, str]] = ()) -> Endpoint:
    """Of a base URL; a "/v1" at its end is not needed. Raises LoadError."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LoadError(f"{url!r} is not a URL with http:// or https://")
    tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Endpoint(parts.hostname, parts.port or (443 if tls else 80), prefix + path, tls, tuple(headers))


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, timed by the client's clock in seconds."""

    start_s: float  # when it was due
    times_s: tuple[float, ...]  # when each chunk with text was here
    num_prompt_tokens: int
    num_output_tokens: int
    text: str
    error: str | None = None  # its kind; the figures of tokens leave such a request out

    @property
    def first_s(self) -> float:
        return self.times_s[0]

    @property
    def end_s(self) -> float:
        return self.times_s[-1] if self.times_s else self.start_s

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.start_s

    @property
    def tpot_s(self) -> float:
        """Seconds a token after the first. Means over chunks: a chunk may hold several tokens."""
        return (self.end_s - self.first_s) / max(1, self.num_output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Gaps between chunks."""
        return [after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)]


@dataclass(slots=True)
class Exchange:
    """The bytes of one answer as they came."""

    start_s: float
    blocks: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


class _Receiver(asyncio.Protocol):
    """Sends the request and notes the answer, until the stream says that it is done or the server hangs up."""

    def __init__(self, request: bytes, exchange: Exchange, done: asyncio.Future[None]) -> None:
        self._request, self._exchange, self._done = request, exchange, done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self._request)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._exchange.blocks.append((time.perf_counter(), data))
        if END in data[-64:]:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)


async def exchange(to: Endpoint, request: bytes, timeout_s: float, start_s: float | None = None) -> Exchange:
    """One request over a connection of its own. What goes wrong on the way is in `error`."""
    loop = asyncio.get_running_loop()
    found = Exchange(time.perf_counter() if start_s is None else start_s)
    done = loop.create_future()
    transport = None
    try:
        async with asyncio.timeout(timeout_s):
            tls = ssl.create_default_context() if to.tls else None
            transport, _ = await loop.create_connection(
                lambda: _Receiver(request, found, done), to.host, to.port, ssl=tls
            )
            await done
    except TimeoutError:
        found.error = "timeout"
    except OSError:
        found.error = "no connection"
    finally:
        if transport is not None:
            transport.close()
    return found


def read(found: Exchange) -> Sample:
    """The sample of an exchange; an answer that is not a whole stream has an error that names its kind."""
    try:
        return _read(found)
    except (ValueError, KeyError, TypeError, IndexError) as problem:
        return Sample(found.start_s, (), 0, 0, str(problem), "unreadable stream")


def _read(found: Exchange) -> Sample:
    times, texts, usage, done, error = [], [], None, False, found.error
    status, lines = _status_and_lines(found.blocks)
    if status not in (0, 200) and error is None:
        body = b" ".join(line for _, line in lines)
        return Sample(found.start_s, (), 0, 0, body.decode(errors="replace"), f"HTTP {status}")
    for when_s, line in lines:
        if not line.startswith(b"data: ") or not line.endswith(b"\n"):
            continue
        if line.startswith(END):
            done = True
            break
        event = json.loads(line[6:])
        if "error" in event:
            code = event["error"].get("code") or event["error"].get("type")
            error, texts = f"error in the stream: {code}", [str(event["error"].get("message"))]
            break
        usage = event.get("usage") or usage
        for text in _texts(event):
            times.append(when_s)
            texts.append(text)
    counts = (usage["prompt_tokens"], usage["completion_tokens"]) if usage else (0, 0)
    if error is None:
        error = "cut short" if not done else "no usage" if usage is None else None if times else "no text"
    return Sample(found.start_s, tuple(times), *counts, "".join(texts), error)


def _texts(event: dict[str, Any]) -> Iterator[str]:
    """What the chunk says, where it says something."""
    for choice in event["choices"]:
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        if text:
            yield text


def _status_and_lines(blocks: Sequence[tuple[float, bytes]]) -> tuple[int, list[tuple[float, bytes]]]:
    """The answer's status (0: there was none) and the lines of its body, each with the time of its last byte."""
    raw = b"".join(data for _, data in blocks)
    ends = list(accumulate(len(data) for _, data in blocks))
    head_end = raw.find(b"\r\n\r\n")
    if head_end < 0:
        return 0, []
    head = raw[:head_end].lower()
    body = head_end + 4
    pieces = chunks(raw, body) if b"transfer-encoding: chunked" in head else [(body, len(raw))]
    lines, begun = [], b""
    for start, end in pieces:
        place = start
        for part in raw[start:end].splitlines(keepends=True):
            place += len(part)
            begun += part
            if part.endswith(b"\n") or place == len(raw):
                lines.append((blocks[bisect_left(ends, place)][0], begun))
                begun = b""
    return int(head.split(b" ", 2)[1]), lines


def chunks(raw: bytes, place: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of a chunked body's data (RFC 9112, section 7.1). A torn last one ends with the bytes."""
    while (line_end := raw.find(b"\r\n", place)) >= 0:
        size = int(raw[place:line_end].split(b";")[0], 16)
        if size == 0:
            return
        start = line_end + 2
        yield start, min(start + size, len(raw))
        place = start + size + 2


async def complete(to: Endpoint, fields: Mapping[str, Any], timeout_s: float = 600) -> Sample:
    """One streamed request to its end. Raises LoadError."""
    sample = read(await exchange(to, to.request(fields), timeout_s))
    if sample.error is not None:
        raise LoadError(f"{sample.error}: {sample.text[:2000]}" if sample.text else sample.error)
    return sample
