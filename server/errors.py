"""One place turns exceptions into HTTP answers, all in OpenAI's error envelope.

Texts are fixed or come from errors written for users; nothing of an unexpected exception leaks.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

from engine.errors import ContextOverflow, EngineStopped, InvalidParam, OctavoError, QueueFull

log = logging.getLogger("octavo.server")

MAX_MESSAGE_CHARS = 2000
MAX_RETRY_AFTER_S = 60.0  # OpenAI's client does not retry at all when told to wait above 120 s
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than success: status, the envelope's four fields, and when to try again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.extra_headers = dict(headers or {})

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return self.extra_headers
        # Jitter on our side too: clients that failed together must not return together.
        wait_s = min(self.retry_after_s * random.uniform(1.0, 1.25), MAX_RETRY_AFTER_S)
        retry = {"retry-after": str(max(1, round(wait_s))), "retry-after-ms": str(round(wait_s * 1000))}
        return retry | self.extra_headers


def not_ready(message: str, retry_after_s: float = 2.0) -> ApiError:
    return ApiError(503, message, code="not_ready", retry_after_s=retry_after_s)


def shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down", retry_after_s=1.0)


_ROUTES = {
    "generate": "generates text: /v1/chat/completions and /v1/completions",
    "embed": "embeds texts: /v1/embeddings, and by similarity /v1/rerank and /v1/score",
    "score": "scores pairs of texts: /v1/rerank and /v1/score",
}


def wrong_task(model_name: str, task: str) -> ApiError:
    text = f"The model '{model_name}' does not do this. It {_ROUTES[task]}."
    return ApiError(400, text, param="model", code="unsupported_model")


def engine_fault() -> ApiError:
    # The fault belongs to this request: the same one again would fail again.
    return ApiError(
        500,
        "The engine failed on this request. Quote the x-request-id header when you report it.",
        code="engine_error",
        headers={"x-should-retry": "false"},
    )


def to_api_error(error: Exception) -> ApiError:
    """The answer for any exception. What is not meant for users becomes a 500 with a fixed text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidParam):
        code = "context_length_exceeded" if isinstance(error, ContextOverflow) else "invalid_value"
        return ApiError(400, f"Invalid '{error.param}': {error.message}", param=error.param, code=code)
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, EngineStopped):
        return ApiError(503, "The engine takes no requests now.", code="engine_stopped", retry_after_s=1.0)
    if isinstance(error, HTTPException):
        return _from_http(error)
    if isinstance(error, OctavoError):
        log.error("unexpected error of the engine: %s", error)
    return ApiError(500, "Internal server error. Quote the x-request-id header when you report it.")


def _from_http(error: HTTPException) -> ApiError:
    """What the router answers on its own: an unknown path or a wrong method."""
    texts = {404: "This path does not exist.", 405: "This path does not answer to this method."}
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    text = texts.get(error.status_code, "The request could not be handled.")
    return ApiError(error.status_code, text, code=codes.get(error.status_code), headers=error.headers)


def envelope(error: ApiError) -> dict[str, Any]:
    """OpenAI's `ErrorResponse`; all four keys are required there."""
    body = {"message": _clean(error.message), "type": error.type, "param": error.param, "code": error.code}
    if error.param is not None:
        body["param"] = _clean(error.param)[:200]
    return {"error": body}


def error_response(error: Exception) -> Response:
    answer = to_api_error(error)
    return Response(orjson.dumps(envelope(answer)), answer.status, answer.headers(), media_type="application/json")


def _clean(text: str) -> str:
    """Bounded, and encodable whatever the client sent (a lone surrogate is not)."""
    if len(text) > MAX_MESSAGE_CHARS:
        text = text[:MAX_MESSAGE_CHARS] + "..."
    return text.encode("utf-8", "replace").decode("utf-8")
