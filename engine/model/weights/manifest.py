"""octavo.json: the part of a converted checkpoint that is not arrays. `ModelConfig` <-> plain data.

Knows no file formats of weights and imports no Orbax, so that looking at a folder stays cheap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from engine.errors import ModelError
from engine.model.config import DeltaRule, Experts, Latent, LayerSpec, ModelConfig, Rope, StateSpace
from engine.model.weights.checkpoint import Dtype

MANIFEST = "octavo.json"
# Fields of ModelConfig that are None or one of these.
PARTS = {"experts": Experts, "latent": Latent, "state_space": StateSpace, "delta_rule": DeltaRule}
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What octavo.json says. `dtype` is that of the matrices; norm weights are float32."""

    config: ModelConfig
    dtype: Dtype
    end_token_ids: tuple[int, ...]


def manifest_to_dict(manifest: Manifest) -> dict[str, Any]:
    """Plain data for JSON; `manifest_from_dict` gives back an equal `Manifest`."""
    ropes = list(dict.fromkeys(spec.rope for spec in manifest.config.layers if spec.rope is not None))
    layers = [
        {**dataclasses.asdict(spec), "rope": None if spec.rope is None else ropes.index(spec.rope)}
        for spec in manifest.config.layers
    ]
    fields = {f.name: getattr(manifest.config, f.name) for f in dataclasses.fields(ModelConfig)}
    for name in PARTS:
        if fields[name] is not None:
            fields[name] = dataclasses.asdict(fields[name])
    return {
        "format": "octavo",
        "version": VERSION,
        "dtype": manifest.dtype,
        "end_token_ids": list(manifest.end_token_ids),
        "config": {**fields, "layers": layers},
        "ropes": [dataclasses.asdict(rope) for rope in ropes],
    }


def manifest_from_dict(data: Mapping[str, Any], where: str) -> Manifest:
    """Inverse of `manifest_to_dict`. Raises ModelError; `where` is how it calls the file."""
    if data.get("format") != "octavo" or data.get("version") != VERSION:
        raise ModelError(f"{where}: format {data.get('format')!r} version {data.get('version')!r} is not "
                         f"octavo version {VERSION}")  # fmt: skip
    if data.get("dtype") not in get_args(Dtype):
        raise ModelError(f"{where}: dtype {data.get('dtype')!r} is not one of {get_args(Dtype)}")
    try:
        ropes = [Rope(tuple(map(float, rope["inv_freq"])), float(rope["scale"])) for rope in data["ropes"]]
        layers = tuple(
            LayerSpec(**{**spec, "rope": None if spec["rope"] is None else ropes[spec["rope"]]})
            for spec in data["config"]["layers"]
        )
        parts = {name: data["config"].get(name) for name in PARTS}
        parts = {name: None if part is None else PARTS[name](**part) for name, part in parts.items()}
        config = ModelConfig(**{**data["config"], "layers": layers, **parts})
        return Manifest(config, data["dtype"], tuple(map(int, data["end_token_ids"])))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{where}: not a model description that this version can read: {error!r}") from error
