"""Routes for operators: absent unless asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest

from server.app import build_app
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from tests.server.conftest import OPTIONS
from tests.server.fakes import FakeEngine


@pytest.fixture
async def admin(lifecycle: Lifecycle) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(lifecycle, Metrics(lifecycle), replace(OPTIONS, admin_routes=True))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
        yield http


async def test_reshard(admin: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await admin.post("/admin/reshard", json={"sharding": "tp"})
    assert answer.status_code == 200 and answer.json()["sharding"] == "tp"
    assert engine.resharded == ["tp"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [({"sharding": "x"}, 400, "invalid_value"), ({"sharding": "huge"}, 409, "does_not_fit"), ({}, 400, None)],
)
async def test_what_cannot_be_is_said(admin: httpx.AsyncClient, body: dict, status: int, code: str | None) -> None:
    answer = await admin.post("/admin/reshard", json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == "sharding"
    assert code is None or answer.json()["error"]["code"] == code


async def test_the_route_is_not_there_by_default(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.post("/admin/reshard", json={"sharding": "tp"})).status_code == 404
    assert engine.resharded == []
