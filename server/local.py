"""The server without a socket: the same application, called in process, for work on files and terminals.

What it answers is what an HTTP client would get, errors and limits included, since nothing is
written twice. Knows nothing about where requests come from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import Message, Scope

from engine.errors import OctavoError
from server.app import build_app
from server.config import ServerOptions
from server.lifecycle import Lifecycle, ModelHandle
from server.metrics import Metrics

MAX_BODY_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Answer:
    """What the API answers: an HTTP status and the body, a result or an error envelope."""

    status: int
    body: dict[str, Any]

    @property
    def error(self) -> dict[str, Any] | None:
        return self.body.get("error")

    @property
    def num_output_tokens(self) -> int:
        return (self.body.get("usage") or {}).get("completion_tokens", 0)


class LocalServer:
    """Serves one engine inside the running event loop. It does not own the engine."""

    def __init__(self, engine: ModelHandle, served_model_name: str | None = None) -> None:
        lifecycle = Lifecycle()
        lifecycle.ready(engine)
        options = ServerOptions(served_model_name=served_model_name, max_body_bytes=MAX_BODY_BYTES)
        self._app = build_app(lifecycle, Metrics(lifecycle, served_model_name), options)

    async def post(self, path: str, body: dict[str, Any]) -> Answer:
        """One answer in one piece. Cancelling the caller frees what the request holds in the engine."""
        parts: list[bytes] = []
        status = 0
        async for message in self._messages(path, body):
            status = message.get("status", status)
            parts.append(message.get("body", b""))
        return Answer(status, orjson.loads(b"".join(parts)))

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed answer. An error, early or late, is a chunk with the key `error`."""
        status, rest = 0, b""
        async for message in self._messages(path, body | {"stream": True}):
            status = message.get("status", status)
            rest += message.get("body", b"")
            if status != 200:
                continue
            *frames, rest = rest.split(b"\n\n")
            for frame in frames:
                if frame.startswith(b"data: {"):
                    yield orjson.loads(frame[len(b"data: ") :])
        if status != 200:
            yield orjson.loads(rest)

    async def _messages(self, path: str, body: dict[str, Any]) -> AsyncIterator[Message]:
        """What the application sends. Leaving the iterator is a client that goes away."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        task = asyncio.create_task(self._call(path, _encoded(body), sent))
        try:
            while (message := await sent.get()) is not None:
                yield message
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _call(self, path: str, raw: bytes, sent: asyncio.Queue[Message | None]) -> None:
        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())],
            "client": None, "server": None,
        }  # fmt: skip
        request: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

        async def receive() -> Message:
            if request:
                return request.pop()
            return await asyncio.get_running_loop().create_future()  # never: the caller leaves by cancelling

        try:
            await self._app(scope, receive, sent.put)
        finally:
            sent.put_nowait(None)


def _encoded(body: dict[str, Any]) -> bytes:
    """Raises OctavoError for text that came from bytes which are not UTF-8."""
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise OctavoError("the text is not valid UTF-8") from error
