"""What is asked of a pooling model and what comes back. Knows nothing about HTTP or devices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TextIds:
    """One text, or two of a pair, as the model reads it. types: the segment of each token; empty: all 0."""

    token_ids: tuple[int, ...]
    type_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingRequest:
    """Texts whose results go to one sink."""

    request_id: str
    texts: tuple[TextIds, ...]


@dataclass(frozen=True, slots=True)
class Pooled:
    """The result of one text: a vector as the model's pooling gives it, or why there is none.

    values: float32 [hidden_size], not normalized; of a model that scores, float32 [1].
    """

    request_id: str
    index: int  # of the text in its request
    values: np.ndarray | None = None
    error: str | None = None
    aborted: bool = False
