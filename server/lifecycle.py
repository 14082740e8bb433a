"""Where the server is between start and exit: loading, serving, draining or failed.

Knows what it needs of an engine (`EngineHandle`), and nothing about HTTP or signals.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from engine.pooling.texts import PairCodec
from engine.request import Request, TextDelta
from server.errors import ApiError, engine_fault, not_ready, shutting_down, wrong_task

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.pooling.config import PoolingConfig
    from engine.pooling.request import Pooled, PoolingRequest, TextIds
    from engine.stats import EngineStats

Sink = Callable[[list[TextDelta]], None]
PoolingSink = Callable[["list[Pooled]"], None]
Report = Callable[[str, int, int], None]  # phase, how much of it is done, of how much


class TextCodec(Protocol):
    """What the server asks of a tokenizer. All of it may be called from any thread."""

    @property
    def special_tokens(self) -> Mapping[str, str]: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> Sequence[int]: ...
    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def token_str(self, token_id: int) -> str: ...
    def single_tokens(self, word: str) -> tuple[int, ...]: ...
    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str: ...


class TextAndPairCodec(TextCodec, PairCodec, Protocol):
    """Besides, what pooling asks."""


class ServedConfig(Protocol):
    """What every engine's configuration says."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...


class ModelHandle(Protocol):
    """What the server asks of any engine. All of it may be called from any thread."""

    @property
    def config(self) -> ServedConfig: ...
    @property
    def task(self) -> str:
        """ "generate", "embed" or "score"."""
        ...

    @property
    def tokenizer(self) -> TextCodec | None: ...
    @property
    def model_name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def failure(self) -> str | None:
        """Why the loop thread died; None while it lives and after `stop`."""
        ...

    def abort(self, request_id: str) -> None: ...
    def stats(self) -> EngineStats: ...
    def stop(self) -> None: ...


class EngineHandle(ModelHandle, Protocol):
    """Of an engine that generates."""

    @property
    def config(self) -> EngineConfig: ...
    @property
    def end_token_ids(self) -> tuple[int, ...]: ...
    def submit(self, request: Request, sink: Sink) -> None: ...
    def reshard(self, sharding: str) -> None: ...


class PoolingHandle(ModelHandle, Protocol):
    """Of an engine that embeds or scores."""

    @property
    def config(self) -> PoolingConfig: ...
    @property
    def tokenizer(self) -> TextAndPairCodec | None: ...
    @property
    def num_types(self) -> int: ...
    def check(self, text: TextIds, param: str = "input") -> None: ...
    def submit(self, request: PoolingRequest, sink: PoolingSink) -> None: ...


class Failable(Protocol):
    """A piece of running work that can be told to end with an error."""

    def fail(self, error: ApiError) -> None: ...


class Lifecycle:
    """Shared by the routes (event loop) and the launch thread, which calls `report` and `ready`."""

    def __init__(self) -> None:
        self.phase = "starting"
        self.done, self.of = 0, 1  # how much of the phase
        self.phases_s: dict[str, float] = {}  # how long each phase took
        self.engine: ModelHandle | None = None
        self.failure: BaseException | None = None
        self.draining = False
        self.started_s = time.monotonic()
        self.ready_s: float | None = None  # seconds that start-up took
        self._phase_from_s = self.started_s
        self._open: set[Failable] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def report(self, phase: str, done: int, of: int) -> None:
        now_s = time.monotonic()
        if phase != self.phase:
            self.phases_s[self.phase] = round(now_s - self._phase_from_s, 3)
            self._phase_from_s = now_s
        self.phase, self.done, self.of = phase, done, of

    @property
    def progress(self) -> float:
        """0 to 1, of the phase."""
        return self.done / max(self.of, 1)

    def ready(self, engine: ModelHandle) -> None:
        self.ready_s = time.monotonic() - self.started_s
        self.engine = engine  # before the word is out: who reads it sends a request
        self.report("ready", 1, 1)

    def fail(self, error: BaseException) -> None:
        self.failure = error

    @property
    def status(self) -> str:
        if self.failure is not None:
            return "failed"
        return "draining" if self.draining else self.phase

    @property
    def alive(self) -> bool:
        """The engine is there and its loop runs (or finishes what it has)."""
        return self.engine is not None and self.engine.failure is None and self.failure is None

    def serving(self) -> ModelHandle:
        """The engine, if new work is welcome. Raises `ApiError` 503 otherwise."""
        if self.draining:
            raise shutting_down()
        if self.engine is None:
            raise not_ready(f"The server is not ready: {self.phase}, {self.progress:.0%}.")
        if not self.alive:
            raise ApiError(503, "The engine has stopped.", code="engine_stopped", retry_after_s=1.0)
        return self.engine

    def generating(self) -> EngineHandle:
        """The engine, if it generates and new work is welcome. Raises `ApiError`."""
        engine = self.serving()
        if engine.task != "generate":
            raise wrong_task(engine.model_name, engine.task)
        return cast("EngineHandle", engine)

    def pooling(self, *tasks: str) -> PoolingHandle:
        """The engine, if its task is one of `tasks` and new work is welcome. Raises `ApiError`."""
        engine = self.serving()
        if engine.task not in tasks:
            raise wrong_task(engine.model_name, engine.task)
        return cast("PoolingHandle", engine)

    def enter(self, work: Failable) -> None:
        self._open.add(work)
        self._idle.clear()

    def leave(self, work: Failable) -> None:
        self._open.discard(work)
        if not self._open:
            self._idle.set()

    async def idle(self, timeout_s: float) -> bool:
        """Wait until no work is open. False when the time was not enough."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def fail_open(self) -> None:
        """End what is still open with an error that its client sees."""
        error = shutting_down() if self.alive else engine_fault()
        for work in list(self._open):
            work.fail(error)
