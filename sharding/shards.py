"""What is cut over which mesh axes, as plain data: a part of the engine's configuration. Imports no JAX."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple


class Axis(NamedTuple):
    """Of the mesh."""

    name: str
    size: int


class Override(NamedTuple):
    """In one scope, other mesh axes for a logical axis; pattern: of the file's entry."""

    scope: str
    logical: str
    axes: tuple[str, ...]
    pattern: str


def scope_of(name: str) -> str:
    """Where a parameter's cuts are decided: its layer ("layers.3"), or, outside of the layers, itself.

    Within a layer weights that share a logical axis are multiplied with each other, so they are cut alike.
    """
    return ".".join(name.split(".")[:2])


@dataclass(frozen=True)
class Shards:
    """The mesh, and the mesh axes over whose product each logical axis is cut; static and hashable.

    copies: of a logical axis that is cut into more parts than it has elements, how many hold each.
    """

    mesh: tuple[Axis, ...] = ()
    table: tuple[tuple[str, tuple[str, ...]], ...] = ()
    copies: tuple[tuple[str, int], ...] = ()
    overrides: tuple[Override, ...] = ()

    def at(self, scope: str) -> Shards:
        """What holds in one scope, without overrides; equal for scopes that are cut alike."""
        mine = {override.logical: override.axes for override in self.overrides if override.scope == scope}
        return replace(self, table=tuple((dict(self.table) | mine).items()) if mine else self.table, overrides=())

    def override(self, name: str, logical: Iterable[str | None]) -> str | None:
        """The pattern by which a parameter of these axes is cut otherwise than the rules say."""
        here = [override for override in self.overrides if override.scope == scope_of(name)]
        return next((override.pattern for override in here if override.logical in logical), None)

    @property
    def in_layers(self) -> bool:
        """Whether overrides name layers, which then are not all cut alike."""
        return any(override.scope.startswith("layers.") for override in self.overrides)

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
