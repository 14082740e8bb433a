"""The routes. Each reads forward: body -> checked request -> `Work` -> session -> answer.

Built once a server by `build_app`; all it shares is in `Routes`, nothing in module globals.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import CapacityError, InvalidParam, OctavoError
from server.answers import ChatAnswer, CompletionAnswer
from server.config import ServerOptions
from server.errors import ApiError, error_response
from server.lifecycle import EngineHandle, Lifecycle, ModelHandle, TextCodec
from server.limits import Edge
from server.metrics import Metrics
from server.pooling import PoolingRoutes
from server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ReshardRequest,
    TokenizeRequest,
    parse,
)
from server.requests import check_model, json_answer, read_body, served_name
from server.session import Mailbox, Session, Work, check_budget, prepare_chat, prepare_completion, render
from server.shapes import Json
from server.sse import Disconnected, EventStream, while_connected, whole

try:
    VERSION = metadata.version("octavo")
except metadata.PackageNotFoundError:  # run from a checkout that was not installed
    VERSION = "unknown"


def build_app(lifecycle: Lifecycle, metrics: Metrics, options: ServerOptions) -> ASGIApp:
    """The whole ASGI application. Call it with the event loop that will serve it running."""
    api = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    mailbox = Mailbox(asyncio.get_running_loop())
    routes = Routes(lifecycle, metrics, options, mailbox)
    pooling = PoolingRoutes(lifecycle, metrics, options, mailbox)
    for path, endpoint, method in (*routes.table(), *pooling.table()):
        api.add_api_route(path, endpoint, methods=[method], response_model=None)
    for kind in (HTTPException, ApiError, OctavoError, Exception):
        api.add_exception_handler(kind, _answer_error)
    return Edge(_Counted(api, metrics), options)


async def _answer_error(_: Request, error: Exception) -> Response:
    return error_response(error)


class Routes:
    """Generation, models and tokens, probes. Embeddings and scores: `server/pooling.py`."""

    def __init__(self, lifecycle: Lifecycle, metrics: Metrics, options: ServerOptions, mailbox: Mailbox) -> None:
        self.lifecycle = lifecycle
        self.metrics = metrics
        self.options = options
        self._mailbox = mailbox
        self._created = int(time.time())

    def table(self) -> list[tuple[str, Callable, str]]:
        admin = [("/admin/reshard", self.reshard, "POST")] if self.options.admin_routes else []
        return [
            *admin,
            ("/v1/chat/completions", self.chat, "POST"),
            ("/v1/completions", self.completions, "POST"),
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{model:path}", self.model, "GET"),
            ("/tokenize", self.tokenize, "POST"),
            ("/detokenize", self.detokenize, "POST"),
            ("/tokenizer_info", self.tokenizer_info, "GET"),
            ("/health", self.health, "GET"),
            ("/ping", self.ping, "GET"),
            ("/ready", self.ready, "GET"),
            ("/metrics", self.scrape, "GET"),
            ("/version", self.version, "GET"),
        ]

    # -- generation -----------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, ChatRequest, prepare_chat, ChatAnswer)

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionRequest, prepare_completion, CompletionAnswer)

    async def _generate[Body: (ChatRequest, CompletionRequest)](
        self,
        request: Request,
        kind: type[Body],
        prepare: Callable[[EngineHandle, Body, float], Work],
        answer_kind: Callable[..., ChatAnswer | CompletionAnswer],
    ) -> Response:
        arrival_s = time.monotonic()
        engine = self.lifecycle.generating()
        raw = await read_body(request)
        # Parsing and tokenizing a long prompt takes long, and /health must not wait for it.
        work = await asyncio.to_thread(self._prepare, partial(parse, kind, raw), engine, prepare, arrival_s)
        session = Session(work, self.lifecycle, self._mailbox, self.metrics)
        session.open()
        answer = answer_kind(session, engine.tokenizer, served_name(self.options, engine), work.body)
        if work.body.stream:
            return EventStream(answer)
        try:
            body = await while_connected(request.receive, whole(answer))
            return Response(body, media_type="application/json")
        except Disconnected:
            return Response(status_code=499)  # nobody reads it; the log and the metrics do
        finally:
            session.close()

    def _prepare[Body: (ChatRequest, CompletionRequest)](
        self,
        read: Callable[[], Body],
        engine: EngineHandle,
        prepare: Callable[[EngineHandle, Body, float], Work],
        arrival_s: float,
    ) -> Work:
        body = read()
        check_model(self.options, body.model, engine)
        check_budget(body, self.options.max_choices)
        return prepare(engine, body, arrival_s)

    # -- for operators ----------------------------------------------------------------------

    async def reshard(self, request: Request) -> Response:
        """Another cut over the devices; answers when the engine serves under it."""
        engine = self.lifecycle.generating()
        body = parse(ReshardRequest, await read_body(request))
        start_s = time.monotonic()
        try:
            await asyncio.to_thread(engine.reshard, body.sharding)
        except CapacityError as error:
            raise ApiError(409, str(error), param="sharding", code="does_not_fit") from None
        return json_answer({"sharding": body.sharding, "elapsed_s": round(time.monotonic() - start_s, 3)})

    # -- models and tokens ----------------------------------------------------------------

    async def models(self) -> Response:
        return json_answer({"object": "list", "data": [self._card(self.lifecycle.serving())]})

    async def model(self, model: str) -> Response:
        engine = self.lifecycle.serving()
        check_model(self.options, model, engine)
        return json_answer(self._card(engine))

    async def tokenize(self, request: Request) -> Response:
        engine = self.lifecycle.serving()
        raw = await read_body(request)
        return json_answer(await asyncio.to_thread(self._tokenized, engine, raw))

    def _tokenized(self, engine: ModelHandle, raw: bytes) -> Json:
        body = parse(TokenizeRequest, raw)
        check_model(self.options, body.model, engine)
        tokenizer = _tokenizer(engine)
        text = body.prompt if body.prompt is not None else render(tokenizer, body)
        add_special = body.prompt is not None if body.add_special_tokens is None else body.add_special_tokens
        ids = tokenizer.encode(text, add_special_tokens=add_special)
        return {
            "count": len(ids),
            "max_model_len": engine.config.max_model_len,
            "tokens": list(ids),
            "token_strs": [tokenizer.token_str(i) for i in ids] if body.return_token_strs else None,
        }

    async def detokenize(self, request: Request) -> Response:
        engine = self.lifecycle.serving()
        raw = await read_body(request)
        return json_answer(await asyncio.to_thread(self._detokenized, engine, raw))

    def _detokenized(self, engine: ModelHandle, raw: bytes) -> Json:
        body = parse(DetokenizeRequest, raw)
        check_model(self.options, body.model, engine)
        if max(body.tokens, default=0) >= engine.vocab_size:
            raise InvalidParam("tokens", f"token ids must be below {engine.vocab_size}")
        return {"prompt": _tokenizer(engine).decode(body.tokens, skip_special_tokens=False)}

    async def tokenizer_info(self) -> Response:
        """vLLM's, by which lm-eval knows that it needs no tokenizer of its own. Templates stay here."""
        return json_answer({"tokenizer_class": "Octavo", **_tokenizer(self.lifecycle.serving()).special_tokens})

    def _card(self, engine: ModelHandle) -> Json:
        model_id = served_name(self.options, engine)
        return {
            "id": model_id,
            "object": "model",
            "created": self._created,
            "owned_by": "octavo",
            "root": engine.model_name,
            "parent": None,
            "max_model_len": engine.config.max_model_len,
            "permission": [],
        }

    # -- probes ---------------------------------------------------------------------------

    async def ping(self) -> Response:
        """200 while the process does what it should, loading included: a liveness probe."""
        return Response(status_code=200 if self.lifecycle.status != "failed" and not self._dead() else 503)

    async def health(self) -> Response:
        """vLLM's meaning: 200 from ready to exit, so that scripts may wait for it; 503 if dead."""
        return Response(status_code=200 if self.lifecycle.alive else 503)

    async def ready(self) -> Response:
        """200 when new requests are welcome. Always tells the start-up phase, its progress and what took how long."""
        state = self.lifecycle
        status = "failed" if self._dead() else state.status
        elapsed_s = state.ready_s if state.ready_s is not None else time.monotonic() - state.started_s
        answer = {"status": status, "progress": state.progress, "done": state.done, "of": state.of}
        answer |= {"elapsed_s": round(elapsed_s, 3), "phases_s": state.phases_s}
        return json_answer(answer, 200 if status == "ready" else 503)

    def _dead(self) -> bool:
        return self.lifecycle.engine is not None and not self.lifecycle.alive

    async def scrape(self) -> Response:
        return Response(self.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self) -> Response:
        return json_answer({"version": VERSION})


class _Counted:
    """Counts answers by status, and requests that a client sent again."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        count = dict(scope["headers"]).get(b"x-stainless-retry-count", b"0")

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(message["status"], is_retry=count not in (b"", b"0"))
            await send(message)

        await self.app(scope, receive, counting_send)


def _tokenizer(engine: ModelHandle) -> TextCodec:
    if engine.tokenizer is None:
        raise InvalidParam("prompt", "this server has no tokenizer")
    return engine.tokenizer
