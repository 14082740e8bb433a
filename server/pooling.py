"""The routes of embeddings and scores: body -> checked request -> texts -> session -> JSON.

A text is the unit of work; texts of all requests share steps of the engine.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import orjson
from fastapi import Request
from starlette.responses import Response

from engine.errors import InvalidParam
from engine.pooling.request import Pooled, PoolingRequest, TextIds
from engine.pooling.texts import embedding, read_pairs, read_text
from engine.request import FinishReason
from server.config import ServerOptions
from server.errors import ApiError, engine_fault, shutting_down
from server.lifecycle import Lifecycle, PoolingHandle
from server.metrics import Metrics
from server.pooling_protocol import EmbeddingRequest, RerankRequest, ScoreRequest
from server.protocol import parse
from server.requests import check_model, read_body, served_name
from server.session import Mailbox
from server.shapes import Json
from server.sse import Disconnected, while_connected

log = logging.getLogger("octavo.server")
Numbers = list[np.ndarray]  # float32, one vector a text
JSON_OPTIONS = orjson.OPT_SERIALIZE_NUMPY


@dataclass(frozen=True, slots=True)
class TextWork:
    """A request made ready: what the engine computes, and how its answer is made of it."""

    texts: tuple[TextIds, ...]
    answer: Callable[[Numbers], Json]

    @property
    def num_tokens(self) -> int:
        return sum(len(text.token_ids) for text in self.texts)


class PoolingRoutes:
    """Of a server whose model embeds or scores; on another they answer 400 and say what the model does."""

    def __init__(self, lifecycle: Lifecycle, metrics: Metrics, options: ServerOptions, mailbox: Mailbox) -> None:
        self.lifecycle = lifecycle
        self.metrics = metrics
        self.options = options
        self._mailbox = mailbox

    def table(self) -> list[tuple[str, Callable, str]]:
        return [
            ("/v1/embeddings", self.embeddings, "POST"),
            *((path, self.rerank, "POST") for path in ("/v1/rerank", "/v2/rerank", "/rerank")),
            *((path, self.score, "POST") for path in ("/v1/score", "/score")),
        ]

    async def embeddings(self, request: Request) -> Response:
        return await self._pool(request, EmbeddingRequest, prepare_embeddings, "embed")

    async def rerank(self, request: Request) -> Response:
        return await self._pool(request, RerankRequest, prepare_rerank, "embed", "score")

    async def score(self, request: Request) -> Response:
        return await self._pool(request, ScoreRequest, prepare_score, "embed", "score")

    async def _pool[Body: (EmbeddingRequest, RerankRequest, ScoreRequest)](
        self, request: Request, kind: type[Body], prepare: Callable[[PoolingHandle, Body, str], TextWork], *tasks: str
    ) -> Response:
        arrival_s = time.monotonic()
        engine = self.lifecycle.pooling(*tasks)
        raw = await read_body(request)
        # Parsing and tokenizing many texts takes long, and /health must not wait for it.
        work = await asyncio.to_thread(self._prepare, partial(parse, kind, raw), engine, prepare)
        session = TextSession(work, engine, self.lifecycle, self._mailbox, self.metrics, arrival_s)
        session.open()
        try:
            body = await while_connected(request.receive, _whole(session))
            return Response(body, media_type="application/json")
        except Disconnected:
            return Response(status_code=499)  # nobody reads it; the log and the metrics do
        finally:
            session.close()

    def _prepare[Body: (EmbeddingRequest, RerankRequest, ScoreRequest)](
        self, read: Callable[[], Body], engine: PoolingHandle, prepare: Callable[[PoolingHandle, Body, str], TextWork]
    ) -> TextWork:
        body = read()
        check_model(self.options, body.model, engine)
        most = self.options.max_choices
        if body.num_texts > most:
            name = {EmbeddingRequest: "input", RerankRequest: "documents", ScoreRequest: "text_2"}[type(body)]
            raise InvalidParam(name, f"{body.num_texts} texts are more than {most}")
        return prepare(engine, body, served_name(self.options, engine))


# -- from bodies to texts, and from numbers to answers ------------------------------------------


def prepare_embeddings(engine: PoolingHandle, body: EmbeddingRequest, model: str) -> TextWork:
    """Slow for many texts: call it in a thread. Raises `InvalidParam`."""
    engine.config.check_dimensions(body.dimensions)
    how: dict[str, Any] = {"truncate": body.truncate_prompt_tokens, "add_special_tokens": body.add_special_tokens}
    single = len(body.input) == 1
    texts = tuple(
        read_text(engine, prompt, "input" if single else f"input[{i}]", **how) for i, prompt in enumerate(body.input)
    )
    encode = _base64 if body.encoding_format == "base64" else np.ascontiguousarray

    def answer(numbers: Numbers) -> Json:
        vectors = (embedding(engine.config, values, body.dimensions, body.normalize) for values in numbers)
        data = [{"object": "embedding", "index": i, "embedding": encode(vector)} for i, vector in enumerate(vectors)]
        extras = {"id": _name("embd", body.request_id), "created": int(time.time())}
        return {"object": "list", "data": data, "model": model, "usage": _usage(texts)} | extras

    return TextWork(texts, answer)


def prepare_rerank(engine: PoolingHandle, body: RerankRequest, model: str) -> TextWork:
    """Slow for many texts: call it in a thread. Raises `InvalidParam`."""
    scoring = read_pairs(engine, [body.query], body.documents, ("query", "documents"), body.truncate_prompt_tokens)

    def answer(numbers: Numbers) -> Json:
        scores = scoring.scores(engine.config, numbers)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n or None]
        results = [
            {"index": i, "relevance_score": scores[i]}
            | ({"document": {"text": body.documents[i]}} if body.return_documents else {})
            for i in order
        ]
        usage = _usage(scoring.texts)
        return {"id": _name("rerank", body.request_id), "model": model, "usage": usage, "results": results}

    return TextWork(scoring.texts, answer)


def prepare_score(engine: PoolingHandle, body: ScoreRequest, model: str) -> TextWork:
    """Slow for many texts: call it in a thread. Raises `InvalidParam`."""
    names = ("text_1", "text_2")
    scoring = read_pairs(engine, body.text_1, body.text_2, names, body.truncate_prompt_tokens)

    def answer(numbers: Numbers) -> Json:
        scores = scoring.scores(engine.config, numbers)
        data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
        head = {"id": _name("score", body.request_id), "object": "list", "created": int(time.time()), "model": model}
        return head | {"data": data, "usage": _usage(scoring.texts)}

    return TextWork(scoring.texts, answer)


def _base64(vector: np.ndarray) -> str:
    """Little-endian float32, as OpenAI's clients read it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _usage(texts: Sequence[TextIds]) -> Json:
    count = sum(len(text.token_ids) for text in texts)
    return {"prompt_tokens": count, "total_tokens": count}


def _name(prefix: str, given: str | None) -> str:
    return f"{prefix}-{given or uuid.uuid4().hex}"


# -- a request's stay in the engine -------------------------------------------------------------


class TextSession:
    """`open`, `numbers`, and always `close`."""

    def __init__(
        self,
        work: TextWork,
        engine: PoolingHandle,
        lifecycle: Lifecycle,
        mailbox: Mailbox,
        metrics: Metrics,
        arrival_s: float,
    ) -> None:
        self.work = work
        self._engine = engine
        self._lifecycle = lifecycle
        self._mailbox = mailbox
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._request_id = uuid.uuid4().hex
        self._queue: asyncio.Queue[list[Pooled] | ApiError] = asyncio.Queue()
        self._num_open = len(work.texts)

    def open(self) -> None:
        """Submit the texts, or none. Raises the engine's errors."""
        self._lifecycle.enter(self)
        try:
            request = PoolingRequest(request_id=self._request_id, texts=self.work.texts)
            self._engine.submit(request, partial(self._mailbox.put, self._queue))
        except Exception:
            self._num_open = 0  # never admitted, so nothing to count as aborted
            self._lifecycle.leave(self)
            raise
        self._metrics.observe("request_prompt_tokens", self.work.num_tokens)

    async def numbers(self) -> Numbers:
        """The model's vector of each text, in order. Raises `ApiError` when one failed or the server shuts down."""
        found: dict[int, np.ndarray] = {}
        while self._num_open:
            results = await self._queue.get()
            if isinstance(results, ApiError):
                raise results
            for result in results:
                self._take(result, found)
        self._metrics.observe("e2e_request_latency_seconds", time.monotonic() - self._arrival_s)
        return [found[i] for i in range(len(self.work.texts))]

    def _take(self, result: Pooled, found: dict[int, np.ndarray]) -> None:
        self._num_open -= 1
        if result.values is not None:
            found[result.index] = result.values
            self._metrics.ended(FinishReason.STOP)
            return
        self._metrics.ended(FinishReason.ABORT if result.aborted else FinishReason.ERROR)
        if result.aborted:  # not ours: the engine is being stopped
            raise shutting_down()
        log.error("a text of request %s failed in the engine: %s", self._request_id, result.error)
        raise engine_fault()

    def fail(self, error: ApiError) -> None:
        self._queue.put_nowait(error)

    def close(self) -> None:
        """Forget what still waits. Idempotent; every path out of a request ends here."""
        for _ in range(self._num_open):
            self._metrics.ended(FinishReason.ABORT)
        if self._num_open:
            self._engine.abort(self._request_id)
        self._num_open = 0
        self._lifecycle.leave(self)


async def _whole(session: TextSession) -> bytes:
    numbers = await session.numbers()
    # Thousands of vectors are megabytes of text: their writing must not stop the loop.
    return await asyncio.to_thread(lambda: orjson.dumps(session.work.answer(numbers), option=JSON_OPTIONS))
