"""What a program is compiled for, and the numbers of the chips that kernels know.

Kernels never ask the process what it runs on: a program for a TPU compiles on a machine
without one. The target is a static argument of every op.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Platform = Literal["cpu", "gpu", "tpu"]
KVDtype = Literal["float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"]


@dataclass(frozen=True)
class Chip:
    """One JAX device of a kind: a TPU core (or the one core of a chip), a GPU. Data-sheet figures.

    TPU: cloud.google.com/tpu/docs and JAX's own table. GPU: NVIDIA's data sheets and the CUDA guide.
    """

    platform: Platform
    memory_bytes: int
    memory_bytes_per_s: float
    bfloat16_flops: float
    int8_ops: float | None  # None: not in hardware
    float8_flops: float | None
    scratch_bytes: int  # VMEM of a core, or the shared memory that one block may ask for
    cores: int = 1  # streaming multiprocessors of a GPU
    capability: tuple[int, int] | None = None  # CUDA compute capability
    loops_copy: bool = False  # its compiler gives a loop a copy of every array that it only reads: all weights

    def has(self, dtype: str) -> bool:
        """Whether products of two int8 or float8 operands run in hardware, faster than bfloat16."""
        rate = self.int8_ops if dtype == "int8" else self.float8_flops
        return rate is not None and rate > self.bfloat16_flops


_MIB, _GIB = 1 << 20, 1 << 30
CHIPS = {
    "v5e": Chip("tpu", 16 * _GIB, 0.82e12, 197e12, 394e12, None, 128 * _MIB),
    "v5p": Chip("tpu", 95 * _GIB, 2.46e12, 459e12, 918e12, None, 64 * _MIB),
    "v6e": Chip("tpu", 32 * _GIB, 1.64e12, 920e12, 1840e12, 920e12, 128 * _MIB),
    "tpu7x": Chip("tpu", 96 * _GIB, 3.70e12, 1155e12, None, 2300e12, 64 * _MIB, loops_copy=True),
    "h100": Chip("gpu", 80 * _GIB, 3.35e12, 989e12, 1979e12, 1979e12, 232448, cores=132, capability=(9, 0)),
    "h200": Chip("gpu", 141 * _GIB, 4.80e12, 989e12, 1979e12, 1979e12, 232448, cores=132, capability=(9, 0)),
}


@dataclass(frozen=True)
class Target:
    """A static argument of every op: the chip, and what was asked for by name.

    implementations: (op, implementation) pairs that leave no choice; see `choice.choose`.
    interpret: kernels of the chip run in their interpreter on a CPU, races looked for.
    native: the instruction set of the compiled CPU kernels (`pallas_kernels.native`); "" where there are none.
    bfloat16_products: a CPU's own, in hardware.
    """

    platform: Platform = "cpu"
    chip: str = "cpu"  # a key of CHIPS; another name is a chip that no kernel knows
    implementations: tuple[tuple[str, str], ...] = ()
    interpret: bool = False
    native: str = ""
    bfloat16_products: bool = False

    @property
    def facts(self) -> Chip | None:
        return CHIPS.get(self.chip)

    @property
    def loops_copy(self) -> bool:
        return self.facts is not None and self.facts.loops_copy

    def asked(self, op: str) -> str | None:
        return dict(self.implementations).get(op)


CPU = Target()
