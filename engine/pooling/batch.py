"""Which texts share a step, and the step as one int32 vector.

Texts whose lengths fall into one bucket stand one after the other on a flat token axis, so that
padding is what is left of the token bucket; only attention works on rows of the bucket's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.batch import Field, Layout
from engine.model.encoder_config import EncoderConfig
from engine.pooling.config import PoolingConfig
from engine.pooling.request import TextIds


@dataclass(frozen=True, order=True)
class BatchKey:
    """Names one program: the longest text that it takes, its tokens and its rows."""

    length: int
    tokens: int
    rows: int

    @property
    def name(self) -> str:
        return f"pool_{self.length}_{self.tokens}"


def lattice(config: PoolingConfig) -> list[BatchKey]:
    """Every program that serving can need: the closed set."""
    return [batch_key(config, length, tokens) for length in config.length_buckets for tokens in sizes(config, length)]


def sizes(config: PoolingConfig, length: int) -> list[int]:
    """The token buckets of texts in a length bucket: room for one, and what is larger of the common ones."""
    larger = [tokens for tokens in config.token_buckets if tokens > length]
    smallest = config.token_buckets[0]
    return [length, *larger] if length >= smallest else larger


def batch_key(config: PoolingConfig, length: int, tokens: int) -> BatchKey:
    """As many rows as texts of this bucket can fill `tokens`: each is longer than the bucket below."""
    below = max((smaller for smaller in config.length_buckets if smaller < length), default=length // 2)
    return BatchKey(length, tokens, max(1, min(tokens // (below + 1), config.max_num_seqs)))


def length_bucket(config: PoolingConfig, num_tokens: int) -> int:
    return next(length for length in config.length_buckets if length >= num_tokens)


def choose(config: PoolingConfig, length: int, counts: Sequence[int]) -> tuple[BatchKey, int]:
    """The program for waiting texts of one bucket, and how many of the first of them it takes.

    counts: tokens of each text, in order. The smallest program that holds all; but where it would
    be more than a quarter empty, a smaller, fuller one, and the rest has its own step.
    """
    best: tuple[BatchKey, int] | None = None
    for tokens in sizes(config, length):
        key = batch_key(config, length, tokens)
        taken, used = 0, 0
        for count in counts[: key.rows]:
            if used + count > tokens:
                break
            taken, used = taken + 1, used + count
        if taken and (best is None or 4 * used > 3 * tokens):
            best = key, taken
        if taken == len(counts):
            break
    if best is None:
        raise ValueError(f"no program for a text of {counts[0]} tokens in bucket {length}")
    return best


def batch_layout(key: BatchKey) -> Layout:
    """Fields of a step's vector. Idle tokens belong to no row (-1), idle rows have length 0."""
    return Layout(
        (
            Field("tokens", (key.tokens,), "int32"),
            Field("types", (key.tokens,), "int32"),
            Field("positions", (key.tokens,), "int32"),
            Field("row", (key.tokens,), "int32", -1),
            Field("start", (key.rows,), "int32"),
            Field("length", (key.rows,), "int32"),
        )
    )


def build(key: BatchKey, layout: Layout, padding_id: int | None, texts: Sequence[TextIds]) -> np.ndarray:
    """The texts as the vector that program `key` takes; padding_id: see `EncoderConfig`."""
    vector, fields = layout.pack()
    start = 0
    for i, text in enumerate(texts):
        end = start + len(text.token_ids)
        fields["tokens"][start:end] = text.token_ids
        if text.type_ids:
            fields["types"][start:end] = text.type_ids
        fields["positions"][start:end] = positions(fields["tokens"][start:end], padding_id)
        fields["row"][start:end] = i
        fields["start"][i], fields["length"][i] = start, end - start
        start = end
    return vector


def positions(tokens: np.ndarray, padding_id: int | None) -> np.ndarray:
    """The row of the table of positions for each token of one text."""
    if padding_id is None:
        return np.arange(len(tokens), dtype=np.int32)
    counted = tokens != padding_id
    return np.cumsum(counted, dtype=np.int32) * counted + padding_id


def padding_id_of(model: object) -> int | None:
    return model.padding_id if isinstance(model, EncoderConfig) else None
