"""Texts through a pooling engine of this process, waited for: what `LLM.embed` and `LLM.score` are made of."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import InvalidParam, OctavoError, QueueFull
from engine.pooling.engine import PoolingEngine
from engine.pooling.request import Pooled, PoolingRequest, TextIds
from engine.pooling.texts import embedding, read_pairs, read_text

TEXTS_A_REQUEST = 256  # what is submitted at once: enough for any batch, little enough to wait for a full queue

_numbers = itertools.count()


@dataclass
class EmbeddingOutput:
    """float32 [dimensions]."""

    embedding: np.ndarray


@dataclass
class EmbeddingRequestOutput:
    """One text with its embedding."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput


@dataclass
class ScoringOutput:
    score: float


@dataclass
class ScoringRequestOutput:
    """One pair with its score: a cross-encoder's, or the cosine of two embeddings."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: ScoringOutput


def embed_texts(
    engine: PoolingEngine,
    prompts: Sequence[str | Sequence[int]],
    dimensions: int | None,
    normalize: bool | None,
    truncate: int | None,
) -> list[EmbeddingRequestOutput]:
    """In order. Raises InvalidParam or ContextOverflow before anything is computed."""
    if engine.task != "embed":
        raise InvalidParam("model", f"{engine.model_name} scores pairs and has no embeddings: see LLM.score")
    engine.config.check_dimensions(dimensions)
    texts = [read_text(engine, prompt, f"prompts[{i}]", truncate=truncate) for i, prompt in enumerate(prompts)]
    name = next(_numbers)
    return [
        EmbeddingRequestOutput(
            f"embed-{name}-{i}",
            list(text.token_ids),
            EmbeddingOutput(embedding(engine.config, values, dimensions, normalize)),
        )
        for i, (text, values) in enumerate(zip(texts, run(engine, texts), strict=True))
    ]


def score_pairs(
    engine: PoolingEngine, first: Sequence[str], second: Sequence[str], truncate: int | None
) -> list[ScoringRequestOutput]:
    """In order: one text against each of `second`, or as many against as many."""
    scoring = read_pairs(engine, first, second, ("text_1", "text_2"), truncate)
    scores = scoring.scores(engine.config, run(engine, scoring.texts))
    name = next(_numbers)
    return [
        ScoringRequestOutput(
            f"score-{name}-{i}",
            [token for j in dict.fromkeys(pair) for token in scoring.texts[j].token_ids],
            ScoringOutput(score),
        )
        for i, (pair, score) in enumerate(zip(scoring.pairs, scores, strict=True))
    ]


def run(engine: PoolingEngine, texts: Sequence[TextIds]) -> list[np.ndarray]:
    """The model's numbers for each text. Submits as fast as the queue takes them. Raises OctavoError."""
    found: dict[int, np.ndarray] = {}
    inbox: queue.SimpleQueue[tuple[int, list[Pooled]]] = queue.SimpleQueue()
    submitted: list[str] = []
    num_submitted = 0
    try:
        for start in range(0, len(texts), TEXTS_A_REQUEST):
            request = PoolingRequest(
                request_id=f"offline-{next(_numbers)}", texts=tuple(texts[start : start + TEXTS_A_REQUEST])
            )
            while not _submit(engine, request, inbox, start, len(found) < num_submitted):
                _absorb(found, *inbox.get())
            submitted.append(request.request_id)
            num_submitted += len(request.texts)
        while len(found) < len(texts):
            _absorb(found, *inbox.get())
    except BaseException:
        for request_id in submitted:
            engine.abort(request_id)
        raise
    return [found[i] for i in range(len(texts))]


def _submit(
    engine: PoolingEngine,
    request: PoolingRequest,
    inbox: queue.SimpleQueue[tuple[int, list[Pooled]]],
    start: int,
    waits: bool,
) -> bool:
    """False when the queue is full and some of our own texts must end first."""
    try:
        engine.submit(request, lambda results: inbox.put((start, results)))
    except QueueFull:
        if not waits:
            raise
        return False
    return True


def _absorb(found: dict[int, np.ndarray], start: int, results: list[Pooled]) -> None:
    for result in results:
        if result.values is None:
            raise OctavoError(f"text {start + result.index}: {result.error or 'the engine was stopped'}")
        found[start + result.index] = result.values
