"""`octavo version`: what to quote in a report. Reads package metadata; loads nothing."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("octavo", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin")


def run() -> int:
    for name in PACKAGES:
        try:
            print(name, version(name))
        except PackageNotFoundError:
            continue
    print("python", platform.python_version())
    print("system", platform.platform())
    return 0
