"""The tests that need several devices, in a process that has them: CPU devices, made before JAX starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "on_eight_devices.py"


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(marks: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, str(SUITE)]
    env = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(command, cwd=SUITE.parent.parent.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
