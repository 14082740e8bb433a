"""Compiles the kernels next to their source: `python -m pallas_kernels.native.build`, or the package's own build.

Every instruction set of the machine's kind is compiled; which one runs is chosen while running.
`xla/ffi/api` is XLA's own, from jaxlib 0.11.2, the oldest that we run on: XLA takes kernels made
for an older interface and refuses those for a newer one.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent
LANES = {"avx2": 8, "avx512": 16, "vector": 4}
FLAGS = {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "vector": []}


class NotBuilt(RuntimeError):
    """There is no compiler, or it failed; the message says which."""


def build(target: Path) -> None:
    """Write the library to `target`. Raises NotBuilt."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NotBuilt("no C++ compiler found (c++, g++ or clang++; or name one in CXX)")
    isas = ["avx2", "avx512"] if platform.machine() in ("x86_64", "AMD64") else ["vector"]
    with tempfile.TemporaryDirectory() as folder:
        objects = [_compile(compiler, "native.cc", Path(folder) / "native.o", [f"-isystem{SOURCE}"])]
        for isa in isas:
            defined = [f"-DISA={isa}", f'-DNAME="{isa}"', f"-DLANES={LANES[isa]}"]
            for source in ("kernels.cc", "matmul.cc", "attention.cc"):
                objects.append(_compile(compiler, source, Path(folder) / f"{source}.{isa}.o", [*FLAGS[isa], *defined]))
        partial = target.with_suffix(".partial")
        _run([compiler, "-shared", "-pthread", "-o", str(partial), *map(str, objects)])
        partial.replace(target)


def _compile(compiler: str, source: str, target: Path, flags: list[str]) -> Path:
    common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-pthread"]
    _run([compiler, *common, *flags, "-c", str(SOURCE / source), "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotBuilt(f"{' '.join(command)}: {done.stderr.strip()}")


if __name__ == "__main__":
    try:
        build(SOURCE / "libnative.so")
    except NotBuilt as error:
        sys.exit(f"octavo: error: {error}")
