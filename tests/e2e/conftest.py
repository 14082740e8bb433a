"""One real server for all tests here, clients for it, and the same model in this process as oracle."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest
import pytest_asyncio

from engine import LLM
from tests.e2e.serving import MODEL, OPTIONS, Served, running


@pytest.fixture(scope="session")
def server(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running(tmp_path_factory.mktemp("server")) as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120) as found:
        yield found


@pytest_asyncio.fixture
async def aclient(server: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120) as found:
        yield found


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as found:
        yield found


@pytest.fixture(scope="session")
def llm(default_model_path: Path) -> Iterator[LLM]:
    with LLM(MODEL, **OPTIONS) as model:
        yield model
