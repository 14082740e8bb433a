"""Quantized rows of a file as parts of our `Quantized`: the one way from every format to the device.

A file keeps a weight by its output: a row holds K numbers and, for each group of them, a scale and
perhaps an offset. Here rows of several tensors (q, k and v) become the columns of one parameter, in
the one packing that holds them all without loss. Knows no file formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from engine.model.packing import Packing
from engine.model.quantization import packed_shape
from engine.model.weights.checkpoint import StoredWeight
from engine.model.weights.names import Piece
from pallas_kernels.quantized import Quantized, tree_bytes
from sharding.params import ParamSpec

# Of each e2m1 number (OCP microscaling formats, 2023) by its bits, what is an integer.
TWICE_E2M1 = np.asarray([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
BLOCK_ELEMENTS = 1 << 19  # 2 MB of float32: fits a core's cache


@dataclass(frozen=True)
class PackedRows:
    """`count` rows of a tensor, unpacked to a byte a number.

    numbers: uint8 [count, K] from 0 to 15 for int4, else int8 or float8. scales and either offsets,
    which are added to the products, or zeros, which are taken from the numbers: float32 [count,
    groups]. Symmetric int4 (neither of the two) stands for number - 8.
    group_of: int [K], the group of each number where they are not in order (act-order).
    """

    numbers: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None
    zeros: np.ndarray | None = None
    group_of: np.ndarray | None = None

    def float32(self) -> np.ndarray:
        """What they stand for [count, K]: (number - zero) * scale + offset, each operation rounded once."""
        wide = self.numbers.astype(np.float32)
        if self.zeros is not None:
            wide -= self._spread(self.zeros)
        elif self.numbers.dtype == np.uint8 and self.offsets is None:
            wide -= 8
        wide *= self._spread(self.scales)
        if self.offsets is not None:
            wide += self._spread(self.offsets)
        return wide

    def _spread(self, of_groups: np.ndarray) -> np.ndarray:
        """[count, K] of [count, groups]."""
        if self.group_of is not None:
            return of_groups[:, self.group_of]
        return np.repeat(of_groups, self.numbers.shape[1] // of_groups.shape[1], axis=1)

    def leaves(self, packing: Packing) -> list[np.ndarray]:
        """values, scales and, unless symmetric, offsets [count, rows of the leaf], as `packing` keeps them."""
        groups = self.numbers.shape[1] // (packing.group or self.numbers.shape[1])
        repeats = groups // self.scales.shape[1]
        scales, offsets, numbers = self.scales, self.offsets, self.numbers
        if self.zeros is not None:
            offsets = -self.zeros * scales
        if offsets is None and not packing.symmetric:
            offsets = scales * np.float32(-8 if numbers.dtype == np.uint8 and packing.format == "int4" else 0)
        if packing.format == "int4":
            numbers = _nibbles(numbers, groups)
        elif packing.format == "int8" and numbers.dtype == np.uint8:
            numbers = numbers.astype(np.int8) - np.int8(8 if self.offsets is None and self.zeros is None else 0)
        found = [scales] if packing.symmetric else [scales, offsets]
        return [numbers, *(np.repeat(leaf, repeats, axis=1) for leaf in found if leaf is not None)]


def _nibbles(numbers: np.ndarray, groups: int) -> np.ndarray:
    """Bytes [count, K / 2]: of each group, the first half in the low nibbles, the second in the high ones."""
    halves = numbers.reshape(len(numbers), groups, 2, -1)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(len(numbers), -1)


def common(packings: Iterable[Packing], rows: int) -> Packing | str:
    """The packing that holds tensors of these ones, with `rows` numbers a row, or why none does."""
    kinds = list(dict.fromkeys(packings))
    formats, activations = {p.format for p in kinds}, {p.activations for p in kinds}
    if len(activations) > 1 or (len(formats) > 1 and formats != {"int4", "int8"}):
        return f"its parts are stored as {' and '.join(map(str, kinds))}"
    group = math.gcd(*(p.group or rows for p in kinds))
    widest = "int8" if len(formats) > 1 else kinds[0].format
    return Packing(
        format=widest,
        group=None if group == rows else group,
        symmetric=all(p.symmetric for p in kinds),
        activations=kinds[0].activations,
        scale_dtype="bfloat16" if all(p.scale_dtype == "bfloat16" for p in kinds) else "float32",
    )


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized tensor as its format describes it: a packing of ours, or why there is none."""

    kind: str
    num_bytes: int
    packing: Packing | str
    note: str = ""  # what is kept otherwise than the format has it


def stored_weight(spec: ParamSpec, parts: Sequence[QuantizedTensor | None]) -> StoredWeight | None:
    """A parameter of these tensors (None: one that is float); None: nothing of it is quantized."""
    quantized = [part for part in parts if part is not None]
    if not quantized:
        return None
    kind = " and ".join(dict.fromkeys(part.kind for part in quantized))
    weight = StoredWeight(kind, sum(part.num_bytes for part in quantized), None)
    reasons = [part.packing for part in quantized if isinstance(part.packing, str)]
    packings = [part.packing for part in quantized if isinstance(part.packing, Packing)]
    if not spec.packable:
        return replace(weight, reason="only matrices of the layers are kept packed")
    if len(quantized) < len(parts):
        return replace(weight, reason="a part of it is stored as float")
    if reasons:
        return replace(weight, reason=reasons[0])
    found = common(packings, spec.device_shape[-2])
    if isinstance(found, str):
        return replace(weight, reason=found)
    return replace(weight, packing=found, reason=next((part.note for part in quantized if part.note), ""))


def empty(spec: ParamSpec, packing: Packing) -> Quantized:
    """Host arrays for `spec`, [lead, rows, columns] with the spec's own lead and column dimensions."""
    rows = 1 if spec.rows is None else spec.rows
    lead, columns = spec.shape[: spec.lead], spec.shape[spec.lead + rows :]
    return jax.tree.map(
        lambda leaf: np.empty((*lead, leaf.shape[-2], *columns), leaf.dtype), packed_shape(spec, packing)
    )


def fill(target: Quantized, piece: Piece, rows: PackedRows, packing: Packing) -> None:
    """Write a whole stored tensor into its places."""
    for leaf, part in zip(jax.tree.leaves(target), rows.leaves(packing), strict=True):
        piece.fill(leaf, part)


def blocks(piece: Piece, arrays: Sequence[np.ndarray]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """First stored row, and 2-D targets [rows, cols] in each array, of each block; heads are never split or joined."""
    start = 0
    for view in piece.views:
        targets = [view(array) for array in arrays]
        for index in np.ndindex(targets[0].shape[:-2]):
            parts = [target[index] for target in targets]
            step = len(parts[0]) if targets[0].ndim > 2 else max(1, BLOCK_ELEMENTS // parts[0].shape[1])
            for row in range(0, len(parts[0]), step):
                cut = [part[row : row + step] for part in parts]
                yield start, cut
                start += len(cut[0])


def summary(stored: Mapping[str, StoredWeight], packings: Mapping[str, Packing], specs: Mapping[str, Any]) -> list[str]:
    """Lines for the start-up log: what of a quantized checkpoint stays packed, what does not, why and at what cost."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for name, weight in stored.items():
        packing = packings.get(name)
        why = weight.reason if packing or weight.packing is None else "as --quantization says"
        lines.setdefault((weight.kind, str(packing or ""), why), []).append(name)
    return [_line(key, names, stored, packings, specs) for key, names in lines.items()]


def _line(
    key: tuple[str, str, str],
    names: list[str],
    stored: Mapping[str, StoredWeight],
    packings: Mapping[str, Packing],
    specs: Mapping[str, ParamSpec],
) -> str:
    kind, packed, why = key
    in_file = sum(stored[name].num_bytes for name in names)
    shapes = [packed_shape(specs[name], packings.get(name)) for name in names]
    held = tree_bytes(shapes)
    became = f"kept packed as {packed}" if packed else f"made {specs[names[0]].dtype}"
    some = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
    return f"{kind}: {some} {became}{f' ({why})' if why else ''}: {held:,} bytes, {in_file:,} in the files"
