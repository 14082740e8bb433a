"""Host memory while weights are loaded: the weights themselves, and little more.

On a CPU the weights stay in host memory, so the least possible peak is once their bytes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.serving import ROOT

LIMIT = 2.5

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux' /proc"),
]

LOAD = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from engine.config import EngineOptions
from engine.device import device_facts
from engine.load import load_params
from engine.model.weights import open_checkpoint
from engine.resolve import resolve

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

path, dtype = Path(sys.argv[1]), sys.argv[2]
jnp.zeros(8).block_until_ready()
checkpoint = open_checkpoint(path)
config = resolve(EngineOptions(dtype=dtype), checkpoint.config, checkpoint.dtype, device_facts())
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
assert status("VmHWM") < before * 1.2, "the peak was not reset"
params = load_params(checkpoint, config, lambda phase, done, of: None)
weights = sum(array.nbytes for array in jax.tree.leaves(params))
print(weights, status("VmHWM") - before, status("VmRSS") - before)
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_while_loading(default_model_path: Path, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(default_model_path), dtype],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights, peak, after = map(int, done.stdout.split())
    assert weights > 134e6 * (2 if dtype == "bfloat16" else 4)
    assert after > 0.9 * weights  # they are there: the peak below is of a real load
    assert peak < LIMIT * weights, f"{peak / weights:.2f} times the weights"
