"""Where each weight is: from the host to its shards, and from one layout to another, device to device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding

from engine.config import EngineConfig
from engine.executables import placed
from engine.model.config import ModelConfig
from engine.model.place import replicated, stage_of, with_copies, without_copies
from engine.model.quantization import pack
from engine.programs import model_specs, param_cuts, param_shapes, served_specs, stage_cuts, stage_shapes
from pallas_kernels.quantized import Quantized
from sharding.mesh import mesh_of, mesh_of_stage

Put = Callable[[str, Any], Any]  # of a parameter's name and its arrays


def placer(model: ModelConfig, config: EngineConfig) -> Put:
    """put(name, host array of the parameter's spec): packed as asked, and in its shards."""
    specs, served = model_specs(model, config), served_specs(model, config)
    put = _to_shards(model, config)
    copies = config.shards.num_copies("kv_heads")

    def place(name: str, array: np.ndarray | Quantized) -> Any:
        _, there = stage_of(name, model, config.shards)
        copied = with_copies(name, specs[name], array, copies)
        return put(name, pack(served[there], copied, config.quantization, config.laid_for))

    return place


def _to_shards(model: ModelConfig, config: EngineConfig) -> Put:
    """put(name, arrays as the devices hold them, wherever they are); a layer's go to the devices of its stage."""
    mesh = mesh_of(config.shards)
    if mesh is None:
        return lambda name, array: jax.device_put(array, jax.devices()[0])
    cuts = stage_cuts(model, config)
    put = partial(jax.tree.map, _local_parts) if mesh.is_multi_process else jax.device_put

    def to_stage(name: str, array: Any) -> Any:
        stage, there = stage_of(name, model, config.shards)
        on = mesh_of_stage(mesh, config.shards, stage) if there.startswith("layers.") else mesh
        return put(array, placed(on, array, cuts[there]))

    return to_stage


def assembled(model: ModelConfig, config: EngineConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters that are on their devices as programs take them: see `param_shapes`. Nothing is copied."""
    mesh = mesh_of(config.shards)
    if mesh is None or config.shards.count("layers") == 1:
        return params
    shapes, cuts = param_shapes(model, config), param_cuts(model, config)
    stages: dict[str, list[Any]] = {}
    for name, array in params.items():
        stages.setdefault(stage_of(name, model, config.shards)[1], []).append(array)

    def one(shape: jax.ShapeDtypeStruct, place: Sharding, *arrays: Array) -> Array:
        parts = [shard.data for array in arrays for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(shape.shape, place, parts)

    return {name: jax.tree.map(one, shapes[name], placed(mesh, shapes[name], cuts[name]), *arrays)
            for name, arrays in stages.items()}  # fmt: skip


def taken_apart(model: ModelConfig, config: EngineConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `assembled`: parameters by the names of the model, a layer's on the devices of its stage."""
    mesh = mesh_of(config.shards)
    if mesh is None or config.shards.count("layers") == 1:
        return params
    shapes, cuts, found = stage_shapes(model, config), stage_cuts(model, config), {}
    for name in model_specs(model, config):
        stage, there = stage_of(name, model, config.shards)
        on = mesh_of_stage(mesh, config.shards, stage) if there.startswith("layers.") else mesh
        places = placed(on, shapes[there], cuts[there])
        found[name] = jax.tree.map(_part_on, shapes[there], places, params[there])
    return found


def _part_on(shape: jax.ShapeDtypeStruct, place: Sharding, array: Array) -> Array:
    parts = [shard.data for shard in array.addressable_shards if shard.device in place.device_set]
    return jax.make_array_from_single_device_arrays(shape.shape, place, parts)


def _local_parts(array: np.ndarray, sharding: Sharding) -> Array:
    """Of what every process has whole: each puts its own parts; device_put would compare the copies."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def move(model: ModelConfig, params: list[Array], old: EngineConfig, new: EngineConfig) -> None:
    """Leaves of the parameters from the shards of `old` to those of `new`, in place, one parameter at a time.

    The configurations differ in their shards alone. When a device fails, what had moved moves back, and it raises.
    """
    held = taken_apart(model, old, jax.tree.unflatten(jax.tree.structure(param_shapes(model, old)), params))
    params.clear()  # the only references are in `held`: what has moved is freed
    there, back = _mover(model, old, new), _mover(model, new, old)
    gone: list[str] = []
    now = old
    try:
        for name in held:
            held[name] = there(name, held[name])
            gone.append(name)
        now = new
    except Exception:
        for name in gone:
            held[name] = back(name, held[name])
        raise
    finally:
        params += jax.tree.leaves(assembled(model, now, held))


def _mover(model: ModelConfig, old: EngineConfig, new: EngineConfig) -> Put:
    to_shards, place = _to_shards(model, new), placer(model, new)
    specs, served = model_specs(model, old), model_specs(replicated(model, old.shards), old)
    resized = {name for name, spec in model_specs(replicated(model, new.shards), new).items() if spec != served[name]}
    copies = old.shards.num_copies("kv_heads")

    def put(name: str, array: Any) -> Any:
        if name not in resized:
            return jax.block_until_ready(to_shards(name, array))
        whole = jax.tree.map(np.asarray, array)  # by way of the host: the number of copies changes
        once = without_copies(name, specs[name], served[name], whole, copies)
        return jax.block_until_ready(place(name, once))

    return put
