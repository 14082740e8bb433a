"""Chips as data (`configs/chips.yaml`), and topologies: "v6e:2x4" is a slice of TPU chips, "h200:8" eight GPUs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from engine.errors import InvalidParam
from engine.resolve import GIB, DeviceFacts
from pallas_kernels.target import Platform

MAX_CHIPS = 1 << 14


@dataclass(frozen=True)
class Links:
    """Between chips. gb_per_s: of one link in one direction.

    dims and ring: a grid, whose dimensions close to rings where their size is a multiple of `ring`.
    most: as many chips go into one switch, each with one link.
    """

    gb_per_s: float
    dims: int | None = None
    ring: int | None = None
    most: int | None = None


@dataclass(frozen=True)
class Chip:
    """Figures of the maker, of a whole chip. Without rates, times are not estimated."""

    name: str
    platform: Platform
    devices: int  # JAX devices that a chip is
    memory_bytes: int
    scratch_bytes: int
    source: str
    memory_bytes_per_s: float | None = None
    flops: tuple[tuple[str, float], ...] = ()  # a second, by the dtype of the operands
    links: Links | None = None

    def device_flops(self, dtype: str) -> float:
        """A second of one device. float8 operands run as bfloat16 where the chip has no rate for them."""
        rates = dict(self.flops)
        kind = "float8" if dtype.startswith("float8") else dtype
        rate = rates.get(kind) or (rates.get("bfloat16") if kind != "float32" else None)
        if rate is None:
            raise InvalidParam("dtype", f"no peak rate of {dtype} products is known for {self.name}")
        return rate / self.devices

    @property
    def device_bytes_per_s(self) -> float:
        if self.memory_bytes_per_s is None:
            raise InvalidParam("topology", f"no memory bandwidth is known for {self.name}")
        return self.memory_bytes_per_s / self.devices

    @property
    def has_rates(self) -> bool:
        return self.memory_bytes_per_s is not None


@dataclass(frozen=True)
class Topology:
    """Chips side by side: a grid of TPU chips, or so many GPUs or CPU devices."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def device(self) -> DeviceFacts:
        """As `engine.resolve` takes it."""
        chip = self.chip
        return DeviceFacts(
            chip.platform, chip.memory_bytes // chip.devices, chip.platform != "cpu", chip.name, self.num_devices
        )


@cache
def chips() -> Mapping[str, Chip]:
    """All of configs/chips.yaml, by name."""
    found = yaml.safe_load((resources.files("configs") / "chips.yaml").read_text("utf-8"))
    return {name: _chip(name, **fields) for name, fields in found.items()}


def _chip(
    name: str,
    *,
    platform: Platform,
    devices: int,
    memory_gib: int,
    scratch_kib: int,
    source: str,
    memory_gb_per_s: float | None = None,
    tflops: Mapping[str, float] | None = None,
    links: Mapping[str, Any] | None = None,
) -> Chip:
    return Chip(
        name=name,
        platform=platform,
        devices=devices,
        memory_bytes=memory_gib * GIB,
        scratch_bytes=scratch_kib << 10,
        source=" ".join(source.split()),
        memory_bytes_per_s=memory_gb_per_s and memory_gb_per_s * 1e9,
        flops=tuple((dtype, rate * 1e12) for dtype, rate in (tflops or {}).items()),
        links=Links(**links) if links else None,
    )


def topology_of(text: str) -> Topology:
    """Of "v6e:2x4", "tpu7x:2x2x1", "h200:8" or "cpu:8"; without sizes, one chip. Raises InvalidParam."""
    name, _, sizes = text.partition(":")
    chip = chips().get(name)
    if chip is None:
        raise InvalidParam("topology", f"{name!r} is not in configs/chips.yaml: {', '.join(chips())}")
    dims = chip.links.dims if chip.links and chip.links.dims else 1
    if not sizes:
        return Topology(chip, (1,) * dims)
    if not re.fullmatch(r"[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})*", sizes):
        raise InvalidParam("topology", f"{text!r} is not {name}: and its sizes, as {example(chip)}")
    shape = tuple(map(int, sizes.split("x")))
    if len(shape) != dims:
        raise InvalidParam("topology", f"{text!r} has {len(shape)} sizes; {name} takes {dims}, as {example(chip)}")
    most = chip.links.most if chip.links and chip.links.most else MAX_CHIPS
    if math.prod(shape) > most:
        raise InvalidParam("topology", f"{text!r} is more than the {most} chips that a topology of {name} may have")
    return Topology(chip, shape)


def example(chip: Chip) -> str:
    dims = chip.links.dims if chip.links else None
    return f"{chip.name}:{'x'.join(['2'] * dims) if dims else 8}"
