"""The texts that wait for a step, first come, first served. Used by the engine's thread alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from engine.pooling.batch import BatchKey, choose, length_bucket
from engine.pooling.config import PoolingConfig
from engine.pooling.request import TextIds


@dataclass(frozen=True, slots=True)
class Waiting:
    """One text in the queue."""

    number: int  # of its arrival
    request_id: str
    index: int  # in its request
    text: TextIds

    @property
    def num_tokens(self) -> int:
        return len(self.text.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes: a program, and the texts of its rows."""

    key: BatchKey
    items: tuple[Waiting, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)


class WaitingTexts:
    """A queue a length bucket. The text that has waited longest is in the next step, whatever its length."""

    def __init__(self, config: PoolingConfig) -> None:
        self._config = config
        self._queues: dict[int, deque[Waiting]] = {length: deque() for length in config.length_buckets}
        self._num_added = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, request_id: str, index: int, text: TextIds) -> None:
        item = Waiting(self._num_added, request_id, index, text)
        self._num_added += 1
        self._queues[length_bucket(self._config, item.num_tokens)].append(item)

    def remove(self, request_id: str) -> None:
        """Forget every text of a request."""
        for length, items in self._queues.items():
            self._queues[length] = deque(item for item in items if item.request_id != request_id)

    def take(self) -> Batch | None:
        """The next step: texts of the bucket whose first is the oldest; shorter ones ride where room is left."""
        heads = [(items[0].number, length) for length, items in self._queues.items() if items]
        if not heads:
            return None
        length = min(heads)[1]
        offered = list(self._offered(length))
        key, count = choose(self._config, length, [item.num_tokens for item in offered])
        taken = tuple(offered[:count])
        for item in taken:
            self._queues[length_bucket(self._config, item.num_tokens)].popleft()
        return Batch(key, taken)

    def _offered(self, length: int) -> Iterator[Waiting]:
        """The bucket's texts, then those of shorter ones, as many as the largest step could take."""
        room = max(self._config.token_buckets[-1], length)
        for bucket in sorted((b for b in self._queues if b <= length), reverse=True):
            for item in self._queues[bucket]:
                room -= item.num_tokens
                if room < 0:
                    return
                yield item
