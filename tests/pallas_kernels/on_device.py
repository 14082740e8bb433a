"""A pytest plugin: the kernel suites on the accelerator at hand, without their interpreters.

    JAX_PLATFORMS=cuda python -m pytest -p tests.pallas_kernels.on_device tests/pallas_kernels

Targets of the suites that would be interpreted and are of this platform become the chip at hand;
tests that use none of them are left out. It imports no JAX before tests/conftest.py has set it up.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from pallas_kernels.target import Target

ABOUT_INTERPRETERS = ("detector", "interpreter")  # words in names of tests that have no sense elsewhere


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """JAX before 0.12 has no interpreter for GPUs, for which suites leave tests out; none of these needs it."""
    from jax.experimental.pallas import mosaic_gpu

    if not hasattr(mosaic_gpu, "InterpretGPUParams"):
        mosaic_gpu.InterpretGPUParams = None  # type: ignore[attr-defined]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from benchmarks.device import target_here

    here = target_here()
    if here.facts is None:
        raise pytest.UsageError(f"no kernel knows the device here, {here.platform} {here.chip!r}")
    modules: dict[str, Any] = {item.path.stem: item.module for item in items if isinstance(item, pytest.Function)}
    keys = {stem: make_real(module, here) for stem, module in modules.items()}
    kept = [item for item in items if item.path.stem in keys and runs_here(item, keys[item.path.stem], here)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def make_real(module: ModuleType, here: Target) -> set[str]:
    """Put the chip at hand in place of the module's interpreted targets; the keys of those in dicts."""
    keys: set[str] = set()
    for name, value in list(vars(module).items()):
        if isinstance(value, Target):
            setattr(module, name, real(value, here) or value)
        elif isinstance(value, dict):
            found = {key: real(target, here) for key, target in value.items() if isinstance(target, Target)}
            value.update({key: target for key, target in found.items() if target is not None})
            keys |= {key for key, target in found.items() if target is not None}
    return keys


def real(target: Target, here: Target) -> Target | None:
    """The chip at hand with what the target asks for by name; None if it is another platform's or not interpreted."""
    if not target.interpret or target.platform != here.platform:
        return None
    return replace(target, chip=here.chip, interpret=False)


def runs_here(item: Any, keys: set[str], here: Target) -> bool:
    """Whether the test is parametrised over such a target, or stands in this platform's own suite."""
    if any(word in item.name for word in ABOUT_INTERPRETERS) or item.get_closest_marker("aot"):
        return False
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return item.path.stem.endswith(f"_{here.platform}") or any(isinstance(p, str) and p in keys for p in params)
