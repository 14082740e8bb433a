"""The times that peak rates allow for what was counted: a bound from below, which no program beats.

Products and memory traffic overlap, so the slower of the two counts; collectives stand between products that need
their results, so they come on top. The host, kernel launches and the latency of links are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import EngineConfig
from engine.estimate.chips import Topology
from engine.estimate.count import Count, count_step, decode_step, prefill_steps
from engine.estimate.links import link_seconds
from engine.model.config import ModelConfig

Resource = Literal["compute", "memory", "links"]


@dataclass(frozen=True)
class Bound:
    """Seconds of each resource in one step, or in several that follow each other."""

    compute_s: float
    memory_s: float
    links_s: float
    seconds: float  # of all: per step the slower of compute and memory, plus links

    @property
    def binds(self) -> Resource:
        """The resource that takes longest."""
        times: dict[Resource, float] = {"compute": self.compute_s, "memory": self.memory_s, "links": self.links_s}
        return max(times, key=lambda name: times[name])

    def __add__(self, other: Bound) -> Bound:
        return Bound(
            self.compute_s + other.compute_s,
            self.memory_s + other.memory_s,
            self.links_s + other.links_s,
            self.seconds + other.seconds,
        )


def bound(count: Count, topology: Topology, config: EngineConfig) -> Bound:
    """Of one step on one device; all devices do the same."""
    chip = topology.chip
    compute = sum(flops / chip.device_flops(dtype) for dtype, flops in count.flops if flops)
    memory = count.memory_bytes / chip.device_bytes_per_s
    links = link_seconds(topology, config.shards, count.collectives)
    return Bound(compute, memory, links, max(compute, memory) + links)


@dataclass(frozen=True)
class Decode:
    """So many sequences of a length, a token each a step."""

    batch: int
    context: int
    bound: Bound

    @property
    def tpot_s(self) -> float:
        return self.bound.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.bound.seconds

    def cost(self, topology: Topology, price: float) -> float:
        """Of a million tokens, at a price per chip-hour."""
        return price * topology.num_chips / 3600 / self.tokens_per_s * 1e6


@dataclass(frozen=True)
class Prefill:
    """One prompt alone on the devices."""

    length: int
    bound: Bound

    @property
    def ttft_s(self) -> float:
        return self.bound.seconds


def decode_bound(model: ModelConfig, config: EngineConfig, topology: Topology, batch: int, context: int) -> Decode:
    step = decode_step(config, batch, context)
    return Decode(batch, context, bound(count_step(model, config, step), topology, config))


def prefill_bound(model: ModelConfig, config: EngineConfig, topology: Topology, length: int) -> Prefill:
    bounds = [bound(count_step(model, config, step), topology, config) for step in prefill_steps(config, length)]
    return Prefill(length, sum(bounds[1:], bounds[0]))
