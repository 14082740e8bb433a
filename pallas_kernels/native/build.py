"""Compiles the kernels next to their source: `python -m pallas_kernels.native.build`, or the package's own build.

Every instruction set of the kind of machine that $CXX compiles for is compiled; which one runs is chosen while running.
`xla/ffi/api` is XLA's own, from jaxlib 0.11.2, the oldest that we run on: XLA takes kernels made
for an older interface and refuses those for a newer one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).parent
LANES = {"avx2": 8, "avx512": 16, "avx512vnni": 16, "avx512bf16": 16, "vector": 4}
_AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
_VNNI = [*_AVX512, "-mavx512vnni"]
FLAGS = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": _AVX512,
    "avx512vnni": _VNNI,
    "avx512bf16": [*_VNNI, "-mavx512bf16"],
    "vector": [],
}


class NotBuilt(RuntimeError):
    """There is no compiler, or it failed; the message says which."""


def up_to_date(target: Path) -> bool:
    """Whether `target` is newer than everything that it is built from."""
    sources = [*SOURCE.glob("*.cc"), *SOURCE.glob("*.h"), SOURCE / "build.py"]
    return target.is_file() and target.stat().st_mtime > max(source.stat().st_mtime for source in sources)


def build(target: Path) -> None:
    """Write the library to `target`. Raises NotBuilt."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NotBuilt("no C++ compiler found (c++, g++ or clang++; or name one in CXX)")
    is_x86 = _run([compiler, "-dumpmachine"]).startswith("x86_64")
    isas = ["avx2", "avx512", "avx512vnni", "avx512bf16"] if is_x86 else ["vector"]
    sources = [("native.cc", [f"-isystem{SOURCE}"])]
    for isa in isas:
        flags = [*FLAGS[isa], f"-DISA={isa}", f'-DNAME="{isa}"', f"-DLANES={LANES[isa]}"]
        sources += [(source.name, flags) for source in sorted(SOURCE.glob("*.cc")) if source.name != "native.cc"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder) / f"{i}.o" for i in range(len(sources))]
        done = [pool.submit(_compile, compiler, *source, to) for source, to in zip(sources, objects, strict=True)]
        for compiled in done:
            compiled.result()
        partial = target.with_suffix(".partial")
        _run([compiler, "-shared", "-pthread", "-o", str(partial), *map(str, objects)])
        partial.replace(target)


def _compile(compiler: str, source: str, flags: list[str], target: Path) -> None:
    common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-pthread"]
    _run([compiler, *common, *flags, "-c", str(SOURCE / source), "-o", str(target)])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotBuilt(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    try:
        build(SOURCE / "libnative.so")
    except NotBuilt as error:
        sys.exit(f"octavo: error: {error}")
