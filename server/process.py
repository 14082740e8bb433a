"""One server process from bind to exit code: listen first, load in a thread, drain on SIGTERM.

Exit codes: 0 after a signal, 1 when start-up failed or the engine died. Does not know what it
launches: `run.py` says that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn
import uvloop
from starlette.types import ASGIApp

from engine.errors import OctavoError
from server.app import build_app
from server.config import ServerOptions
from server.lifecycle import Lifecycle, ModelHandle, Report
from server.limits import bounded_protocol
from server.metrics import Metrics

log = logging.getLogger("octavo.server")

Launch = Callable[[Report], ModelHandle]

TICK_S = 0.05  # how often the engine's pulse and the event loop's lag are taken
LAST_WORDS_S = 2.0  # for error events to reach their clients before connections are closed


def bind(options: ServerOptions) -> socket.socket:
    """A listening address, taken before a model is loaded. Raises `OctavoError` with the cause."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((options.host, options.port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        where = f"{options.host}:{options.port}"
        if error.errno == errno.EADDRINUSE:
            raise OctavoError(f"{where} is in use; choose another port or stop the program that has it") from None
        raise OctavoError(f"cannot listen on {where}: {error.strerror or error}") from None
    sock.setblocking(False)
    return sock


def say(text: str) -> None:
    print(f"octavo: {text}", file=sys.stderr, flush=True)


def run(launch: Launch, options: ServerOptions) -> int:
    """Serve until a signal or a failure. Returns the exit code of the process."""
    try:
        sock = bind(options)
    except OctavoError as error:
        say(f"error: {error}")
        return 1
    with contextlib.closing(sock):
        return asyncio.run(_Process(launch, options).main(sock), loop_factory=uvloop.new_event_loop)


def _uvicorn_config(app: ASGIApp, options: ServerOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=bounded_protocol(options),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=round(options.keep_alive_s),
        timeout_graceful_shutdown=round(LAST_WORDS_S),
    )


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are ours: uvicorn would stop listening before the drain is over


class _Process:
    def __init__(self, launch: Launch, options: ServerOptions) -> None:
        self._launch = launch
        self._options = options
        self._lifecycle = Lifecycle()
        self._metrics = Metrics(self._lifecycle, options.served_model_name)
        self._wake = asyncio.Event()  # a signal came
        self._num_signals = 0

    async def main(self, sock: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        server = _Uvicorn(_uvicorn_config(build_app(self._lifecycle, self._metrics, self._options), self._options))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        launching = threading.Thread(target=self._start_engine, name="octavo-launch", daemon=True)
        launching.start()
        host, port = sock.getsockname()[:2]
        say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}, loading the model")
        code = await self._until_end()
        is_stopped = await self._close()
        server.should_exit = True
        await serving
        if launching.is_alive() or not is_stopped:
            leave(code)
        return code

    def _signalled(self) -> None:
        self._num_signals += 1
        self._lifecycle.draining = True
        self._wake.set()

    def _start_engine(self) -> None:
        """In a thread of its own: loading and compiling take seconds to minutes."""
        try:
            engine = self._launch(self._lifecycle.report)
        except OctavoError as error:
            self._lifecycle.fail(error)
        except Exception as error:
            log.error("start-up failed", exc_info=error)
            self._lifecycle.fail(error)
        else:
            self._lifecycle.ready(engine)
            say(f"ready: {engine.model_name} after {self._lifecycle.ready_s:.1f} s")

    async def _until_end(self) -> int:
        """Take the engine's pulse until a signal or a failure; then let clients finish."""
        while not self._num_signals:
            due_s = time.monotonic() + TICK_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK_S)
            self._metrics.lagged(max(0.0, time.monotonic() - due_s))
            failure = self._failure()
            if failure is not None:
                say(f"error: {failure}")
                return 1
        return await self._drain()

    def _failure(self) -> str | None:
        state = self._lifecycle
        if state.failure is not None:
            known = isinstance(state.failure, OctavoError)
            return str(state.failure) if known else f"start-up failed: {type(state.failure).__name__}"
        if state.engine is not None and state.engine.failure is not None:
            return f"the engine died: {state.engine.failure}"
        return None

    async def _drain(self) -> int:
        """Running requests may finish; new ones are already refused. A second signal cuts this short."""
        say("shutting down: running requests may finish")
        deadline_s = time.monotonic() + self._options.shutdown_timeout_s
        while self._num_signals < 2 and time.monotonic() < deadline_s:
            if await self._lifecycle.idle(min(TICK_S, self._options.shutdown_timeout_s)):
                return 0
            failure = self._failure()
            if failure is not None:
                say(f"error: {failure}")
                return 1
        return 0

    async def _close(self) -> bool:
        """Last words to the clients that are still there, then the engine. False if that hangs."""
        self._lifecycle.draining = True
        self._lifecycle.fail_open()
        await self._lifecycle.idle(LAST_WORDS_S)
        engine = self._lifecycle.engine
        if engine is None:
            return True
        stopping = threading.Thread(target=engine.stop, name="octavo-stop", daemon=True)
        stopping.start()
        await asyncio.to_thread(stopping.join, LAST_WORDS_S)
        return not stopping.is_alive()


def leave(code: int) -> None:
    """End the process now: a thread is inside the compiler or a device call, and nothing can stop it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
