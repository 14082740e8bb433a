"""Cases of the kernel ops as calls on the device at hand: inputs, float32 answer, bytes and FLOPs that must move.

Every op's case table becomes a list of `Work`; nothing here measures. Inputs are made on the device.
What nobody may read is NaN where the dtype has one: the trash page of a pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels import grouped_matmul as grouped
from pallas_kernels import kv_write
from pallas_kernels import paged_attention as attention
from pallas_kernels import quantized_matmul as quantized
from pallas_kernels.choice import Choice
from pallas_kernels.grouped_matmul import api as grouped_api
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.kv_layout import pack_rows
from pallas_kernels.kv_write import api as write_api
from pallas_kernels.kv_write import cases as write_cases
from pallas_kernels.kv_write import reference as write_reference
from pallas_kernels.paged_attention import api as attention_api
from pallas_kernels.paged_attention import cases as attention_cases
from pallas_kernels.paged_attention import reference as attention_reference
from pallas_kernels.quantized import Quantized, dequantize, quantized_shape, tree_bytes
from pallas_kernels.quantized_matmul import api as quantized_api
from pallas_kernels.quantized_matmul import cases as quantized_cases
from pallas_kernels.quantized_matmul.reference import quantize_rows
from pallas_kernels.target import Target

OPS = ("paged_attention", "grouped_matmul", "quantized_matmul", "kv_write")
TOLERANCE = {"float32": 2e-5, "bfloat16": 8e-3}  # |error| of a row (of attention: a head) over its norm


@dataclass(frozen=True)
class Work:
    """One case. Calls take (*moving, *fixed): what a step brings, then pages or weights."""

    op: str  # a folder of pallas_kernels
    case: Any
    names: tuple[str, ...]  # of the choices that `Target.implementations` may force
    choice: Callable[[Target], Choice[Any]]
    call: Callable[..., Array]  # of inputs and target=
    make: Callable[[], tuple[tuple[Any, ...], tuple[Any, ...]]]  # moving, fixed
    answer: Callable[..., Array]  # float32, of the same inputs
    heads: bool  # the last dimension of a result is one head's
    owned: int  # rows of the result that belong to somebody, from the first on
    bytes: int  # read and written once each
    flops: float
    carried: bool = False  # the result is the fixed input, written in place; it is compared byte by byte

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def tolerance(self) -> float:
        return 0.0 if self.carried else TOLERANCE[self.case.dtype]

    def forced(self, target: Target, implementation: str) -> Target:
        return replace(target, implementations=tuple((name, implementation) for name in self.names))


def all_work(op: str, target: Target, small: bool, words: Sequence[str] = ()) -> list[Work]:
    """The op's cases, REAL or SMALL, whose names hold one of `words` if any; the models that the goals name first."""
    works = _works(op, target, small)
    return [work for work in works if not words or any(word in work.name for word in words)]


def _works(op: str, target: Target, small: bool) -> list[Work]:
    platform = target.platform
    if op == "paged_attention":
        chosen = attention_cases.CASES if small else attention_cases.REAL
        return [attention_work(case, target) for case in _goals_first(chosen, "llama8b")]
    if op == "grouped_matmul":
        chosen = grouped_cases.SMALL if small else grouped_cases.REAL
        return [grouped_work(case) for case in _goals_first(chosen, "qwen3")]
    if op == "quantized_matmul":
        chosen = quantized_cases.SMALL if small else quantized_cases.REAL
        return [quantized_work(case) for case in _goals_first(chosen, "llama_8b")]
    if op == "kv_write":
        return [write_work(case, target) for case in (write_cases.SMALL if small else write_cases.REAL)]
    raise ValueError(f"no op {op!r} for {platform}; there are {', '.join(OPS)}")


def _goals_first(cases: Any, model: str) -> list[Any]:
    return sorted(cases, key=lambda case: not case.name.startswith(model))


def error(work: Work, got: Array, wanted: Array) -> float:
    """Worst owned row (of attention: head of a token): |got - wanted| / |wanted|; NaN where one is.

    Of what is written in place: the share of bytes that differ, the trash page's left out.
    """
    if work.carried:
        return float(jnp.mean(_as_bytes(got[1:]) != _as_bytes(wanted[1:])))
    got, wanted = (a[: work.owned].astype(jnp.float32) for a in (got, wanted))
    if not wanted.size:
        return 0.0
    width = wanted.shape[-1] if work.heads else math.prod(wanted.shape[1:])
    got, wanted = got.reshape(-1, width), wanted.reshape(-1, width)
    norms = jnp.linalg.norm(wanted, axis=1)
    errors = jnp.linalg.norm(got - wanted, axis=1) / jnp.where(norms > 0, norms, 1)
    # Rows of attention that are idle have no answer.
    return float(jnp.max(jnp.where(norms > 0, errors, 0)))


def _as_bytes(pages: Array) -> Array:
    return lax.bitcast_convert_type(pages, jnp.uint8)


# Attention: moving is (q, lengths, ...), fixed (pages, block tables); sinks stand with the queries.


def attention_work(case: attention_cases.Case, target: Target) -> Work:
    layout = case.layout(target.platform)
    scale = 1.3 * case.head_dim**-0.5
    how: dict[str, Any] = {"layout": layout, "scale": scale, "softcap": case.softcap, "window": case.window}
    op, oracle = (
        (attention.decode_attention, attention_reference.decode)
        if case.queries is None
        else (attention.prefill_attention, attention_reference.prefill)
    )

    def call(q: Array, sinks: Any, lens: Any, tables: Array, pages: Array, target: Target) -> Array:
        return op(q, pages, tables, *lens, sinks=sinks, target=target, **how)

    def answer(q: Array, sinks: Any, lens: Any, tables: Array, pages: Array) -> Array:
        return oracle(q.astype(jnp.float32), pages, tables, *lens, sinks=sinks, target=target, **how)

    queries = case.queries or tuple(min(1, length) for length in case.lengths)
    seen = [_seen(length, count, case.window) for length, count in zip(case.lengths, queries, strict=True)]
    item, result = jnp.dtype(case.dtype).itemsize, layout.result_dim
    kept = sum(keys for keys, _ in seen) * layout.token_bytes
    return Work(
        op="paged_attention",
        case=case,
        names=("decode_attention", "prefill_attention"),
        choice=lambda target: attention_api.choice(case.spec(target.platform), target),
        call=call,
        make=partial(_attention_inputs, case, target),
        answer=answer,
        heads=True,
        owned=sum(queries) if case.queries is not None else len(case.lengths),
        bytes=kept + sum(queries) * case.q_heads * (case.head_dim + result) * item,
        flops=2.0 * case.q_heads * (case.head_dim + result) * sum(pairs for _, pairs in seen),
    )


def _seen(length: int, queries: int, window: int | None) -> tuple[int, int]:
    """Keys that some query of the row sees, and pairs of query and key, for the last `queries` positions."""
    if window is None:
        return (length if queries else 0), queries * length - queries * (queries - 1) // 2
    spans = [min(window, position + 1) for position in range(length - queries, length)]
    return min(length, window + queries - 1) if queries else 0, sum(spans)


def _attention_inputs(case: attention_cases.Case, target: Target) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    layout = case.layout(target.platform)
    rng = np.random.default_rng(0)
    counts = [-(-n // case.page_size) for n in case.lengths]
    pages = 1 + sum(counts)
    tables = np.zeros((len(counts), case.spec(target.platform).pages_per_seq), np.int32)
    ids = 1 + rng.permutation(pages - 1)
    for row, count in enumerate(counts):
        start = sum(counts[:row])
        tables[row, :count] = ids[start : start + count]
    fill = jax.jit(partial(_pool, layout, pages, case.page_size, case.dtype))
    q = jax.random.normal(jax.random.key(1), (case.num_tokens, case.q_heads, case.head_dim), case.dtype)
    sinks = jax.random.normal(jax.random.key(2), (case.q_heads,), jnp.float32) + 1 if case.sinks else None
    lengths = np.asarray(case.lengths, np.int32)
    lens: tuple[Any, ...] = (jnp.asarray(lengths),)
    if case.queries is not None:
        queries = np.asarray(case.queries, np.int32)
        lens = tuple(jnp.asarray(a) for a in (np.cumsum(queries) - queries, queries, lengths - queries))
    return (q, sinks, lens, jnp.asarray(tables)), (fill(jax.random.key(3)),)


def _pool(layout: Any, pages: int, page_size: int, dtype: str, key: Array) -> Array:
    """[pages, page_size, width] of normal keys and values, page by page, so that no wide copy exists."""

    def page(key: Array) -> Array:
        k, v = jax.random.normal(key, (2, page_size, layout.kv_heads, layout.head_dim)).astype(dtype)
        return pack_rows(k, None if layout.latent else v, layout)

    filled = lax.map(page, jax.random.split(key, pages), batch_size=64)
    return filled if layout.dtype == "int8" else filled.at[0].set(jnp.nan)


# Writing: moving is (k, v, page ids, offsets), fixed (pages,). A loop writes the same places every turn.


def write_work(case: write_cases.Case, target: Target) -> Work:
    layout = case.layout(target.platform)

    def call(k: Array, v: Array, ids: Array, offsets: Array, pages: Array, target: Target) -> Array:
        return kv_write.write_kv(pages, k, v, ids, offsets, layout=layout, target=target)

    def answer(k: Array, v: Array, ids: Array, offsets: Array, pages: Array) -> Array:
        return write_reference.write_rows(pages, pack_rows(k, v, layout), ids, offsets, target=target)

    new = 2 * case.kv_heads * case.head_dim * jnp.dtype(case.dtype).itemsize
    return Work(
        op="kv_write",
        case=case,
        names=("kv_write",),
        choice=lambda target: write_api.choice(case.spec(target.platform), target),
        call=call,
        make=partial(_write_inputs, case, layout),
        answer=answer,
        heads=False,
        owned=0,
        bytes=case.num_tokens * (new + layout.token_bytes),
        flops=0.0,
        carried=True,
    )


def _write_inputs(case: write_cases.Case, layout: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Rows in pages of their own, in random order; a decode row is somewhere in its page, a chunk starts at one."""
    rng = np.random.default_rng(0)
    each = -(-case.tokens_per_row // case.page_size)
    ids = 1 + rng.permutation(case.pages - 1)[: case.rows * each].reshape(case.rows, each)
    start = rng.integers(0, case.page_size, (case.rows, 1)) if case.tokens_per_row == 1 else 0
    position = start + np.broadcast_to(np.arange(case.tokens_per_row), (case.rows, case.tokens_per_row))
    page_ids = np.take_along_axis(ids, position // case.page_size, axis=1)
    shape = (2, case.num_tokens, case.kv_heads, case.head_dim)
    k, v = jax.random.normal(jax.random.key(1), shape, jnp.float32).astype(case.dtype)
    pages = jnp.zeros((case.pages, case.page_size, layout.width), layout.dtype)
    places = (jnp.asarray(a.reshape(-1), jnp.int32) for a in (page_ids, position % case.page_size))
    return (k, v, *places), (pages,)


# Matrices: moving is (x,) or (x, group sizes), fixed (weight,).


def quantized_work(case: quantized_cases.Case) -> Work:
    shape = (case.k, case.n)
    packed = quantized_shape(shape, case.format, case.group, case.symmetric, case.activations, case.scale_dtype)
    spec = quantized_api.spec_of(jax.ShapeDtypeStruct((case.tokens, case.k), jnp.dtype(case.dtype)), packed)

    def answer(x: Array, w: Quantized) -> Array:
        return _wide_product(x, w, case.activations)

    item = jnp.dtype(case.dtype).itemsize
    return Work(
        op="quantized_matmul",
        case=case,
        names=("quantized_matmul",),
        choice=lambda target: quantized_api.choice(spec, target),
        call=quantized.quantized_matmul,
        make=lambda: ((_rows(case.tokens, case.k, case.dtype),), (_packed(packed),)),
        answer=answer,
        heads=False,
        owned=case.tokens,
        bytes=tree_bytes(packed) + case.tokens * (case.k + case.n) * item,
        flops=2.0 * case.tokens * case.k * case.n,
    )


def grouped_work(case: grouped_cases.Case) -> Work:
    shape, rows = (len(case.sizes), case.k, case.n), sum(case.sizes)
    item = jnp.dtype(case.dtype).itemsize
    packed = None
    if case.format != "none":
        packed = quantized_shape(shape, case.format, case.group, case.symmetric, case.activations, case.scale_dtype)
    held = math.prod(shape) * item if packed is None else tree_bytes(packed)

    def call(x: Array, sizes: Array, w: Any, target: Target) -> Array:
        return grouped.grouped_matmul(x, w, sizes, target=target)

    def make() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        x = _rows(case.num_tokens, case.k, case.dtype)
        w = _packed(packed) if packed is not None else _dense(shape, case.dtype)
        return (x, jnp.asarray(case.sizes, jnp.int32)), (w,)

    return Work(
        op="grouped_matmul",
        case=case,
        names=("grouped_matmul",),
        choice=lambda target: grouped_api.choice(case.spec(), target),
        call=call,
        make=make,
        answer=partial(_grouped_answer, case),
        heads=False,
        owned=rows,
        bytes=held * case.num_active // len(case.sizes) + rows * (case.k + case.n) * item,
        flops=2.0 * rows * case.k * case.n,
    )


def _grouped_answer(case: grouped_cases.Case, x: Array, sizes: Array, w: Any) -> Array:
    """Every row times every expert's weight, one expert at a time, and its own kept: dear, and hard to get wrong."""
    expert_of = jnp.repeat(
        jnp.arange(len(case.sizes)), sizes, total_repeat_length=case.num_tokens
    )  # rows of nobody go with the last

    def add(out: Array, expert: Array) -> tuple[Array, None]:
        weight = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, expert, keepdims=False), w)
        product = _wide_product(x, weight, case.activations)
        return jnp.where((expert_of == expert)[:, None], product, out), None

    start = jnp.zeros((case.num_tokens, case.n), jnp.float32)
    return lax.scan(add, start, jnp.arange(len(case.sizes)))[0]


def _wide_product(x: Array, w: Any, activations: str) -> Array:
    left = x.astype(jnp.float32)
    if isinstance(w, Quantized):
        if activations == "dynamic":
            numbers, scales = quantize_rows(x, w.format)
            left = numbers.astype(jnp.float32) * scales
        w = dequantize(w)
    return jnp.dot(left, w.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _rows(tokens: int, k: int, dtype: str) -> Array:
    return jax.random.normal(jax.random.key(1), (tokens, k), jnp.dtype(dtype))


def _dense(shape: tuple[int, int, int], dtype: str) -> Array:
    """One expert at a time: the random bits of all would be twice the weight."""
    one = jax.jit(lambda key: (jax.random.normal(key, shape[1:]) * shape[1] ** -0.5).astype(dtype))
    return jax.jit(lambda keys: lax.map(one, keys))(jax.random.split(jax.random.key(2), shape[0]))


def _packed(shape: Quantized) -> Quantized:
    """Random numbers of the format as they would be stored; scales near those of a unit normal weight."""
    values: Any = shape.values
    kind = jnp.dtype(values.dtype)

    def fill(key: Array) -> Array:
        if kind.name in ("int8", "uint8"):
            return jax.random.bits(key, values.shape, jnp.uint8).view(kind)
        return jax.random.normal(key, values.shape, jnp.bfloat16).astype(kind)

    scales: Any = shape.scales
    near = jax.random.uniform(jax.random.key(5), scales.shape, jnp.float32, 0.5, 1.5) * 0.02
    offsets = None if shape.offsets is None else (-7.5 * near).astype(scales.dtype)
    filled: Any = jax.jit(fill)(jax.random.key(4))
    return replace(shape, values=filled, scales=near.astype(scales.dtype), offsets=offsets)
