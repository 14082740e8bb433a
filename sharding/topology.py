"""Chips that programs can be compiled for without being there: `topology_devices("v6e:2x2")`.

Needs libtpu for TPUs and the CUDA plugin for GPUs (the `aot` extra), but no accelerator.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

# libtpu looks for a TPU VM's metadata unless it is told what it would find.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling holds no chip, so the one-process lock is in the way
}


@dataclass(frozen=True)
class GpuChip:
    """Limits of an NVIDIA GPU, from its data sheet and the CUDA programming guide's tables."""

    name: str
    compute_capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    memory_bytes: int
    memory_bytes_per_s: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int  # opt-in limit

    def target_config(self) -> str:
        """XLA's GpuTargetConfigProto as text: what its compiler asks of a device."""
        major, minor = self.compute_capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES }}
              core_count: {self.cores} fpus_per_core: 128
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes}
              memory_bandwidth: {self.memory_bytes_per_s}
              l2_cache_size: {self.l2_bytes}
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_bytes_per_core}
              shared_memory_per_block_optin: {self.shared_bytes_per_block}
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              device_address_bits: 64
              name: "{self.name}"
              device_vendor: "NVIDIA Corporation"
              driver_version: "13.0.0" runtime_version: "13.0.0"
              compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
            }}"""


GPUS = {
    "h100": GpuChip("H100 SXM", (9, 0), 132, 80 << 30, 3_350_000_000_000, 1.98, 50 << 20, 233472, 232448),
    "h200": GpuChip("H200 SXM", (9, 0), 132, 141 << 30, 4_800_000_000_000, 1.98, 50 << 20, 233472, 232448),
    "b200": GpuChip("B200 SXM", (10, 0), 148, 179 << 30, 8_000_000_000_000, 1.965, 126 << 20, 233472, 232448),
}


def topology_devices(name: str) -> list[Any]:
    """Abstract `jax.Device`s of "v6e:2x2" (TPU generation and slice) or "h200:8" (GPU and how many).

    Programs lowered with shardings on them compile for that chip. Raises ValueError for an
    unknown name, RuntimeError when the compiler for it is not installed.
    """
    chip, _, shape = name.partition(":")
    if chip in GPUS:
        count = int(shape or 1)
        config = GPUS[chip].target_config()
        return list(
            topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x{count}x1").devices
        )
    if not chip.startswith(("v", "tpu")):
        raise ValueError(
            f"unknown chip {chip!r}: TPU generations are v4, v5e, v5p, v6e, tpu7x; GPUs are {sorted(GPUS)}"
        )
    os.environ.update({k: v for k, v in _TPU_ENVIRONMENT.items() if k not in os.environ})
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
