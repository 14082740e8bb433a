"""From `Shards` to JAX: the mesh of devices, and how each parameter lies on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, PartitionSpec

from sharding.params import ParamSpec
from sharding.shards import Shards


def mesh_of(shards: Shards, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of `shards` on the first of `devices` (default: the process's); None where nothing is cut."""
    if shards.num_devices == 1:
        return None
    found = list(jax.devices() if devices is None else devices)[: shards.num_devices]
    sizes = tuple(axis.size for axis in shards.mesh)
    return Mesh(mesh_utils.create_device_mesh(sizes, found), tuple(axis.name for axis in shards.mesh))


def mesh_of_stage(mesh: Mesh, shards: Shards, stage: int) -> Mesh:
    """The devices of one stage, as a mesh of the same axes; the mesh itself where layers are in none."""
    axes = shards.axes("layers")
    if not axes:
        return mesh
    at = np.unravel_index(stage, [shards.parts(axis) for axis in axes])
    devices = mesh.devices
    for axis, index in zip(axes, at, strict=True):
        devices = devices.take([index], axis=mesh.axis_names.index(axis))
    return Mesh(devices, mesh.axis_names)


def param_cut(shards: Shards, param: ParamSpec) -> PartitionSpec:
    """Of a parameter as it is on the device, `shards` being those of its scope; merged dimensions are cut along the
    first of them."""
    cuts = [shards.axes(name) if name else () for name in param.axes]
    if param.rows is not None:
        lead, rest = cuts[: param.lead], cuts[param.lead :]
        groups = (rest[: param.rows], rest[param.rows :])
        if any(axes for group in groups for axes in group[1:]):
            raise ValueError(f"axes {param.axes}: only the first of merged dimensions can be cut")
        cuts = [*lead, *(group[0] for group in groups)]
    return PartitionSpec(*(axes or None for axes in cuts))


def parts_of(shards: Shards, cut: PartitionSpec) -> int:
    """Parts that an array is in."""
    return math.prod(map(shards.parts, cut))
