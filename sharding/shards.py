"""What is cut over which mesh axes, as plain data: a part of the engine's configuration. Imports no JAX."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Axis(NamedTuple):
    """Of the mesh."""

    name: str
    size: int


@dataclass(frozen=True)
class Shards:
    """The mesh, and the mesh axes over whose product each logical axis is cut; static and hashable.

    copies: of a logical axis that is cut into more parts than it has elements, how many hold each.
    """

    mesh: tuple[Axis, ...] = ()
    table: tuple[tuple[str, tuple[str, ...]], ...] = ()
    copies: tuple[tuple[str, int], ...] = ()

    @property
    def num_devices(self) -> int:
        return math.prod(axis.size for axis in self.mesh)

    def axes(self, logical: str) -> tuple[str, ...]:
        return dict(self.table).get(logical, ())

    def count(self, logical: str) -> int:
        """Parts that the logical axis is in."""
        return self.parts(self.axes(logical))

    @property
    def num_groups(self) -> int:
        """Into which requests are divided, with slots and pages of their own."""
        return self.count("requests")

    def group_axes(self, *logical: str) -> tuple[str, ...]:
        """The mesh axes of groups of requests over which a weight of these logical axes is cut as well."""
        cut = {axis for name in logical for axis in self.axes(name)}
        return tuple(axis for axis in self.axes("requests") if axis in cut)

    def other_axes(self, *logical: str) -> tuple[str, ...]:
        """The rest of those that it is cut over, each once."""
        groups = self.group_axes(*logical)
        return tuple(dict.fromkeys(axis for name in logical for axis in self.axes(name) if axis not in groups))

    def num_copies(self, logical: str) -> int:
        """Parts that hold the same element of the logical axis."""
        return dict(self.copies).get(logical, 1)

    def parts(self, axes: str | tuple[str, ...] | None) -> int:
        """Devices along the product of mesh axes, as an entry of a PartitionSpec names them."""
        sizes = dict(self.mesh)
        return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


WHOLE = Shards()
