"""What the process runs on, as plain facts."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

import jax

from engine.resolve import DeviceFacts
from pallas_kernels.native import library

log = logging.getLogger("octavo.engine")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h

# JAX's device_kind, and what `pallas_kernels.target.CHIPS` calls it. A GPU's kind goes on after the name.
CHIP_OF_KIND = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
}


@cache
def device_facts() -> DeviceFacts:
    """Facts of the first device: every device of a replica is alike."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        count = jax.device_count()  # which share the machine's memory
        native = library()
        if native.missing:
            log.warning("native CPU kernels: %s", native.missing)
        return DeviceFacts(
            "cpu", memory // jax.local_device_count(), fast_bfloat16=_cpu_has_bfloat16(), count=count, native=native.isa
        )
    stats = device.memory_stats() or {}
    platform = "tpu" if device.platform == "tpu" else "gpu"
    memory = int(stats.get("bytes_limit", 16 << 30))
    return DeviceFacts(
        platform, memory, fast_bfloat16=True, chip=chip_name(device.device_kind), count=jax.device_count()
    )


def chip_name(kind: str) -> str:
    """The chip of a JAX device_kind; a kind that we have no numbers for is its own name, and kernels decline it."""
    found = CHIP_OF_KIND.get(kind) or CHIP_OF_KIND.get(" ".join(kind.split()[:2]))
    return found or kind


def give_back_memory() -> None:
    """Pages that were freed but not returned, to the operating system: glibc keeps those of every thread's heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_memory() -> None:
    """On a CPU: what is freed from now on stays the process's, until `give_back_memory`.

    XLA allocates a program's temporaries at every call. glibc maps what is over 32 MB and unmaps it again, and the
    kernel clears each page of it when it is touched: 6 of 15 ms of a step with a vocabulary of 128,000. What is over
    64 MB is mapped even so: heaps of threads end there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and jax.default_backend() == "cpu":
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _cpu_has_bfloat16() -> bool:
    """Whether bfloat16 products run in hardware; elsewhere XLA converts, and float32 is faster."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(name in text for name in ("avx512_bf16", "amx_bf16", " bf16"))
