"""Sending answers while listening for a client that goes away: SSE streams and whole bodies.

A stream ends in exactly one way: finish chunks, or one error event; then `[DONE]`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.answers import Answer
from server.errors import ApiError, envelope, to_api_error
from server.shapes import Choice, Json

log = logging.getLogger("octavo.server")

HEARTBEAT_S = 15.0  # below the idle timeouts of common proxies
DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Disconnected(Exception):
    """The client closed its connection before the answer was complete."""


def frame(data: Json) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def while_connected[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes. Raises `Disconnected`."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Disconnected
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(answer: Answer) -> bytes:
    """Wait for every choice; then the JSON of all of them. Raises `ApiError` when one fails."""
    session = answer.session
    choices = [Choice() for _ in range(session.work.num_choices)]
    while not session.done:
        for choice, delta in await session.next(HEARTBEAT_S):
            choices[choice].deltas.append(delta)
    # The logprobs of a batch of long prompts are many: their writing must not stop the loop.
    return await asyncio.to_thread(lambda: orjson.dumps(answer.whole(choices)))


async def frames(answer: Answer) -> AsyncIterator[bytes]:
    """The whole stream. The status is sent by now, so an error becomes an event."""
    session = answer.session
    options = session.work.body.stream_options
    try:
        while not session.done:
            events = await session.next(HEARTBEAT_S)
            chunks = [frame(chunk) for event in events for chunk in answer.chunks(event)]
            if chunks:
                yield b"".join(chunks)
            elif not events:
                yield b": keep-alive\n\n"
        if options is not None and options.include_usage:
            yield frame(answer.usage_chunk())
    except ApiError as error:
        yield frame(envelope(error))
    except Exception as error:  # a stream must have an ending, whatever went wrong
        log.error("a stream failed", exc_info=error)
        yield frame(envelope(to_api_error(error)))
    yield DONE


class EventStream(Response):
    """A streamed answer. Closes its session on every way out: end, error, disconnect, cancel."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        super().__init__(None, 200, _HEADERS, self.media_type)
        del self.headers["content-length"]
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except Disconnected:
            log.debug("a client left its stream")
        finally:
            self._answer.session.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for body in frames(self._answer):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
