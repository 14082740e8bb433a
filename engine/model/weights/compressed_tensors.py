"""Checkpoints of the compressed-tensors library (llm-compressor): packed int4 and int8, plain int8 and float8.

Groups of modules have their own bits and strategy; the tensors show which modules are quantized.
Layouts are those of its `pack-quantized`, `int-quantized` and `float-quantized` compressors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.errors import ModelError
from engine.model.packing import Packing
from engine.model.weights.hf_packed import (
    DYNAMIC_NOTE,
    SCALES,
    Config,
    Read,
    Scheme,
    Shapes,
    act_order,
    fields,
    integer_packing,
    integers,
    spread_blocks,
)
from engine.model.weights.packed import PackedRows
from pallas_kernels.quantized import Activations

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class Group:
    """One of config_groups: what it is for, and how its weights are stored."""

    targets: tuple[str, ...]
    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    group: int | None  # of K: with strategy "group"
    block: tuple[int, int]  # rows and numbers of a row: with "block"
    activations: Activations
    note: str

    def matches(self, stem: str) -> bool:
        return any(
            target == "Linear"
            or (target.startswith("re:") and re.match(target[3:], stem))
            or stem == target
            or stem.endswith(f".{target}")
            for target in self.targets
        )

    def scale_shape(self, rows: int, k: int) -> tuple[int, ...]:
        if self.strategy == "block":
            return -(-rows // self.block[0]), -(-k // self.block[1])
        return (1,) if self.strategy == "tensor" else (rows, k // (self.group or k))


@dataclass(frozen=True)
class CompressedTensors(Scheme):
    groups: tuple[Group, ...]

    def group_of(self, stem: str) -> Group:
        found = next((group for group in self.groups if group.matches(stem)), None)
        if found is None:
            raise ModelError(f"{stem} is quantized, but no target of quantization_config.config_groups names it")
        return found

    def tensors(self, stem: str, rows: int, k: int, dtypes: Mapping[str, str]) -> Shapes | None:
        packed = "weight_packed" in dtypes
        if not packed and dtypes.get("weight") not in ("I8", "F8_E4M3"):
            return None
        group = self.group_of(stem)
        found: Shapes = {"weight_scale": (SCALES, group.scale_shape(rows, k))}
        if packed:
            per_word = 32 // group.bits
            found["weight_packed"] = (("I32",), (rows, -(-k // per_word)))
            zeros = ("I32",), (-(-rows // per_word), found["weight_scale"][1][-1])
            found |= {"weight_shape": (("I64", "I32"), (2,))} if "weight_shape" in dtypes else {}
        else:
            found["weight"] = (("F8_E4M3",) if group.floating else ("I8",), (rows, k))
            zeros = ("I8", "F8_E4M3"), group.scale_shape(rows, k)
        if dtypes.get("weight_zero_point") == "I8":
            zeros = ("I8",), group.scale_shape(rows, k)
        if not group.symmetric or "weight_zero_point" in dtypes:
            found["weight_zero_point"] = zeros
        optional: Shapes = {
            "weight_g_idx": (("I32", "I64"), (k,)),
            "input_scale": (SCALES, (1,)),
            "input_zero_point": (("I8", "F8_E4M3"), (1,)),
        }
        return found | {name: shape for name, shape in optional.items() if name in dtypes}

    def packing(self, stem: str, k: int, dtypes: Mapping[str, str], read: Read) -> tuple[str, Packing | str, str]:
        group = self.group_of(stem)
        kind = f"compressed-tensors {'float' if group.floating else 'int'}{group.bits}"
        if self._order(group, dtypes, read) is not None:
            return kind, "act-order: its groups are not runs of rows", ""
        if not group.floating and group.strategy != "block":
            size, symmetric = group.group, group.symmetric
            found = integer_packing(group.bits, size, k, symmetric, dtypes["weight_scale"], group.activations)
            return kind, found, group.note
        size = math.gcd(k, group.block[1]) if group.strategy == "block" else group.group or k
        if k % size:
            return kind, f"{k} numbers a row do not divide into groups of {size}", ""
        form = "float8_e4m3fn" if group.floating else "int8"
        return kind, Packing(form, None if size == k else size, activations=group.activations), group.note

    def _order(self, group: Group, dtypes: Mapping[str, str], read: Read) -> np.ndarray | None:
        return act_order(read("weight_g_idx"), group.group) if "weight_g_idx" in dtypes and group.group else None

    def read(self, stem: str, k: int, dtypes: Mapping[str, str], read: Read) -> PackedRows:
        group = self.group_of(stem)
        if "weight_packed" in dtypes:
            packed = read("weight_packed")
            numbers = fields(packed, group.bits).reshape(len(packed), -1)[:, :k]
        else:
            stored = read("weight")
            numbers = stored if group.floating else stored.view(np.uint8) ^ np.uint8(128)
        scales = self._spread(group, read("weight_scale").astype(np.float32), numbers)
        if group.floating:
            return PackedRows(numbers, scales)
        zeros = None if group.symmetric else self._zeros(group, dtypes, read, numbers)
        bits = group.bits if "weight_packed" in dtypes else 8
        found = integers(numbers, zeros, scales, bits)
        return replace(found, group_of=self._order(group, dtypes, read))

    def _zeros(self, group: Group, dtypes: Mapping[str, str], read: Read, numbers: np.ndarray) -> np.ndarray:
        """[out, groups], counted as the unsigned numbers are."""
        stored = read("weight_zero_point")
        if stored.dtype == np.int32:  # packed along the outputs
            zeros = np.moveaxis(fields(stored, group.bits), 2, 1).reshape(-1, stored.shape[1])[: len(numbers)]
            return zeros.astype(np.int32)
        half = 2 ** (group.bits - 1) if "weight_packed" in dtypes else 128
        return self._spread(group, stored.astype(np.int32) + half, numbers)

    def _spread(self, group: Group, stored: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """[out, groups] of what is stored once a tensor, a row, a group or a block."""
        if group.strategy == "tensor":
            return np.broadcast_to(stored.reshape(1, 1), (len(numbers), 1))
        return spread_blocks(stored, group.block, *numbers.shape) if group.strategy == "block" else stored


def compressed_tensors(keys: Config) -> CompressedTensors:
    keys.ignore("ignore", "quantization_status", "global_compression_ratio", "version")
    keys.choice("format", FORMATS)
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if keys.value(key) not in (None, {}):
            raise keys.wrong(key, "is not supported")
    groups = keys.inner("config_groups")
    if groups is None or not groups.names:
        raise keys.wrong("config_groups", "must name at least one group")
    found = []
    for name in groups.names:
        inner = groups.inner(name)
        if inner is None:
            raise groups.wrong(name, "must be an object")
        found.append(_group(inner))
    groups.finish()
    return CompressedTensors(tuple(found))


def _group(keys: Config) -> Group:
    keys.choice("format", FORMATS, FORMATS[0])
    targets, weights = keys.value("targets", ["Linear"]), keys.inner("weights")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise keys.wrong("targets", "must be a list of names")
    if weights is None:
        raise keys.wrong("weights", "must be an object")
    if keys.value("output_activations") is not None:
        raise keys.wrong("output_activations", "is not supported")
    weights.ignore("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "is_mse")
    weights.choice("dynamic", (False,), False)
    weights.choice("actorder", ("group", "weight", "static", "dynamic"), "weight")
    floating = weights.choice("type", ("int", "float"), "int") == "float"
    bits = weights.choice("num_bits", (8,) if floating else (4, 8))
    symmetric = weights.choice("symmetric", (True,) if floating else (False, True), True)
    group = weights.group("group_size")
    strategy = weights.choice("strategy", STRATEGIES, "group" if group else "channel")
    activations, note = _activations(keys.inner("input_activations"), bits, floating, symmetric, strategy)
    found = Group(
        targets=tuple(targets),
        bits=bits,
        floating=floating,
        symmetric=symmetric,
        strategy=strategy,
        group=group if strategy == "group" else None,
        block=weights.pair("block_structure", [128, 128]) or (128, 128),
        activations=activations,
        note=note,
    )
    if strategy == "block" and not symmetric:
        raise weights.wrong("symmetric", "is not supported with blocks")
    weights.finish()
    keys.finish()
    return found


def _activations(
    keys: Config | None, bits: int, floating: bool, symmetric: bool, strategy: str
) -> tuple[Activations, str]:
    """Ours, and what differs from the format's."""
    if keys is None:
        return "float", ""
    keys.ignore("observer", "observer_kwargs", "group_size", "block_structure", "actorder", "scale_dtype", "zp_dtype")
    ours: tuple[Any, ...] = (keys.value("num_bits"), keys.value("type", "int"))
    dynamic, once = keys.flag("dynamic"), keys.choice("strategy", ("tensor", "token", "group", "tensor_group"), "token")
    even = keys.flag("symmetric", True)
    keys.finish()
    if ours != (bits, "float" if floating else "int") or bits != 8 or not symmetric or strategy == "block":
        return "float", f"activations are not rounded to {ours[1]}{ours[0]}"
    if not dynamic:
        return "dynamic", DYNAMIC_NOTE
    if once != "token" or not even:
        return "dynamic", "activations have one symmetric scale a row"
    return "dynamic", ""
