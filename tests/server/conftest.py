"""A server around the fake engine: called in process, or listening on a real socket."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import httpx
import pytest
import uvicorn

from server.app import build_app
from server.config import ServerOptions
from server.lifecycle import Lifecycle
from server.limits import bounded_protocol
from server.metrics import Metrics
from tests.server.fakes import ByteTokenizer, FakeEngine

OPTIONS = ServerOptions(max_body_bytes=4 * 2**20, body_timeout_s=0.5, max_choices=256)


@dataclass
class Running:
    engine: FakeEngine
    lifecycle: Lifecycle
    port: int
    url: str


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    fake = FakeEngine(tokenizer=ByteTokenizer())
    yield fake
    fake.stop()


@pytest.fixture
def lifecycle(engine: FakeEngine) -> Lifecycle:
    state = Lifecycle()
    state.ready(engine)
    return state


@pytest.fixture
async def client(lifecycle: Lifecycle) -> AsyncIterator[httpx.AsyncClient]:
    """Calls the application in process. An unexpected exception shows as its 500, as over a socket."""
    app = build_app(lifecycle, Metrics(lifecycle), OPTIONS)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


@pytest.fixture
def live(engine: FakeEngine, lifecycle: Lifecycle) -> Iterator[Running]:
    """A uvicorn in a thread."""
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    servers: list[uvicorn.Server] = []

    async def main() -> None:
        app = build_app(lifecycle, Metrics(lifecycle), OPTIONS)
        http = bounded_protocol(OPTIONS)
        config = uvicorn.Config(app, http=http, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=1)
        servers.append(uvicorn.Server(config))
        await servers[0].serve(sockets=[sock])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    yield Running(engine, lifecycle, port, f"http://127.0.0.1:{port}")
    servers[0].should_exit = True
    thread.join(10)
