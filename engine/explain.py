"""How a model would be cut over devices that need not be there: each parameter's cut and bytes, from a config."""

from __future__ import annotations

import re
from typing import Any

import jax

from engine.config import EngineConfig, EngineOptions, cache_root
from engine.errors import InvalidParam
from engine.model.config import ModelConfig
from engine.model.known import known_config, known_models
from engine.model.weights import open_checkpoint
from engine.programs import held_bytes, page_bytes, param_cuts, param_shapes, served_models, served_specs
from engine.registry import resolve_model
from engine.resolve import DeviceFacts, ModelFiles, draft_model_of, resolve, usable_bytes
from pallas_kernels.target import CHIPS
from sharding.mesh import parts_of


def planned_config(options: EngineOptions, model: ModelConfig, device: DeviceFacts) -> EngineConfig:
    """`options` resolved for devices that need not be there: the weights of a config alone are bfloat16."""
    name = draft_model_of(options)
    draft = None if name is None else ModelFiles(model_of(options, name), "bfloat16")
    return resolve(options, model, "bfloat16", device, draft=draft)


def explain(model: ModelConfig, config: EngineConfig, device: DeviceFacts) -> dict[str, Any]:
    """Every parameter with its shape, its cut and its bytes on one device; equal ones of several layers are one row."""
    shapes, cuts, rows = param_shapes(model, config), param_cuts(model, config), {}
    overrides = _overrides(model, config)
    for name, shape in shapes.items():
        where = jax.tree.leaves(cuts[name])
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shape)]
        override = overrides[name]
        key = (re.sub(r"layers\.\d+\.", "layers.*.", name), tuple(shape.shape), str(where[0]), override)
        row = rows.setdefault(key, {"count": 0, "bytes": 0})
        row["count"] += 1
        row["bytes"] += sum(size // parts_of(config.shards, cut) for size, cut in zip(sizes, where, strict=True))
    parameters = [
        {"name": name + (f" ({row['count']})" if row["count"] > 1 else ""), "shape": str(list(shape)),
         "cut": cut.removeprefix("P"), "override": override, "bytes": row["bytes"]}
        for (name, shape, cut, override), row in rows.items()
    ]  # fmt: skip
    return {
        "parameters": parameters,
        "held_bytes": held_bytes(model, config),
        "usable_bytes": usable_bytes(device),
        "token_bytes": page_bytes(model, config) // config.page_size,
    }


def _overrides(model: ModelConfig, config: EngineConfig) -> dict[str, str | None]:
    """Of each parameter, the pattern of a sharding file that its cut is by, if any."""
    return {
        prefix + name: own.shards.override(name, spec.axes)
        for prefix, one, own in served_models(model, config)
        for name, spec in served_specs(one, own).items()
    }


def model_of(options: EngineOptions, name: str | None = None) -> ModelConfig:
    """From a config alone: of a well-known model, or of a checkpoint at hand. name: another's than `options.model`."""
    model = name or options.model
    if model in known_models():
        return known_config(model, options.max_model_len)
    root = cache_root(options.cache_dir)
    path = resolve_model(model, cache_dir=root, revision=options.revision if name is None else None)
    return open_checkpoint(path, max_model_len=options.max_model_len).config


def device_of(chip: str, count: int) -> DeviceFacts:
    """So many devices of a kind that need not be there."""
    facts = CHIPS.get(chip)
    if facts is None:
        raise InvalidParam("chip", f"{chip!r} is not in the table: {', '.join(CHIPS)}")
    return DeviceFacts(facts.platform, facts.memory_bytes, True, chip, count)
