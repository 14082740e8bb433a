"""quantized_matmul on a TPU (Mosaic): the weight crosses HBM packed and becomes wide in VMEM, in parts.

Grid (tokens / bm, N / bn, K / bk), K innermost into an accumulator. The last blocks of tokens and N
may hang over the edge: what they compute is not stored. bk divides K. Within a block `step` rows at a
time become x's dtype and are multiplied, so the wide copy stays small.

int4: one bitcast makes [rows / 2] bytes [rows] signed nibbles, byte j's two in rows 2j and 2j + 1; x's
columns are put in that order outside. On v5e and v6e this takes the fewest bundles of the ways tried
(shifts and masks in int32 or uint8), by libtpu's own listing of the compiled kernel.

Scales. One a column: applied to the finished sum. Symmetric groups that are at least twice bm: applied
to each group's sum, at most one multiplication and addition a weight. Otherwise: applied in float32 to
the weights, before they are rounded to x's dtype.

Dynamic activations: x comes quantized. Where the MXU has the format, 8-bit numbers meet; elsewhere
they meet as bfloat16, which holds them exactly.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.choice import not_on
from pallas_kernels.packed_tpu import interleave_halves, multiplies, read_numbers, vmem_limit
from pallas_kernels.quantized import Quantized
from pallas_kernels.quantized_matmul.reference import quantize_rows
from pallas_kernels.target import Target
from pallas_kernels.tuning import lookup

if TYPE_CHECKING:
    from pallas_kernels.quantized_matmul.api import MatmulSpec

_LANES = 128
_SMALL_TOKENS = 64  # up to here x stays whole in VMEM, and reading the weight is what takes the time
_FEWEST_BLOCKS = 8  # of a weight, so that the copy of the first is a small part of all
_STEP = 512  # rows that are wide at one time
_MOST_ROWS = 32768  # of K, where a block must span all of them


@dataclass(frozen=True)
class Blocks:
    """Sizes of one grid step."""

    bm: int
    bn: int
    bk: int


def declines(spec: MatmulSpec, target: Target) -> str | None:
    reason = not_on("tpu", target)
    if reason is not None:
        return reason
    if spec.dtype not in ("float32", "bfloat16"):
        return f"x is {spec.dtype}; bfloat16 and float32 are served"
    if spec.activations == "dynamic_32":
        return "activations with a scale for every 32"
    if spec.scale_dtype not in ("float32", "bfloat16"):
        return f"scales are {spec.scale_dtype}; float32 and bfloat16 are served"
    if spec.k % 64:
        return f"K {spec.k} is not a multiple of 64"
    rows = 32 if spec.format == "int4" else 16
    if spec.group != spec.k and spec.group % rows:
        return f"group {spec.group} is not a multiple of {rows}"
    if spec.k % _unit(spec.k, spec.group) and spec.k > _MOST_ROWS:
        return f"K {spec.k} is over {_MOST_ROWS} and not a multiple of {_unit(spec.k, spec.group)}"
    return None


def run(x: Array, w: Quantized, *, target: Target, dtype: np.dtype) -> Array:
    """x [tokens, K] @ w [K, N] -> [tokens, N] in dtype; see `api.quantized_matmul`."""
    (tokens, k), n = x.shape, w.shape[1]
    b = _blocks(tokens, w, target)
    left, row_scales = quantize_rows(x, w.format) if w.activations == "dynamic" else (x, None)
    if row_scales is not None and not _meet_packed(b.bm, w, target):
        left = left.astype(jnp.bfloat16)
    if w.format == "int4":
        left = interleave_halves(left, w.group)
    groups, steps = w.scales.shape[0], k // b.bk
    packing = 2 if w.format == "int4" else 1
    scale_rows = groups // steps if groups > 1 else 1
    column = pl.BlockSpec((scale_rows, b.bn), lambda i, j, s: (s if groups > 1 else 0, j))
    resident = tokens <= _SMALL_TOKENS
    in_specs = [
        pl.BlockSpec((b.bm, k if resident else b.bk), lambda i, j, s: (i, 0 if resident else s)),
        pl.BlockSpec((b.bk // packing, b.bn), lambda i, j, s: (s, j)),
        column,
    ]
    inputs: list[Array] = [left, w.values, w.scales]
    if w.offsets is not None:
        in_specs.append(column)
        inputs.append(w.offsets)
    if row_scales is not None:
        in_specs.append(pl.BlockSpec((b.bm, 1), lambda i, j, s: (i, 0)))
        inputs.append(row_scales)
    integers = left.dtype == jnp.int8 and groups == 1
    return pl.pallas_call(
        functools.partial(_kernel, w=_static(w), bk=b.bk),
        out_shape=jax.ShapeDtypeStruct((tokens, n), dtype),
        grid=(pl.cdiv(tokens, b.bm), pl.cdiv(n, b.bn), steps),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((b.bm, b.bn), lambda i, j, s: (i, j)),
        scratch_shapes=[pltpu.VMEM((b.bm, b.bn), jnp.int32 if integers else jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit(target)
        ),
        interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan") if target.interpret else False,
        name="quantized_matmul",
    )(*inputs)


def key(tokens: int, k: int, n: int, w: Quantized) -> str:
    """Of a tuned choice: tokens rounded up to a power of two, the weight's shape, format and group."""
    group = w.group if w.scales.shape[0] > 1 else 0
    return f"{1 << (tokens - 1).bit_length()}x{k}x{n} {w.format} {group} {w.activations}"


def _blocks(tokens: int, w: Quantized, target: Target) -> Blocks:
    k, n = w.shape
    tuned = lookup("quantized_matmul", target.chip, key(tokens, k, n, w))
    if tuned:
        return Blocks(min(tokens, tuned["bm"]), min(n, tuned["bn"]), min(k, tuned["bk"]))
    return computed_blocks(tokens, w, target)


def computed_blocks(tokens: int, w: Quantized, target: Target) -> Blocks:
    """What serves where nobody measured.

    Few tokens: copying a packed block takes about 2 us of the chip's bandwidth, since a grid step costs
    some tenths of one, but a block is at most an eighth of the weight and 4 MiB, at least 256 KiB. Many
    tokens: 512 rows meet blocks of 1 Mi weights. bn is a multiple of 256 (or all of N), bk the
    largest divisor of K that fits and cuts the scales at multiples of 8 rows (or all of K).
    """
    k, n = w.shape
    if tokens <= _SMALL_TOKENS:
        packing = 2 if w.format == "int4" else 1
        copied = int(2e-6 * target.facts.memory_bytes_per_s) if target.facts else 1 << 20
        weights = packing * max(1 << 18, min(copied, k * n // packing // _FEWEST_BLOCKS, 4 << 20))
    else:
        weights = 1 << 20
    unit = _unit(k, w.group)
    bk = k if k % unit else max(d for d in range(unit, max(unit, min(k, 4096)) + 1, unit) if k % d == 0)
    columns = max(256, weights // bk // 256 * 256)
    return Blocks(min(tokens, 512), min(n, columns), bk)


def _unit(k: int, group: int) -> int:
    """K is cut at multiples of whole lanes of x and of 8 rows of scales, which are a tile."""
    return _LANES if group == k else max(_LANES, 8 * group)


def _scales_sums(bm: int, groups: int, group: int, offsets: bool) -> bool:
    """Whether a group's sum is scaled and not its weights. 8-bit rows are read 32 at a time."""
    return groups > 1 and not offsets and 2 * bm <= group and group % 32 == 0


def _meet_packed(bm: int, w: Quantized, target: Target) -> bool:
    """Whether 8-bit x meets the 8-bit weight as it is."""
    groups = w.scales.shape[0]
    return multiplies(w.format, target) and (groups == 1 or _scales_sums(bm, groups, w.group, False))


@dataclass(frozen=True)
class _Static:
    """What the kernel knows of the weight."""

    format: str
    groups: int
    group: int
    offsets: bool


def _static(w: Quantized) -> _Static:
    return _Static(w.format, w.scales.shape[0], w.group, w.offsets is not None)


def _kernel(x_ref: Any, values_ref: Any, scales_ref: Any, *rest: Any, w: _Static, bk: int) -> None:
    """One grid step.

    rest: offsets like scales if any, row scales [bm, 1] if dynamic, out [bm, bn], accumulator [bm, bn].
    """
    *extra, out_ref, acc_ref = rest
    offsets_ref = extra.pop(0) if w.offsets else None
    index = pl.program_id(2)

    @pl.when(index == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    per_channel = w.groups == 1 and not w.offsets
    at_sums = _scales_sums(x_ref.shape[0], w.groups, w.group, w.offsets)
    step = w.group if at_sums else _step(bk, w)
    # A whole x in VMEM is indexed by the block, a cut one starts with it.
    base = 0 if x_ref.shape[1] == bk else pl.multiple_of(index * bk, _LANES)
    scales = scales_ref[...].astype(jnp.float32)
    offsets = offsets_ref[...].astype(jnp.float32) if offsets_ref is not None else None
    total = None
    for start in range(0, bk, step):
        left = _columns(x_ref, base, start, step, bk)
        right = read_numbers(values_ref, start, step, w.format)
        if not per_channel and not at_sums:
            right = _scaled(right, scales, offsets, start, w)
        part = _dot(left, right)
        if at_sums:
            part = part.astype(jnp.float32) * scales[start // w.group : start // w.group + 1]
        total = part if total is None else total + part
    acc_ref[...] += total

    @pl.when(index == pl.num_programs(2) - 1)
    def _() -> None:
        out = acc_ref[...].astype(jnp.float32)
        if per_channel:
            out *= scales
        if extra:
            out *= extra[0][...]
        out_ref[...] = out.astype(out_ref.dtype)


def _step(bk: int, w: _Static) -> int:
    """Rows made wide at once: a divisor of bk of whole groups (or within one), near _STEP; all where none is."""
    unit = _LANES if w.groups == 1 else math.lcm(w.group, _LANES)
    return max((d for d in range(unit, _STEP + 1, unit) if bk % d == 0), default=bk if bk % unit else unit)


def _columns(x_ref: Any, base: Any, start: int, step: int, bk: int) -> Array:
    """x's columns for the step. What is read starts at a whole lane tile, as Mosaic must be able to prove."""
    first, last = start // _LANES * _LANES, min(bk, -(-(start + step) // _LANES) * _LANES)
    return x_ref[:, pl.ds(base + first, last - first)][:, start - first : start - first + step]


def _scaled(numbers: Array, scales: Array, offsets: Array | None, start: int, w: _Static) -> Array:
    """float32 [step, bn] weights; the step is whole groups or lies within one."""
    rows, columns = numbers.shape
    wide = numbers.astype(jnp.float32)
    count = max(1, rows // w.group)
    at = slice(start // w.group, start // w.group + count)
    wide = wide.reshape(count, rows // count, columns)
    if offsets is not None and w.format == "int4":
        wide += 8
    wide *= scales[at][:, None]
    if offsets is not None:
        wide += offsets[at][:, None]
    return wide.reshape(rows, columns)


def _dot(left: Array, right: Array) -> Array:
    """[bm, bn] in float32; int32 where both are int8."""
    if left.dtype == jnp.int8:
        return _product(left, right, jnp.int32)
    return _product(left, right.astype(left.dtype), jnp.float32)


def _product(left: Array, right: Array, dtype: Any) -> Array:
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((1,), (0,)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=dtype)
