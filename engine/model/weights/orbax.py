"""A converted checkpoint: Orbax arrays in our own layout, octavo.json, and the tokenizer's files.

Opening needs no name mapping and no transposes. Imports Orbax: import this module only when one
is at hand (see `weights/__init__.py`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Orbax 0.12 has the v1 interface under this name.
from orbax.checkpoint.experimental import v1 as ocp

from engine.errors import ModelError
from engine.json_file import read_json
from engine.model.config import ModelConfig
from engine.model.families import model_config
from engine.model.packing import Packing
from engine.model.params import param_specs
from engine.model.weights.checkpoint import NO_PACKINGS, Dtype, Put, StoredWeight, T
from engine.model.weights.manifest import MANIFEST, Manifest, manifest_from_dict, manifest_to_dict
from sharding.params import ParamSpec

ARRAYS = "params"  # name of the parameter tree inside the Orbax folder
GROUP_BYTES = 1 << 26  # parameters read in one call; bounds what is in flight beside the largest one
# Files that travel with the weights. config.json is kept because LongRoPE's factors depend on max_model_len.
COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
              "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
              "chat_template.json")  # fmt: skip


@dataclass(frozen=True)
class OrbaxCheckpoint:
    """A checked folder that `save_orbax` wrote; see `Checkpoint`."""

    config: ModelConfig
    source: Path
    dtype: Dtype
    end_token_ids: tuple[int, ...]
    names: tuple[str, ...]  # every array of the folder

    def stored(self, specs: Mapping[str, ParamSpec]) -> dict[str, StoredWeight]:
        return {}

    def load(
        self, specs: Mapping[str, ParamSpec], put: Put[T], packings: Mapping[str, Packing] = NO_PACKINGS
    ) -> dict[str, T]:
        out = {}
        for group in _groups(specs):
            arrays = self._read(group)
            for name in group:
                out[name] = put(name, arrays.pop(name))
        return out

    def _read(self, specs: Mapping[str, ParamSpec]) -> dict[str, np.ndarray]:
        wanted: dict[str, Any] = dict.fromkeys(self.names, ocp.PLACEHOLDER)
        wanted.update({name: np.empty(spec.shape, spec.dtype) for name, spec in specs.items()})
        try:
            loaded: Any = ocp.load(str(self.source.resolve()), wanted, checkpointable_name=ARRAYS)
        except (ValueError, OSError, KeyError) as error:
            raise ModelError(f"{self.source}: cannot read {next(iter(specs))} or its neighbours: {error}") from error
        return {name: loaded[name] for name in specs}


def _groups(specs: Mapping[str, ParamSpec]) -> Iterator[dict[str, ParamSpec]]:
    """Runs of parameters of at most GROUP_BYTES (a larger one goes alone)."""
    group: dict[str, ParamSpec] = {}
    for name, spec in specs.items():
        if group and sum(s.num_bytes for s in group.values()) + spec.num_bytes > GROUP_BYTES:
            yield group
            group = {}
        group[name] = spec
    if group:
        yield group


def open_orbax(folder: Path, max_model_len: int | None = None) -> OrbaxCheckpoint:
    """Check octavo.json and the shapes of the arrays against each other. Raises ModelError."""
    manifest = manifest_from_dict(read_json(folder / MANIFEST), str(folder / MANIFEST))
    config = _with_ropes_of(folder, manifest.config, max_model_len)
    try:
        stored: Any = ocp.metadata(str(folder.resolve()), ARRAYS).metadata
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{folder}: no Orbax arrays under {ARRAYS!r}: {error}") from error
    if not isinstance(stored, dict):  # what Orbax answers for arrays that it cannot open
        raise ModelError(f"{folder}: the Orbax arrays under {ARRAYS!r} are damaged or incomplete")
    specs = param_specs(config, np.dtype(manifest.dtype))
    if set(specs) != set(stored):
        missing, extra = sorted(set(specs) - set(stored)), sorted(set(stored) - set(specs))
        raise ModelError(f"{folder}: parameters do not match {MANIFEST}: missing {missing[:3]}, unexpected {extra[:3]}")
    for name, spec in specs.items():
        if tuple(stored[name].shape) != spec.shape:
            raise ModelError(f"{folder}: {name} has shape {list(stored[name].shape)}, "
                             f"{MANIFEST} needs {list(spec.shape)}")  # fmt: skip
    return OrbaxCheckpoint(config, folder, manifest.dtype, manifest.end_token_ids, tuple(stored))


def _with_ropes_of(folder: Path, config: ModelConfig, max_model_len: int | None) -> ModelConfig:
    """`config` with its ropes made anew for `max_model_len`, where the original config.json is there."""
    if not (folder / "config.json").exists():
        return config
    original = model_config(read_json(folder / "config.json"), max_model_len)
    if dataclasses.replace(config, layers=original.layers) != original:
        raise ModelError(f"{folder}: config.json and {MANIFEST} describe different models")
    return original


def save_orbax(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    end_token_ids: tuple[int, ...] = (),
    source: Path | None = None,
) -> None:
    """Write a checkpoint that `open_orbax` opens. `folder` may hold other files (a tokenizer's).

    params: numpy or JAX arrays as in `param_specs`. The tokenizer's and config files of the folder
    `source` are copied along. octavo.json is written last: without it there is no checkpoint.
    """
    dtype = str(np.dtype(params["embed"].dtype))
    if dtype not in ("bfloat16", "float32"):
        raise ModelError(f"weights of dtype {dtype} cannot be saved; bfloat16 and float32 can")
    for taken in (folder / MANIFEST, folder / ARRAYS):
        if taken.exists():
            raise ModelError(f"{taken} already exists; choose another folder")
    _save_arrays(folder, params)
    if source is not None and source.is_dir():
        for name in COMPANIONS:
            if (source / name).is_file() and not (folder / name).exists():
                shutil.copyfile(source / name, folder / name)
    text = json.dumps(manifest_to_dict(Manifest(config, dtype, end_token_ids)), indent=1)
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(text + "\n", "utf-8")
    partial.replace(folder / MANIFEST)


def _save_arrays(folder: Path, params: Mapping[str, Any]) -> None:
    """Orbax refuses a folder that exists, so it writes next to it and its entries move in."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "saving"
    shutil.rmtree(scratch, ignore_errors=True)
    ocp.save(str(scratch.resolve()), dict(params), checkpointable_name=ARRAYS)
    for entry in scratch.iterdir():
        entry.replace(folder / entry.name)
    scratch.rmdir()
