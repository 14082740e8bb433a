"""What needs several devices, in a process that has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.devices import run_on_devices


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_four_devices(marks: str) -> None:
    run_on_devices(Path(__file__).parent / "on_four_devices.py", 4, marks)
