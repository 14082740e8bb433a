"""Collectives, and the time that the links between chips allow them. Pure arithmetic.

Ring formulas: a sum of B bytes over n devices makes each send and receive 2 (n - 1) / n B, a gather to B bytes
(n - 1) / n B. What a device can receive at once is one direction of each of its links within the group; in a grid
that does not close to a ring the corner has the fewest, and all wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from engine.errors import InvalidParam
from engine.estimate.chips import Topology
from sharding.shards import Shards

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]


@dataclass(frozen=True)
class Collective:
    """One kind of call on one device. bytes: of the whole sum, or of what was gathered or is to be scattered."""

    kind: Kind
    axes: tuple[str, ...]
    bytes: float
    count: float = 1

    def moved(self, devices: int) -> float:
        """Bytes that each of so many devices receives, in all calls."""
        share = (devices - 1) / devices
        turns = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return turns * self.bytes * self.count


def merged(collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    """Equal calls as one with their number, in order of appearance; none where the numbers cancel."""
    found: dict[Collective, float] = {}
    for call in collectives:
        one = replace(call, count=1)
        found[one] = found.get(one, 0) + call.count
    return tuple(replace(call, count=count) for call, count in found.items() if count)


def link_seconds(topology: Topology, shards: Shards, collectives: Sequence[Collective]) -> float:
    """One after the other: each waits for what it sums, and the next product for it."""
    moved = [(c, c.moved(shards.parts(c.axes))) for c in collectives if shards.parts(c.axes) > 1]
    return sum(size / incoming_bytes_per_s(topology, shards, c.axes) for c, size in moved)


def incoming_bytes_per_s(topology: Topology, shards: Shards, axes: tuple[str, ...]) -> float:
    """What the worst placed device of a group along the mesh axes can receive from the others."""
    links = topology.chip.links
    if links is None:
        raise InvalidParam("topology", f"no link bandwidth is known for {topology.chip.name}")
    one = links.gb_per_s * 1e9 / topology.chip.devices
    if links.dims is None:
        return one
    return one * num_links(group_shape(topology, shards, axes), links.ring)


def num_links(shape: Sequence[int], ring: int | None) -> int:
    """Of the corner of a grid: one along each dimension, two where it closes to a ring."""
    found = sum(2 if ring and size > 2 and size % ring == 0 else 1 for size in shape if size > 1)
    return max(found, 1)


def group_shape(topology: Topology, shards: Shards, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The dimensions of the grid that a group along the mesh axes fills.

    Assumes that mesh axes take whole dimensions where sizes allow it, which is how JAX lays a mesh; an axis that does
    not come out even is taken for a line within the grid.
    """
    if shards.parts(axes) == topology.num_devices:
        return topology.shape
    left = [size for size in (*topology.shape, topology.chip.devices) if size > 1]
    taken: dict[str, list[int]] = {}
    for axis in shards.mesh:
        taken[axis.name] = _take(left, axis.size)
    return tuple(size for axis in axes for size in taken[axis])


def _take(left: list[int], size: int) -> list[int]:
    """Whole dimensions from `left` whose product is `size`, which are gone from it then; else one line."""
    for start in range(len(left)):
        for end in range(start + 1, len(left) + 1):
            if math.prod(left[start:end]) == size:
                found = left[start:end]
                del left[start:end]
                return found
    return [size]
