"""The edge: request ids, the API key and byte limits, before any route is looked up.

Plain ASGI around the application, plus a header bound for uvicorn, which has none of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.config import ServerOptions
from server.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})  # probes; everything else needs the key
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

Headers = MutableMapping[bytes, bytes]


class Edge:
    """Wraps the application. Adds `scope["state"]["request_id"]` and the header x-request-id."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self.app = app
        self._options = options
        self._key_hash = _hash(options.api_key.encode()) if options.api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            return await error_response(refusal)(scope, receive, send_with_id)
        await self.app(scope, _BoundedBody(receive, self._options), send_with_id)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self._key_hash is not None and path not in OPEN_PATHS and not self._has_key(headers):
            return ApiError(
                401, "Missing or wrong API key.", code="invalid_api_key", headers={"www-authenticate": "Bearer"}
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return ApiError(400, "The Content-Length header is not a number.", code="invalid_header")
        if len(length) > 15 or int(length) > self._options.max_body_bytes:
            return body_too_large(self._options.max_body_bytes)
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # Hashes have one length, so the comparison tells nothing about the key's.
        return hmac.compare_digest(_hash(key.strip()), self._key_hash or b"") and scheme.lower() == b"bearer"


class _BoundedBody:
    """`receive` that counts bytes and does not wait for ever for the next of them."""

    def __init__(self, receive: Receive, options: ServerOptions) -> None:
        self._receive = receive
        self._options = options
        self._num_bytes = 0
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()  # only a disconnect can come now, at any time
        try:
            message = await asyncio.wait_for(self._receive(), self._options.body_timeout_s)
        except TimeoutError:
            raise ApiError(
                408, "The request body did not arrive in time.", code="request_timeout", headers={"connection": "close"}
            ) from None
        self._num_bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._num_bytes > self._options.max_body_bytes:
            raise body_too_large(self._options.max_body_bytes)
        return message


def body_too_large(max_body_bytes: int) -> ApiError:
    # The rest of the body is still on its way, so the connection cannot be used again.
    text = f"The request body is larger than {max_body_bytes} bytes."
    return ApiError(413, text, code="request_too_large", headers={"connection": "close"})


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def bounded_protocol(options: ServerOptions) -> type[HttpToolsProtocol]:
    """uvicorn's HTTP protocol with bounds on size and time until a request's headers are complete."""

    class BoundedHttp(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._head_bytes: int | None = 0  # None while a body arrives
            self._has_ended = False  # a message, in the bytes at hand
            self._head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            self._head_bytes = 0
            self._start_timer()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head_bytes = None
            self._stop_timer()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._head_bytes, self._has_ended = 0, True
            super().on_message_complete()

        def data_received(self, data: bytes) -> None:
            self._has_ended = False
            super().data_received(data)
            # Bytes that a message ended in are its body, but for the little that may come behind it.
            if self._head_bytes is None or self._has_ended or self.transport.is_closing():
                return
            self._head_bytes += len(data)
            if self._head_bytes > options.max_header_bytes:
                self.send_400_response("Request header fields too large.")

        def _start_timer(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(options.body_timeout_s, self._head_is_late)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _head_is_late(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

    return BoundedHttp
