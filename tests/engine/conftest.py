"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

from benchmarks import fake_device
from engine import loop
from tests.engine.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of the loop and of the fake device."""
    found = Clock()
    for module in (fake_device, loop):
        monkeypatch.setattr(module, "time", found)
    return found
