"""A thread that alone drives a device: what it is asked goes through its inbox, between steps.

What a step is, and what becomes of those who wait when it fails, is a subclass's business.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Self

from engine.errors import EngineStopped

log = logging.getLogger("octavo.engine")


class EngineThread(ABC):
    """Inbox -> steps, one after the other, until `stop`. Every admitted request gets one ending."""

    def __init__(self, overlap: bool) -> None:
        self.failure: str | None = None  # why the thread died
        self._overlap = overlap
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._draining = self._stopping = False
        self._last_step_s = time.monotonic()
        self._lock = threading.Lock()
        self._num_submitted = 0  # units of work in the inbox that no step could see yet
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)

    # -- what a subclass says -----------------------------------------------------------------

    @abstractmethod
    def run_once(self) -> bool:
        """One step, start to end. False when there is nothing to do."""

    @abstractmethod
    def run_once_overlapped(self) -> bool:
        """Launch a step, then read the one before it: the device never waits for the host's reading."""

    @abstractmethod
    def has_work(self) -> bool:
        """Whether anybody still waits for an ending."""

    @abstractmethod
    def _settle(self) -> None:
        """Read the step in flight, if there is one."""

    @abstractmethod
    def _recover(self) -> None:
        """After a step that failed: end what was in it with an error, and make the device usable again."""

    @abstractmethod
    def _abort_all(self) -> None:
        """End everything that is left; the engine is being stopped."""

    @abstractmethod
    def _fail_all(self) -> None:
        """End everything that is left with an error; the thread is dying."""

    # -- called from any thread ---------------------------------------------------------------

    def start(self) -> Self:
        """Start the thread. It is stopped before the interpreter tears JAX down, should nobody call `stop`."""
        atexit.register(self.stop)
        self._thread.start()
        return self

    def call(self, function: Callable[[], Any]) -> Any:
        """Run `function` on the engine's thread between steps, with none in flight; returns its result."""
        done: Future[Any] = Future()

        def run() -> None:
            try:
                if self.failure is not None:
                    raise EngineStopped(self.failure)
                self._guarded(self._settle)
                done.set_result(function())
            except Exception as error:  # noqa: BLE001 - handed to the caller, whose function it is
                done.set_exception(error)

        with self._lock:
            self._check_open()
            self._inbox.put(run)
        return done.result()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; True when none is left."""
        with self._lock:
            self._draining = True
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.failure is None:
            if not (self.has_work() or self._num_submitted):
                return True
            time.sleep(0.01)
        return not self.has_work()

    def stop(self) -> None:
        """End what is left with ABORT and join the thread."""
        atexit.unregister(self.stop)
        with self._lock:
            self._draining = self._stopping = True
        self._inbox.put(lambda: None)  # wakes the thread
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=30)

    def _check_open(self) -> None:
        if self._draining or self.failure is not None:
            raise EngineStopped(self.failure or "the engine is shutting down")

    # -- the loop -----------------------------------------------------------------------------

    def _run(self) -> None:
        step = self.run_once_overlapped if self._overlap else self.run_once
        try:
            while not self._stopping:
                worked = self._guarded(step)
                self.read_inbox(block=not worked)
            self.read_inbox(block=False)
            self._guarded(self._settle)
            self._abort_all()
        except BaseException as error:  # the thread's end: say why, leave no client waiting
            log.exception("the engine's thread died")
            with self._lock:
                self.failure = type(error).__name__
            self._fail_all()
            self.read_inbox(block=False)

    def _guarded(self, step: Callable[[], bool | None]) -> bool:
        """A step that fails ends the requests that were in it, not the engine."""
        try:
            return bool(step())
        except Exception:  # whatever a device or a bug throws; a second failure here ends the thread
            log.exception("a step failed; running requests end with an error")
            self._recover()
            return True

    def read_inbox(self, block: bool) -> None:
        """Do what was asked; with `block` there is nothing else to do, and it waits for something."""
        if block and self._inbox.empty():
            self._last_step_s = time.monotonic()
        while block or not self._inbox.empty():
            self._inbox.get()()
            block = False
