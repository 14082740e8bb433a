"""`octavo batch`: a file of requests through the engine, with progress, ready to be killed."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from engine.config import EngineOptions
from server.batch import BatchError, BatchLine, ResultFile, check_input, run_batch
from server.commands.loading import running_engine
from server.commands.options import BatchOptions
from server.lifecycle import ModelHandle
from server.local import Answer, LocalServer

BUSY_WAIT_S = 0.2  # before a request is offered again to an engine whose queue is full


def run(engine_options: EngineOptions, options: BatchOptions) -> int:
    """Files are checked before the model is loaded: a typing error should not cost a minute."""
    source = Path(options.input)
    ids = check_input(source)
    results = ResultFile(Path(options.output), ids)
    if len(results.done) == len(ids):
        Meter(len(ids), len(ids), options).close()
        return 0
    with running_engine(engine_options) as engine:
        meter = Meter(len(ids), len(results.done), options)  # its clock starts when the model is loaded
        try:
            asyncio.run(answer_all(engine, source, results, options, meter))
        finally:
            meter.close()
    return 0


async def answer_all(
    engine: ModelHandle, source: Path, results: ResultFile, options: BatchOptions, meter: Meter
) -> None:
    server = LocalServer(engine, options.served_model_name)
    window = options.max_in_flight or 2 * engine.config.max_num_seqs
    try:
        await run_batch(source, results, partial(answer, server, engine, Turns()), window, meter.count)
    finally:
        await results.close()


async def answer(server: LocalServer, engine: ModelHandle, turns: Turns, line: BatchLine) -> Answer:
    """What the API answers. Raises BatchError when the engine is gone, which is not the request's fault."""
    if line.body.get("stream"):
        error = {"message": "A batch has no streams.", "type": "invalid_request_error"}
        return Answer(400, {"error": error | {"param": "stream", "code": "unsupported_parameter"}})
    post = partial(server.post, line.url, line.body)
    result = await turns.together(post)
    while result.status == 429:
        stats = engine.stats()
        if not (stats.num_running or stats.num_waiting):
            result = await turns.alone(post)  # its neighbours filled the queue; if it is full without them, so be it
            break
        await asyncio.sleep(BUSY_WAIT_S)
        result = await turns.together(post)
    if result.status == 503:
        raise BatchError(f"the engine stopped ({engine.failure}); the same command goes on from here")
    return result


class Turns:
    """Requests are served together, or one with nobody else being served."""

    def __init__(self) -> None:
        self._door, self._empty = asyncio.Lock(), asyncio.Event()
        self._inside = 0
        self._empty.set()

    async def together(self, serve: Callable[[], Awaitable[Answer]]) -> Answer:
        async with self._door:
            self._inside += 1
            self._empty.clear()
        try:
            return await serve()
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def alone(self, serve: Callable[[], Awaitable[Answer]]) -> Answer:
        async with self._door:
            await self._empty.wait()
            return await serve()


class Meter:
    """The progress bar (with time left and tokens a second) and the line that sums up."""

    def __init__(self, num_requests: int, num_done: int, options: BatchOptions) -> None:
        self._bar = tqdm(
            total=num_requests, initial=num_done, unit="req", disable=not options.progress, dynamic_ncols=True
        )
        self._output = options.output
        self._done, self._refused, self._tokens = num_done, 0, 0
        self._start_s = time.monotonic()

    def count(self, result: Answer) -> None:
        self._done += 1
        self._refused += result.error is not None
        self._tokens += result.num_output_tokens
        self._bar.set_postfix_str(f"{self._tokens / (time.monotonic() - self._start_s):.0f} tok/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
        errors = f", {self._refused} of this run with an error" if self._refused else ""
        more = "; the same command goes on from here" if self._done < self._bar.total else ""
        print(f"octavo: {self._done} of {self._bar.total} results in {self._output}{errors}{more}", file=sys.stderr)
