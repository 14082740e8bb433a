"""A file of requests in, a file of results out: OpenAI's batch format, resumable at any byte.

Knows files and order only; how a request is answered is a function passed in. A result is on
disk (fsync) before it counts, so a killed run that is started again loses and repeats nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from engine.errors import OctavoError
from server.local import Answer

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MAX_LINE_BYTES = 64 * 2**20


class BatchError(OctavoError):
    """An input or output file that cannot be worked with; the message names file and line."""


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of the input file."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_lines(path: Path) -> Iterator[BatchLine]:
    """The requests in order, blank lines skipped. Raises BatchError at the first that is none."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise BatchError(f"{path}: {error.strerror}") from error
    with file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield _parse(raw, f"{path} line {number}")


def _parse(raw: bytes, place: str) -> BatchLine:
    if len(raw) > MAX_LINE_BYTES:
        raise BatchError(f"{place}: longer than {MAX_LINE_BYTES} bytes")
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BatchError(f"{place}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise BatchError(f"{place}: must be a JSON object")
    for name in data:
        if name not in ("custom_id", "method", "url", "body"):
            raise BatchError(f"{place}: unknown field {name!r}")
    custom_id, url, body = data.get("custom_id"), data.get("url"), data.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise BatchError(f"{place}: custom_id must be a text")
    if data.get("method") != "POST":
        raise BatchError(f"{place}: method must be POST, got {data.get('method')!r}")
    if url not in URLS:
        raise BatchError(f"{place}: url must be one of {', '.join(URLS)}, got {url!r}")
    if not isinstance(body, dict):
        raise BatchError(f"{place}: body must be a JSON object")
    return BatchLine(custom_id, url, body)


def check_input(path: Path) -> set[str]:
    """The custom_ids of the whole file. A fault in the last line is found before the first is answered."""
    ids: set[str] = set()
    for line in read_lines(path):
        if line.custom_id in ids:
            raise BatchError(f"{path}: custom_id {line.custom_id!r} stands twice")
        ids.add(line.custom_id)
    if not ids:
        raise BatchError(f"{path}: holds no requests")
    return ids


class ResultFile:
    """The output: append-only, locked against a second run, whole lines only.

    Opening it cuts a line that a killed run left torn, and tells which requests are `done`.
    Raises BatchError when the file is in use, is no result file, or is of another input.
    """

    def __init__(self, path: Path, input_ids: set[str]) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BatchError(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise BatchError(f"{path}: another run is writing to it") from error
        try:
            self.done = self._recover(path, input_ids)
        except BatchError:
            os.close(self._fd)
            raise
        self._pending: list[tuple[bytes, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._failure: BatchError | None = None

    def _recover(self, path: Path, input_ids: set[str]) -> set[str]:
        done: set[str] = set()
        end = 0  # of the last whole line
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    break
                done.add(self._custom_id(raw, f"{path} line {number}", done, input_ids))
                end += len(raw)
        if end < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, end)
            os.fsync(self._fd)
        return done

    def _custom_id(self, raw: bytes, place: str, done: set[str], input_ids: set[str]) -> str:
        try:
            data = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise BatchError(f"{place}: not a result of a batch; move the file away or name another") from error
        custom_id = data.get("custom_id") if isinstance(data, dict) else None
        if not isinstance(custom_id, str) or custom_id not in input_ids:
            raise BatchError(f"{place}: is no result of this input (custom_id {custom_id!r})")
        if custom_id in done:
            raise BatchError(f"{place}: a second result for custom_id {custom_id!r}")
        return custom_id

    async def append(self, line: bytes) -> None:
        """Returns when `line` is on disk. Lines that come while a write is under way share the next."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((line + b"\n", written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_pending())
        await written

    async def _write_pending(self) -> None:
        while self._pending:
            lines, self._pending = self._pending, []
            if self._failure is None:
                try:
                    await asyncio.to_thread(self._write, b"".join(data for data, _ in lines))
                except OSError as error:  # the last line may be torn now: write nothing after it
                    self._failure = BatchError(f"results cannot be written: {error.strerror}")
            for _, written in lines:
                if written.done():  # its request was cancelled meanwhile; the line is kept all the same
                    continue
                written.set_exception(self._failure) if self._failure else written.set_result(None)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        os.fsync(self._fd)

    async def close(self) -> None:
        """Waits for a write that is under way, and lets the file go."""
        if self._writer is not None:
            await self._writer
        os.close(self._fd)


def render(line: BatchLine, answer: Answer) -> bytes:
    """A result in OpenAI's format. Ids come from the custom_id, so two equal runs write equal results."""
    digest = hashlib.sha256(line.custom_id.encode()).hexdigest()[:24]
    failure = answer.error
    error = {"code": failure["code"] or failure["type"], "message": failure["message"]} if failure else None
    response = {"status_code": answer.status, "request_id": f"req_{digest}", "body": answer.body}
    return orjson.dumps(
        {"id": f"batch_req_{digest}", "custom_id": line.custom_id, "response": response, "error": error}
    )


async def run_batch(
    input_path: Path,
    results: ResultFile,
    answer: Callable[[BatchLine], Awaitable[Answer]],
    max_in_flight: int,
    on_result: Callable[[Answer], None],
) -> None:
    """Answers every request that has no result yet, at most `max_in_flight` at once.

    `answer` turns a bad request into an Answer with an error; what it raises ends the run,
    and the requests under way then have no result and are answered when the run is resumed.
    """
    lines = (line for line in read_lines(input_path) if line.custom_id not in results.done)

    async def work() -> None:
        for line in lines:
            result = await answer(line)
            await results.append(render(line, result))
            on_result(result)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(max_in_flight):
                group.create_task(work())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
