"""grouped_matmul on a TPU (Mosaic): only the weights of experts with rows cross HBM, and packed.

Grid (N / bn, visits, K / bk); the number of visits is the call's own. Where bk is all of K,
consecutive visits of one expert find its block of the weight in VMEM, a packed one already made
wide. Of a tile only the bands of rows that touch the expert's are multiplied. The work list follows
JAX's megablox gmm (Apache-2.0); docs/kernels/grouped_matmul.md says how this differs from it.

int4: x's columns are put in the order in which one bitcast gives the nibbles, as in quantized_matmul.
Scales. One a column: applied to the finished sum. More: to the weights in float32, before they are
rounded to x's dtype. Dynamic activations: x comes quantized; where the MXU has the format, 8-bit
numbers meet, elsewhere bfloat16, which holds them exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.choice import not_on
from pallas_kernels.grouped_matmul.scales import declines_scales
from pallas_kernels.grouped_matmul.visits import visits
from pallas_kernels.packed_tpu import interleave_halves, multiplies, read_numbers, vmem_limit
from pallas_kernels.quantized import Quantized
from pallas_kernels.quantized_matmul.reference import quantize_rows
from pallas_kernels.target import Target
from pallas_kernels.tuning import lookup

if TYPE_CHECKING:
    from pallas_kernels.grouped_matmul.api import GroupedSpec

_LANES = 128
_BAND = 128  # rows multiplied at once
_STEP = 512  # rows of the weight multiplied, or made wide, at once
_WHOLE_K = 4096
_COPY_S = 4e-6


@dataclass(frozen=True)
class Blocks:
    """Of a grid step: rows of x, columns, and rows of the weight."""

    bm: int
    bn: int
    bk: int


def declines(spec: GroupedSpec, target: Target) -> str | None:
    """Why this kernel does not serve a call; None: it does."""
    reason = not_on("tpu", target)
    if reason is not None:
        return reason
    if spec.dtype not in ("float32", "bfloat16"):
        return f"x is {spec.dtype}; bfloat16 and float32 are served"
    if spec.k % 64:
        return f"K {spec.k} is not a multiple of 64"
    if spec.k % _LANES and spec.k > _WHOLE_K:
        return f"K {spec.k} is over {_WHOLE_K} and not a multiple of {_LANES}"
    if spec.n % 64 or spec.n < _LANES:  # the last block may be half there
        return f"N {spec.n} is not a multiple of 64 from {_LANES} on"
    return _declines_packed(spec) if spec.format != "none" else None


def _declines_packed(spec: GroupedSpec) -> str | None:
    reason = declines_scales(spec)
    if reason is None and spec.k > _WHOLE_K and spec.k % _unit(spec.k, spec.group):
        return f"K {spec.k} is over {_WHOLE_K} and not a multiple of 8 groups of {spec.group}"
    return reason


def run(x: Array, w: Array | Quantized, group_sizes: Array, *, target: Target) -> Array:
    """x [tokens, K] by w [experts, K, N] -> [tokens, N]; see `api.grouped_matmul`. Rows of nobody are zeros."""
    (tokens, k), (_, _, n) = x.shape, w.shape
    b = blocks(tokens, w, target)
    plan = visits(group_sizes, tokens, b.bm)
    left, row_scales = _left(x, w, target)
    kernel = _kernel(b, k // b.bk, w, left.dtype)
    # Index maps take the grid's (columns, visit, step of K) and the plan: expert, tile, start, end, nobodys.
    x_tile = pl.BlockSpec((b.bm, b.bk), lambda j, v, s, expert, tile, *_: (tile[v], s))
    rows = pl.BlockSpec((b.bm, 1), lambda j, v, s, expert, tile, *_: (tile[v], 0))
    leaves = jax.tree.leaves(w)  # values, scales, offsets
    return pl.pallas_call(
        kernel.step,
        out_shape=jax.ShapeDtypeStruct((tokens, n), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(n, b.bn), plan.count[0], kernel.steps),
            in_specs=[
                x_tile,
                *(_weight_block(leaf, kernel) for leaf in leaves),
                *([] if row_scales is None else [rows]),
            ],
            out_specs=pl.BlockSpec((b.bm, b.bn), lambda j, v, s, expert, tile, *_: (tile[v], j)),
            scratch_shapes=kernel.scratch(),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit(target)
        ),
        interpret=pltpu.InterpretParams(detect_races=True) if target.interpret else False,
        name="grouped_matmul",
    )(
        *(plan.expert, plan.row // b.bm, plan.start, plan.end, plan.nobodys),
        *(left, *leaves, *([] if row_scales is None else [row_scales])),
    )


def _left(x: Array, w: Array | Quantized, target: Target) -> tuple[Array, Array | None]:
    """x as it is multiplied, and the scales of its rows, float32 [tokens, 1], where those are quantized."""
    if not isinstance(w, Quantized) or w.activations == "float":
        return (interleave_halves(x, w.group) if isinstance(w, Quantized) and w.format == "int4" else x), None
    numbers, row_scales = quantize_rows(x, w.format)
    return (numbers if multiplies(w.format, target) else numbers.astype(jnp.bfloat16)), row_scales


def _weight_block(leaf: Array, kernel: _Kernel) -> pl.BlockSpec:
    """A step's rows of the values, or of the scales and offsets that go with them."""
    steps = kernel.steps if leaf.shape[1] > 1 else 1

    def index(j: Any, v: Any, s: Any, expert: Any, tile: Any, start: Any, end: Any, nobodys: Any) -> Any:
        # Rows of nobody come last; their visits leave the block that is there.
        return expert[v], jnp.where(nobodys[v] == 1, steps - 1, s) if steps > 1 else 0, j

    return pl.BlockSpec((None, leaf.shape[1] // steps, kernel.blocks.bn), index)


def blocks(tokens: int, w: Array | Quantized, target: Target) -> Blocks:
    """Tuned, or computed where nobody measured.

    Rows: 128 up to 512 tokens, then 256, and 512 where an expert has that many. A block of the weight is what
    the chip copies in 4 us, 512 Ki to 4 Mi numbers (2 Mi in float32). bk is K up to 4096, otherwise the largest
    divisor up to there that cuts x at whole lanes and the scales at multiples of 8 rows.
    """
    experts, k, n = w.shape
    tuned = lookup("grouped_matmul", target.chip, key(tokens, w))
    if tuned:
        return Blocks(min(tokens, tuned["bm"]), min(n, tuned["bn"]), min(k, tuned["bk"]))
    bm = 128 if tokens <= 512 else 256 if tokens < 512 * experts else 512
    bits = 4 if isinstance(w, Quantized) and w.format == "int4" else 8 * jax.tree.leaves(w)[0].dtype.itemsize
    copied = int(_COPY_S * target.facts.memory_bytes_per_s) * 8 // bits if target.facts else 1 << 20
    numbers = max(1 << 19, min(copied, 1 << (21 if bits == 32 else 22)))
    unit = _unit(k, w.group if isinstance(w, Quantized) else k)
    bk = k if k <= _WHOLE_K else max(d for d in range(unit, max(unit, _WHOLE_K) + 1, unit) if k % d == 0)
    parts = -(-n // max(_LANES, numbers // bk))
    bn = -(-n // parts // _LANES) * _LANES
    return Blocks(min(tokens, bm), bn, bk)


def key(tokens: int, w: Array | Quantized) -> str:
    """Of a tuned choice: tokens rounded up to a power of two, the weight's shape, format and group."""
    experts, k, n = w.shape
    form = f"{w.format} {w.group} {w.activations}" if isinstance(w, Quantized) else str(w.dtype)
    return f"{1 << (tokens - 1).bit_length()}x{k}x{n} of {experts} {form}"


def _unit(k: int, group: int) -> int:
    return _LANES if group == k else max(_LANES, math.lcm(8 * group, _LANES))


@dataclass(frozen=True)
class _Kernel:
    """What a grid step knows when it is traced."""

    blocks: Blocks
    steps: int  # of K
    dtype: Any  # of x as it is multiplied
    format: str  # "none": the weight is x's dtype
    groups: int  # in a block of the weight
    scaled: bool  # the finished sum is, by one scale a column
    offsets: bool
    dynamic: bool

    @property
    def widens(self) -> bool:
        """Whether the block is made x's dtype before it is multiplied."""
        return self.format not in ("none", jnp.dtype(self.dtype).name)

    @property
    def accumulates_in(self) -> Any:
        return jnp.int32 if self.dtype == jnp.int8 else jnp.float32

    def scratch(self) -> list[Any]:
        """The sums, where K has several steps, and the wide block."""
        b = self.blocks
        sums = [pltpu.VMEM((b.bm, b.bn), self.accumulates_in)] if self.steps > 1 else []
        return sums + ([pltpu.VMEM((b.bk, b.bn), self.dtype)] if self.widens else [])

    def step(self, *refs: Any) -> None:
        """One block of the weight by one tile of x."""
        (expert, tile, start, end, nobodys), (x, *rest) = refs[:5], refs[5:]
        values, *rest = rest
        scales = rest.pop(0) if self.format != "none" else None
        offsets = rest.pop(0) if self.offsets else None
        row_scales = rest.pop(0) if self.dynamic else None
        out, *scratch = rest
        wide = scratch.pop() if self.widens else values
        visit, part_of_k = pl.program_id(1), pl.program_id(2)
        mine = nobodys[visit] == 0
        top = tile[visit] * self.blocks.bm
        first, last = start[visit] - top, end[visit] - top
        band = min(_BAND, self.blocks.bm)

        if self.widens:
            known = (self.steps == 1) & (visit > 0) & (expert[visit] == expert[jnp.maximum(visit - 1, 0)])

            @pl.when(mine & ~known)
            def _() -> None:
                self.widen(values, scales, offsets, wide)

        def rows_of(index: Any) -> Any:
            return pl.ds(0 if band == self.blocks.bm else pl.multiple_of(index * band, band), band)

        def multiply(index: Any, _: None) -> None:
            at = rows_of(index)
            total = self.product(x, at, wide)
            if self.steps > 1:
                total += jnp.where(part_of_k == 0, 0, scratch[0][at, :])
                scratch[0][at, :] = total

            @pl.when(part_of_k == self.steps - 1)
            def _() -> None:
                result = total.astype(jnp.float32)
                if scales is not None and self.scaled:
                    result *= scales[...].astype(jnp.float32)
                if row_scales is not None:
                    result *= row_scales[at, :]
                store(at, index, result.astype(out.dtype))

        def store(at: Any, index: Any, result: Array) -> None:
            rows = lax.broadcasted_iota(jnp.int32, result.shape, 0) + index * band
            out[at, :] = jnp.where((rows >= first) & (rows < last), result, out[at, :])

        def clear(index: Any, _: None) -> None:
            at = rows_of(index)
            store(at, index, jnp.zeros((band, self.blocks.bn), out.dtype))

        bands = (lax.div(first, band), lax.div(last + band - 1, band))
        pl.when(mine)(lambda: lax.fori_loop(*bands, multiply, None))
        pl.when(~mine)(lambda: lax.fori_loop(*bands, clear, None))

    def widen(self, values: Any, scales: Any, offsets: Any, wide: Any) -> None:
        """The packed block in x's dtype, some rows at a time; scaled unless the sum will be."""
        bk = self.blocks.bk
        group = bk // self.groups
        unit = 64 if self.scaled else math.lcm(group, 64)
        piece = unit * max(1, _STEP // unit)
        factors = None if self.scaled else scales[...].astype(jnp.float32)
        terms = None if offsets is None else offsets[...].astype(jnp.float32)
        for start in range(0, bk, piece):
            rows = min(piece, bk - start)
            numbers = read_numbers(values, start, rows, self.format)
            if factors is not None:
                count, at = rows // group, slice(start // group, (start + rows) // group)
                parts = numbers.astype(jnp.float32).reshape(count, group, -1)
                parts = parts if terms is None or self.format != "int4" else parts + 8
                parts *= factors[at][:, None]
                parts = parts if terms is None else parts + terms[at][:, None]
                numbers = parts.reshape(rows, -1)
            wide[pl.ds(start, rows), :] = numbers.astype(self.dtype)

    def product(self, x: Any, at: Any, wide: Any) -> Array:
        """[band, bn] of a band of x and the block of the weight."""
        precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        total = None
        for start in range(0, self.blocks.bk, _STEP):
            rows = pl.ds(start, min(_STEP, self.blocks.bk - start))
            part = lax.dot_general(
                x[at, rows],
                wide[rows, :],
                (((1,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=self.accumulates_in,
            )
            total = part if total is None else total + part
        return total if total is not None else jnp.zeros((0, 0))


def _kernel(blocks: Blocks, steps: int, w: Array | Quantized, dtype: Any) -> _Kernel:
    if not isinstance(w, Quantized):
        return _Kernel(blocks, steps, dtype, "none", 1, False, False, False)
    groups = w.scales.shape[1]
    return _Kernel(
        blocks=blocks,
        steps=steps,
        dtype=dtype,
        format=w.format,
        groups=groups // steps if groups > 1 else 1,
        scaled=groups == 1 and w.offsets is None,
        offsets=w.offsets is not None,
        dynamic=w.activations == "dynamic",
    )
