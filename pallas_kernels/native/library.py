"""Loads the compiled kernels and hands them to XLA by name, once a process.

Programs that call them name the instruction set, so that what was compiled for one machine
fails on another with a message and not with an illegal instruction.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax

from pallas_kernels.target import Target

LIBRARY = Path(__file__).parent / "libnative.so"
MATMUL = "octavo_matmul"
PACKED_MATMUL = "octavo_packed_matmul"
GATE = "octavo_gate"
NORM = "octavo_norm"
ROPE = "octavo_rope"
GREEDY = "octavo_greedy"
DECODE_ATTENTION = "octavo_decode_attention"
PREFILL_ATTENTION = "octavo_prefill_attention"
CALLS = (MATMUL, PACKED_MATMUL, GATE, NORM, ROPE, GREEDY, DECODE_ATTENTION, PREFILL_ATTENTION)


@dataclass(frozen=True)
class Library:
    """What this process can call: kernels for some instruction sets, the best first. Where there are none, `missing`
    says why."""

    isas: tuple[str, ...]
    missing: str = ""

    @property
    def isa(self) -> str:
        """The best one, or ""."""
        return self.isas[0] if self.isas else ""


@cache
def library(path: Path = LIBRARY) -> Library:
    """Load and register; never raises: without it plain XLA serves."""
    if not path.is_file():
        return Library((), "not built: `python -m pallas_kernels.native.build` needs a C++ compiler")
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.octavo_isas.restype = ctypes.c_char_p
        isas = loaded.octavo_isas().decode()
        if not isas:
            return Library((), "this CPU has none of the instruction sets that it was built for")
        jax.devices("cpu")  # before it exists, a kernel that it refuses would take the backend with it
        for name in CALLS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    except (OSError, AttributeError, RuntimeError, jax.errors.JaxRuntimeError) as error:
        return Library((), f"{path.name} cannot be used: {' '.join(str(error).split())}")
    return Library(tuple(isas.split(",")))


def not_native(target: Target, num_devices: int = 1) -> str | None:
    """The first question of every compiled CPU kernel: why none can run; None: they can.

    num_devices: that share the model, of ops that run on one alone.
    """
    if target.platform != "cpu":
        return "for cpu"
    if not target.native:
        return "the native library is not there"
    if num_devices > 1:  # on a CPU they stand for those of other platforms, and run what these would
        return f"for one device, not {num_devices}"
    return None
