"""The pooling engine: texts in, vectors out, in batches over all requests. Knows nothing about HTTP.

Sinks are called from the engine's thread and must not block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.errors import ContextOverflow, InvalidParam, QueueFull
from engine.outbox import INTERNAL_ERROR
from engine.pooling.config import PoolingConfig, Task
from engine.pooling.request import Pooled, PoolingRequest, TextIds
from engine.pooling.waiting import Batch, Waiting, WaitingTexts
from engine.stats import Counters, EngineStats
from engine.text import Tokenizer
from engine.thread import EngineThread

log = logging.getLogger("octavo.engine")
PoolingSink = Callable[[list[Pooled]], None]


class PendingBatch(Protocol):
    """A launched step."""

    @property
    def batch(self) -> Batch: ...

    def result(self) -> np.ndarray:
        """float32 [texts, numbers]; waits for the device."""
        ...


class BatchRunner(Protocol):
    """What the engine asks of a device."""

    def launch(self, batch: Batch) -> PendingBatch: ...


@dataclass
class Live:
    """An admitted request and how many of its texts have no ending yet."""

    sink: PoolingSink
    open: set[int]


class PoolingEngine(EngineThread):
    """Thread-safe front of one model: `submit`, `abort`, `stats`, `drain`, `stop`."""

    def __init__(
        self,
        config: PoolingConfig,
        runner: BatchRunner,
        *,
        vocab_size: int,
        num_types: int = 1,
        tokenizer: Tokenizer | None = None,
        model_name: str = "",
        counters: Counters | None = None,
    ) -> None:
        super().__init__(config.overlap)
        self.config = config
        self.runner = runner
        self.vocab_size = vocab_size
        self.num_types = num_types
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.counters = counters or Counters()
        self.waiting = WaitingTexts(config)
        self._live: dict[str, Live] = {}
        self._pending: PendingBatch | None = None

    @property
    def task(self) -> Task:
        return self.config.task

    # -- called from any thread ---------------------------------------------------------------

    def submit(self, request: PoolingRequest, sink: PoolingSink) -> None:
        """Queue a request's texts. Raises InvalidParam, ContextOverflow, QueueFull or EngineStopped, keeping nothing.

        The bound is on texts that wait already: a request that finds the queue below it is taken whole.
        """
        if not request.texts:
            raise InvalidParam("input", "must not be empty")
        for text in request.texts:
            self.check(text)
        with self._lock:
            self._check_open()
            queued = len(self.waiting) + self._num_submitted
            if queued >= self.config.max_queued_requests:
                raise QueueFull(f"{queued} texts are waiting", retry_after_s=1.0)
            self._num_submitted += len(request.texts)
            self._inbox.put(lambda: self._add(request, sink))

    def check(self, text: TextIds, param: str = "input") -> None:
        """Raises InvalidParam or ContextOverflow, naming `param`, for what the model cannot take."""
        ids, limit = text.token_ids, self.config.max_model_len
        if not ids:
            raise InvalidParam(param, "must not be empty")
        if len(ids) > limit:
            raise ContextOverflow(param, f"has {len(ids)} tokens; this model takes {limit} (truncate_prompt_tokens "
                                  "cuts a text)")  # fmt: skip
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise InvalidParam(param, f"token ids must be between 0 and {self.vocab_size - 1}")
        if text.type_ids and (len(text.type_ids) != len(ids) or max(text.type_ids) >= self.num_types):
            raise InvalidParam(param, f"needs a type below {self.num_types} for each token")

    def abort(self, request_id: str) -> None:
        """End a request wherever it is. Unknown and finished ids are fine."""
        self._inbox.put(lambda: self._abort(request_id))

    def stats(self) -> EngineStats:
        pending = self._pending
        running = len(pending.batch.items) if pending is not None else 0
        waiting = len(self.waiting) + self._num_submitted
        age = time.monotonic() - self._last_step_s if running or waiting else 0.0
        return EngineStats(
            num_running=running, num_waiting=waiting, kv_usage=0.0, last_step_age_s=age, **self.counters.snapshot()
        )

    def has_work(self) -> bool:
        return bool(self._live)

    # -- the loop -----------------------------------------------------------------------------

    def run_once(self) -> bool:
        batch = self.waiting.take()
        if batch is None:
            return False
        self._commit(self._launch(batch))
        return True

    def run_once_overlapped(self) -> bool:
        batch = self.waiting.take()
        launched = self._launch(batch) if batch is not None else None
        previous, self._pending = self._pending, launched
        if previous is not None:
            self._commit(previous)
        return launched is not None or previous is not None

    def _launch(self, batch: Batch) -> PendingBatch:
        try:
            return self.runner.launch(batch)
        except Exception:
            self._end(batch.items, INTERNAL_ERROR)  # they are in no queue and in no step any more
            raise

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._commit(pending)

    def _commit(self, pending: PendingBatch) -> None:
        try:
            values = pending.result()
        except Exception:
            self._end(pending.batch.items, INTERNAL_ERROR)
            raise
        self._last_step_s = time.monotonic()
        self.counters.texts += len(pending.batch.items)
        self.counters.prompt_tokens += pending.batch.num_tokens
        self._deliver(
            Pooled(item.request_id, item.index, row)
            if np.isfinite(row).all()
            else Pooled(item.request_id, item.index, error=INTERNAL_ERROR)
            for item, row in zip(pending.batch.items, values, strict=True)
        )

    def _recover(self) -> None:
        """Programs keep nothing on the device between steps, so there is nothing to make good there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._end(pending.batch.items, INTERNAL_ERROR)

    def _end(self, items: Iterable[Waiting], error: str) -> None:
        self._deliver(Pooled(item.request_id, item.index, error=error) for item in items)

    def _abort_all(self) -> None:
        for request_id in list(self._live):
            self._abort(request_id)

    def _fail_all(self) -> None:
        self._deliver(
            Pooled(request_id, index, error=INTERNAL_ERROR)
            for request_id, live in list(self._live.items())
            for index in sorted(live.open)
        )

    # -- requests in, vectors out -------------------------------------------------------------

    def _add(self, request: PoolingRequest, sink: PoolingSink) -> None:
        count, request_id = len(request.texts), request.request_id
        try:
            if self.failure is not None or request_id in self._live:
                error = self.failure or f"request_id {request_id} is in use"
                sink([Pooled(request_id, index, error=error) for index in range(count)])
                return
            self._live[request_id] = Live(sink, set(range(count)))
            for index, text in enumerate(request.texts):
                self.waiting.add(request_id, index, text)
        finally:
            with self._lock:
                self._num_submitted -= count

    def _abort(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None:
            self.waiting.remove(request_id)
            self._deliver([Pooled(request_id, index, aborted=True) for index in sorted(live.open)])

    def _deliver(self, results: Iterable[Pooled]) -> None:
        """One sink call a request. A sink that raises ends its request: nobody listens."""
        by_request: dict[str, list[Pooled]] = {}
        for result in results:
            live = self._live.get(result.request_id)
            if live is not None and result.index in live.open:
                live.open.discard(result.index)
                by_request.setdefault(result.request_id, []).append(result)
        for request_id, mine in by_request.items():
            live = self._live[request_id]
            try:
                live.sink(mine)
            except Exception:  # a client's sink must not reach the neighbours
                log.exception("the sink of request %s failed", request_id)
                self.waiting.remove(request_id)
                live.open.clear()
            if not live.open:
                del self._live[request_id]
