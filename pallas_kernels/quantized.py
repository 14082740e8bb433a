"""A weight kept packed: low-bit numbers with scales, one type for every backend and op.

w[k, n] = values[k, n] * scales[k // group, n] (+ offsets[k // group, n]), group = K / scales.shape[-2].
Offsets go with int4 and int8.
Per-channel weights have one group. int4 stores two nibbles a byte, each group by itself: byte row
j of a group holds row j in its low nibble and row j + group / 2 in its high one, so that a cut
along K at a group's border cuts the bytes too. A nibble is 0 to 15; without offsets it stands for
nibble - 8. A leading dimension, if any, is the expert.

Weights are quantized on the host with numpy, a block of columns at a time, and come back as numpy
arrays: a device sees packed bytes only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

WeightFormat = Literal["int8", "int4", "float8_e4m3fn", "float8_e5m2"]
Activations = Literal["float", "dynamic", "dynamic_32"]
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}  # of a stored 8-bit number
FORMATS = ("int4", *LARGEST)
BLOCK = 32  # numbers of a row that share a scale with dynamic_32
_BLOCK = 1 << 20  # elements of a weight that are float32 at one time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """[..., K, N] in `format`. A pytree of its arrays; format and activations are static.

    activations: "float" multiplies x as it is with the dequantized weight; "dynamic" quantizes each
    row of x to the weight's 8-bit format first, scale from the row's largest magnitude; "dynamic_32"
    quantizes to int8 with a scale for every 32 numbers of a row, as ggml does with its types and
    OpenVINO by default, and is for int4 and int8 weights of any kind.
    """

    values: Array  # int8 or float8 [..., K, N]; int4: uint8 [..., K / 2, N]
    scales: Array  # float32, bfloat16 or float16 [..., K / group, N]
    offsets: Array | None  # like scales; None: symmetric
    format: WeightFormat = field(metadata={"static": True})
    activations: Activations = field(default="float", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        *lead, rows, columns = self.values.shape
        return (*lead, rows * 2 if self.format == "int4" else rows, columns)

    @property
    def group(self) -> int:
        """Rows of the weight that share a scale."""
        return self.shape[-2] // self.scales.shape[-2]


def quantize(
    weight: np.ndarray,
    format: WeightFormat,
    group: int | None = None,
    symmetric: bool = True,
    activations: Activations = "float",
    scale_dtype: DTypeLike = np.float32,
) -> Quantized:
    """A float weight [..., K, N] on the host, packed; its leaves are numpy arrays.

    group: rows that share a scale; None: all of them, one scale a column. The 8-bit scales map the
    largest magnitude to the format's largest number. With offsets (symmetric=False) the integers span
    exactly [least, largest]. Symmetric int4 takes, for each group, the better in squared error of
    largest magnitude / 7 (nothing is cut off) and number of largest magnitude / -8 (uses all 16
    levels; ggml's Q4_0). Scales are rounded to `scale_dtype` before the numbers are.
    """
    abstract = quantized_shape(weight.shape, format, group, symmetric, activations, scale_dtype)
    out = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
    for index in np.ndindex(weight.shape[:-2]):
        for cut in _column_blocks(*weight.shape[-2:]):
            at = (*index, slice(None), cut)
            block = weight[at].astype(np.float32).reshape(out.scales.shape[-2], abstract.group, -1)
            values, scales, offsets = _quantize_block(block, format, symmetric, out.scales.dtype)
            out.values[at] = values
            out.scales[at] = scales
            if out.offsets is not None:
                out.offsets[at] = offsets
    return out


def quantized_shape(
    shape: tuple[int, ...],
    format: WeightFormat,
    group: int | None = None,
    symmetric: bool = True,
    activations: Activations = "float",
    scale_dtype: DTypeLike = np.float32,
) -> Any:
    """What `quantize` returns for a weight of `shape`, as a Quantized of ShapeDtypeStructs.

    ValueError names the numbers that do not fit together.
    """
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"a weight is [..., K, N] and not empty, this one {shape}")
    *lead, rows, columns = shape
    group = rows if group is None else group
    _check(format, rows, group, symmetric, activations, np.dtype(scale_dtype))
    packed = jax.ShapeDtypeStruct((*lead, rows // 2, columns), np.uint8)
    plain = jax.ShapeDtypeStruct((*lead, rows, columns), jnp.dtype("uint8" if format == "int4" else format))
    scales = jax.ShapeDtypeStruct((*lead, rows // group, columns), np.dtype(scale_dtype))
    values: Any = packed if format == "int4" else plain
    stored: Any = scales
    return Quantized(values, stored, None if symmetric else stored, format, activations)


def tree_bytes(tree: Any) -> int:
    """Memory of the arrays (numpy, JAX or abstract) of a weight, packed or not, or of several."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def check_left(x: Any, rows: int) -> None:
    """x [tokens, K] of a product with a weight of so many rows; ValueError names the numbers."""
    if x.shape[1] != rows:
        raise ValueError(f"x has K {x.shape[1]}, the weight {rows}")
    if str(x.dtype) not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"x is {x.dtype}; float32, bfloat16 and float16 are supported")


def check_packed(w: Quantized) -> None:
    """That the parts of a weight fit together; ValueError names the numbers that do not."""
    *lead, rows, columns = w.shape
    *groups_lead, groups, width = w.scales.shape
    if groups_lead != lead or width != columns or rows % groups:
        raise ValueError(f"scales {w.scales.shape} do not divide a weight of {w.shape}")
    if w.offsets is not None and w.offsets.shape != w.scales.shape:
        raise ValueError(f"offsets {w.offsets.shape} must be like scales {w.scales.shape}")
    if w.activations == "dynamic" and (w.format == "int4" or w.offsets is not None):
        raise ValueError(f"dynamic activations need a symmetric 8-bit weight, not {w.format}")
    if w.activations == "dynamic_32":
        _check_blocks(w.format, rows)


def dequantize(weight: Quantized, dtype: DTypeLike = jnp.float32) -> Array:
    """The weight [..., K, N] that it stands for, computed in float32."""
    *lead, rows, columns = weight.shape
    wide = numbers(weight).reshape(*lead, -1, weight.group, columns)
    wide *= jnp.asarray(weight.scales).astype(jnp.float32)[..., None, :]
    if weight.offsets is not None:
        wide += jnp.asarray(weight.offsets).astype(jnp.float32)[..., None, :]
    return wide.reshape(*lead, rows, columns).astype(dtype)


def numbers(weight: Quantized) -> Array:
    """float32 [..., K, N]: what is multiplied with the scales."""
    if weight.format == "int4":
        nibbles = unpack_int4(jnp.asarray(weight.values), weight.group).astype(jnp.float32)
        return nibbles - 8 if weight.offsets is None else nibbles
    if weight.format == "int8":
        return jnp.asarray(weight.values).astype(jnp.float32)
    return _decode_float8(jnp.asarray(weight.values))


def _decode_float8(values: Array) -> Array:
    """float32 of float8, through float16 by its bits.

    Where a CPU converts float8 as such, XLA does it one number at a time and for the whole weight
    ahead of the loop that wants a block of it.
    """
    bits = lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.uint16)
    if values.dtype == jnp.float8_e5m2:
        return lax.bitcast_convert_type(bits << 8, jnp.float16).astype(jnp.float32)
    half = lax.bitcast_convert_type(((bits & 0x80) << 8) | ((bits & 0x7F) << 7), jnp.float16)
    return jnp.where(bits & 0x7F == 0x7F, jnp.nan, half.astype(jnp.float32) * 256)


def as_bits(values: Array) -> Array:
    """float8 as bytes: XLA's CPU backend makes all of a float8 array float16 in order to slice it."""
    is_float8 = values.dtype.name.startswith("float8")
    return lax.bitcast_convert_type(values, jnp.uint8) if is_float8 else values


def pack_int4(nibbles: Any, group: int) -> Any:
    """uint8 [..., K / 2, N] of nibbles uint8 [..., K, N], each 0 to 15; numpy or JAX."""
    *lead, rows, columns = nibbles.shape
    halves = nibbles.reshape(*lead, rows // group, 2, group // 2, columns)
    packed = halves[..., 0, :, :] | (halves[..., 1, :, :] << 4)
    return packed.reshape(*lead, rows // 2, columns)


def unpack_int4(packed: Any, group: int) -> Any:
    """Nibbles uint8 [..., K, N], each 0 to 15, of uint8 [..., K / 2, N]; numpy or JAX."""
    numpy = np if isinstance(packed, np.ndarray) else jnp
    *lead, rows, columns = packed.shape
    halves = packed.reshape(*lead, 2 * rows // group, group // 2, columns)
    nibbles = numpy.stack([halves & 15, halves >> 4], axis=-3)
    return nibbles.reshape(*lead, 2 * rows, columns)


def _check(format: str, rows: int, group: int, symmetric: bool, activations: str, scale_dtype: np.dtype[Any]) -> None:
    if format not in FORMATS:
        raise ValueError(f"weight format {format!r} is none of {', '.join(FORMATS)}")
    if group < 1 or rows % group:
        raise ValueError(f"K {rows} is not a multiple of group {group}")
    if format == "int4" and group % 2:
        raise ValueError(f"int4 packs two rows of a group in a byte, so group {group} must be even")
    if not symmetric and format not in ("int4", "int8"):
        raise ValueError(f"offsets are for int4 and int8, not {format}")
    if activations not in get_args(Activations):
        raise ValueError(f"activations {activations!r} is none of {', '.join(get_args(Activations))}")
    if activations == "dynamic_32":
        _check_blocks(format, rows)
    if activations == "dynamic" and format == "int4":
        raise ValueError("dynamic activations take the weight's 8-bit format; int4 has none")
    if scale_dtype.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"scales in {scale_dtype.name}; float32, bfloat16 and float16 are supported")


def _check_blocks(format: str, rows: int) -> None:
    if format not in ("int4", "int8"):
        raise ValueError(f"dynamic_32 activations are int8, for int4 and int8 weights, not {format}")
    if rows % BLOCK:
        raise ValueError(f"K {rows} is not a multiple of the {BLOCK} activations that share a scale")


def _column_blocks(rows: int, columns: int) -> Iterator[slice]:
    width = max(1, _BLOCK // rows)
    return (slice(start, start + width) for start in range(0, columns, width))


def _quantize_block(
    wide: np.ndarray, format: str, symmetric: bool, dtype: np.dtype[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """values [K or K / 2, n], scales and offsets [groups, n] of float32 [groups, group, n]."""
    if not symmetric:
        return _with_offsets(wide, format, dtype)
    largest, least = wide.max(axis=1), wide.min(axis=1)
    _check_finite(largest, least)
    magnitude = np.maximum(largest, -least)
    if format == "int4":
        return _symmetric_int4(wide, magnitude, np.where(largest >= -least, largest, least), dtype)
    scales = _scales(magnitude / LARGEST[format], dtype)
    limit = LARGEST[format]
    numbers = np.clip(wide / scales.astype(np.float32)[:, None], -limit, limit)
    if format == "int8":
        np.rint(numbers, out=numbers)
    return numbers.astype(jnp.dtype(format)).reshape(-1, wide.shape[-1]), scales, None


def _symmetric_int4(
    wide: np.ndarray, magnitude: np.ndarray, extreme: np.ndarray, dtype: np.dtype[Any]
) -> tuple[np.ndarray, np.ndarray, None]:
    symmetric, full = _scales(magnitude / 7, dtype), _scales(extreme / -8, dtype)
    a, b = (_round_int4(wide, scales) for scales in (symmetric, full))
    better = _squared_error(wide, b, full) < _squared_error(wide, a, symmetric)
    nibbles = (np.where(better[:, None], b, a) + 8).astype(np.uint8)
    return _packed(nibbles), np.where(better, full, symmetric), None


def _round_int4(wide: np.ndarray, scales: np.ndarray) -> np.ndarray:
    numbers = wide / scales.astype(np.float32)[:, None]
    return np.clip(np.rint(numbers, out=numbers), -8, 7, out=numbers)


def _squared_error(wide: np.ndarray, numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    error = numbers * scales.astype(np.float32)[:, None]
    error -= wide
    return np.einsum("gkn,gkn->gn", error, error)


def _with_offsets(wide: np.ndarray, format: str, dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    largest, least = wide.max(axis=1), wide.min(axis=1)
    _check_finite(largest, least)
    low, high = (0, 15) if format == "int4" else (-128, 127)
    offsets = (least - low * ((largest - least) / (high - low))).astype(dtype)
    scales = _scales((largest - offsets.astype(np.float32)) / high, dtype)
    numbers = (wide - offsets.astype(np.float32)[:, None]) / scales.astype(np.float32)[:, None]
    numbers = np.clip(np.rint(numbers), low, high)
    if format == "int8":
        return numbers.astype(np.int8).reshape(-1, wide.shape[-1]), scales, offsets
    return _packed(numbers.astype(np.uint8)), scales, offsets


def _packed(nibbles: np.ndarray) -> np.ndarray:
    groups, group, columns = nibbles.shape
    return pack_int4(nibbles.reshape(groups * group, columns), group)


def _scales(exact: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Rounded to their dtype and never zero, so that a group of zeros divides."""
    smallest = float(jnp.finfo(dtype).tiny)
    rounded = exact.astype(dtype)
    return np.where(np.abs(exact) < smallest, dtype.type(smallest), rounded)


def _check_finite(largest: np.ndarray, least: np.ndarray) -> None:
    finite = np.isfinite(largest) & np.isfinite(least)
    if not finite.all():
        group, column = np.argwhere(~finite)[0]
        raise ValueError(f"the weight has a number that is not finite in group {group}, column {column} of a block")
