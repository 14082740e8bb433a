"""What every route does first and last: the body in, the model's name checked, JSON out."""

from __future__ import annotations

import orjson
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from server.config import ServerOptions
from server.errors import ApiError
from server.lifecycle import ModelHandle
from server.shapes import Json


async def read_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page may post other types across origins without asking
        raise ApiError(415, "The Content-Type must be application/json.", code="unsupported_media_type")
    try:
        return await request.body()
    except ClientDisconnect:
        raise ApiError(400, "The request body is incomplete.", code="incomplete_body") from None


def served_name(options: ServerOptions, engine: ModelHandle) -> str:
    """What clients call the model."""
    return options.served_model_name or engine.model_name


def check_model(options: ServerOptions, name: str | None, engine: ModelHandle) -> None:
    """Raises ApiError 404 for another model than the one that is served."""
    served = served_name(options, engine)
    if name is not None and name != served:
        shown = name if len(name) <= 100 else name[:100] + "..."
        text = f"The model '{shown}' does not exist here; this server has '{served}'."
        raise ApiError(404, text, param="model", code="model_not_found")


def json_answer(body: Json, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
