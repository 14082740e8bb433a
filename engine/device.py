"""What the process runs on, as plain facts."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from engine.resolve import DeviceFacts


def device_facts() -> DeviceFacts:
    """Facts of the first device: every device of a replica is alike."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return DeviceFacts("cpu", memory, fast_bfloat16=_cpu_has_bfloat16())
    stats = device.memory_stats() or {}
    platform = "tpu" if device.platform == "tpu" else "gpu"
    return DeviceFacts(platform, int(stats.get("bytes_limit", 16 << 30)), fast_bfloat16=True)


def _cpu_has_bfloat16() -> bool:
    """Whether bfloat16 products run in hardware; elsewhere XLA converts, and float32 is faster."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(name in text for name in ("avx512_bf16", "amx_bf16", " bf16"))
