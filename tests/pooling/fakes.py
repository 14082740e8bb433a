"""A device whose every vector can be worked out by hand: a text's numbers are its tokens' sum and its length."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.pooling.config import Matryoshka, PoolingConfig
from engine.pooling.request import Pooled, PoolingRequest, TextIds
from engine.pooling.waiting import Batch
from pallas_kernels.target import CPU

VOCAB, HIDDEN = 256, 4
BAD = 99  # a text that begins with this token has a vector that is not finite

CONFIG = PoolingConfig(
    task="embed", dtype="float32", pooling="mean", normalize=False, matryoshka=Matryoshka(), score="identity",
    hidden_size=HIDDEN, max_model_len=48, max_num_seqs=64, max_num_batched_tokens=128,
    length_buckets=(8, 16, 32, 48), token_buckets=(32, 128), quantization=None, target=CPU, overlap=False,
    max_queued_requests=64,
)  # fmt: skip


def config(**changes: Any) -> PoolingConfig:
    return dataclasses.replace(CONFIG, **changes)


def vector_of(text: TextIds) -> list[float]:
    value = float("nan") if text.token_ids[0] == BAD else float(sum(text.token_ids))
    return [value, float(len(text.token_ids)), 1.0, -1.0]


@dataclass
class FakePending:
    batch: Batch
    fails: bool = False

    def result(self) -> np.ndarray:
        if self.fails:
            raise RuntimeError("the device is gone")
        return np.asarray([vector_of(item.text) for item in self.batch.items], np.float32)


@dataclass
class FakeRunner:
    """`fail_launch` and `fail_result` hold the numbers of steps that throw. `gate.clear()` stops time."""

    fail_launch: set[int] = field(default_factory=set)
    fail_result: set[int] = field(default_factory=set)
    batches: list[Batch] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def launch(self, batch: Batch) -> FakePending:
        self.gate.wait(20)
        number = len(self.batches)
        self.batches.append(batch)
        if number in self.fail_launch:
            raise RuntimeError("launch failed")
        return FakePending(batch, number in self.fail_result)


@dataclass
class Client:
    """A sink that keeps what came, and refuses a second ending of a text."""

    request: PoolingRequest
    found: dict[int, Pooled] = field(default_factory=dict)

    def __call__(self, results: list[Pooled]) -> None:
        for result in results:
            assert result.request_id == self.request.request_id and result.index not in self.found
            self.found[result.index] = result

    @property
    def done(self) -> bool:
        return len(self.found) == len(self.request.texts)

    def check(self) -> None:
        """Every text has the numbers that are its own."""
        for index, text in enumerate(self.request.texts):
            values = self.found[index].values
            assert values is not None and values.tolist() == vector_of(text)


def request(name: str, *lengths: int, first: int = 1) -> PoolingRequest:
    texts = tuple(TextIds((first, *range(2, length + 1))) for length in lengths)
    return PoolingRequest(request_id=name, texts=texts)
