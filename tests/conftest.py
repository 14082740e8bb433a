"""Set-up that every test shares: CPU, strict promotion, a cache of the repository's own.

Knows nothing about any one part; fixtures of a part live beside its tests.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent

# Set before the first `import jax`, and inherited by servers that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
# Most of the tests' time is XLA's; a program in 32 parts for 32 threads takes a sixth more of it on two cores.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_parallel_codegen_split_count=1")
os.environ.setdefault("OCTAVO_CACHE_DIR", str(ROOT / ".cache"))

# The same examples in every run, so that a failure is of the change at hand; `--hypothesis-profile default` draws
# new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The GGUF file of the embedded default model, fetched on first use. Mark its tests `model`."""
    from engine.registry import fetch_default_model  # slow import, and few tests want it

    return fetch_default_model()
