"""From what a client gives to what the model reads, and from the model's numbers to what a client gets.

Shared by the offline API and the server. Knows nothing about HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.errors import InvalidParam
from engine.pooling.config import PoolingConfig
from engine.pooling.request import TextIds

SMALLEST_NORM = 1e-12  # as torch's normalize


class PairCodec(Protocol):
    """What pooling asks of a tokenizer."""

    def encode_parts(
        self, text: str, pair: str | None = None, *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]: ...


class Reader(Protocol):
    """What reading asks of an engine."""

    @property
    def config(self) -> PoolingConfig: ...
    @property
    def tokenizer(self) -> PairCodec | None: ...
    @property
    def num_types(self) -> int: ...
    def check(self, text: TextIds, param: str) -> None: ...


def read_text(
    engine: Reader,
    prompt: str | Sequence[int],
    param: str,
    *,
    pair: str | None = None,
    truncate: int | None = None,
    add_special_tokens: bool = True,
) -> TextIds:
    """One text, or a pair. Raises InvalidParam or ContextOverflow that names `param`.

    truncate: tokens to cut a longer one to, special tokens included; -1: as many as the model takes.
    """
    limit = max_tokens(engine.config, truncate)
    if not isinstance(prompt, str):
        text = TextIds(tuple(prompt) if limit is None else tuple(prompt)[:limit])
    elif engine.tokenizer is None:
        raise InvalidParam(param, "is text, but there is no tokenizer; give token ids")
    else:
        how = {"add_special_tokens": add_special_tokens, "max_tokens": limit}
        ids, types = engine.tokenizer.encode_parts(prompt, pair, **how)  # type: ignore[arg-type]
        text = TextIds(tuple(ids), tuple(types) if engine.num_types > 1 else ())
    engine.check(text, param)
    return text


def max_tokens(config: PoolingConfig, truncate: int | None) -> int | None:
    """`truncate_prompt_tokens` as a number of tokens. Raises InvalidParam."""
    if truncate is None or truncate == -1:
        return None if truncate is None else config.max_model_len
    if not 0 < truncate <= config.max_model_len:
        raise InvalidParam(
            "truncate_prompt_tokens", f"must be -1 or between 1 and {config.max_model_len}, got {truncate}"
        )
    return truncate


def embedding(
    config: PoolingConfig, values: np.ndarray, dimensions: int | None = None, normalize: bool | None = None
) -> np.ndarray:
    """float32 [dimensions]: cut, and then of length one where the model's embeddings are."""
    values = values[: dimensions or config.hidden_size]
    if not (config.normalize if normalize is None else normalize):
        return values
    return values / np.float32(max(float(np.linalg.norm(values)), SMALLEST_NORM))


@dataclass(frozen=True)
class Scoring:
    """Pairs to score, and the texts that this takes: of a cross-encoder the pairs, else each text once."""

    texts: tuple[TextIds, ...]
    pairs: tuple[tuple[int, int], ...]  # of `texts`

    def scores(self, config: PoolingConfig, values: Sequence[np.ndarray]) -> list[float]:
        """One number a pair, in order; values: the model's, one a text."""
        if config.task == "score":
            return [_score(config, values[i]) for i, _ in self.pairs]
        unit = [embedding(config, value, normalize=True) for value in values]
        return [float(unit[i] @ unit[j]) for i, j in self.pairs]


def read_pairs(
    engine: Reader,
    first: Sequence[str],
    second: Sequence[str],
    params: tuple[str, str],
    truncate: int | None = None,
) -> Scoring:
    """One text against each of the others, or texts against as many others. params: the fields' names."""
    if not first or not second:
        raise InvalidParam(params[0] if not first else params[1], "must not be empty")
    if len(first) not in (1, len(second)):
        raise InvalidParam(params[0], f"has {len(first)} texts for the {len(second)} of {params[1]}; give 1 or as many")
    count = len(second)
    if engine.config.task == "score":
        lefts = [*first] * count if len(first) == 1 else first
        texts = [
            read_text(engine, left, params[1], pair=right, truncate=truncate)
            for left, right in zip(lefts, second, strict=True)
        ]
        return Scoring(tuple(texts), tuple((i, i) for i in range(count)))
    texts = [read_text(engine, text, param, truncate=truncate)
             for param, listed in zip(params, (first, second), strict=True) for text in listed]  # fmt: skip
    return Scoring(tuple(texts), tuple((i if len(first) > 1 else 0, len(first) + i) for i in range(count)))


def _score(config: PoolingConfig, values: np.ndarray) -> float:
    logit = float(values[0])
    if config.score == "identity":
        return logit
    return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))
