"""Calls of paged attention filled with numbers, and dense float64 attention in numpy to check them.

NaN (in int8 pages: numbers that overflow) wherever nobody may look. Every implementation's
tests use this; see `error`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from pallas_kernels.kv_layout import KVLayout, pack_rows
from pallas_kernels.paged_attention import decode_attention, decode_part, prefill_attention, prefill_part
from pallas_kernels.paged_attention.cases import Case
from pallas_kernels.paged_attention.part import MASKED, Part
from pallas_kernels.target import CPU, Target

SPARE_PAGES = 3
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3}  # |error| of a row's worst head over its norm


@cache
def jitted(
    attention: Callable[..., Array],
    layout: KVLayout,
    target: Target,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Any:
    return jax.jit(partial(attention, layout=layout, target=target, scale=scale, softcap=softcap, window=window))


packed_rows = jax.jit(pack_rows, static_argnums=2)  # one program a case: op by op it was dozens


@dataclass
class Call:
    """A case filled with numbers: what goes in, and for each token the dense answer."""

    case: Case
    target: Target
    q: Array  # [tokens, q_heads, head_dim]
    pages: Array  # [pages, page_size, layout.width]
    tables: np.ndarray  # int32 [rows, pages_per_seq]
    sinks: np.ndarray | None  # float32 [q_heads]
    expected: np.ndarray  # float32 [tokens, q_heads, result_dim]; NaN for tokens of nobody
    starts: np.ndarray  # int32 [rows], first token of each row

    @property
    def scale(self) -> float:
        return 1.3 * self.case.head_dim**-0.5

    def run(self) -> np.ndarray:
        case, lens = self.case, np.asarray(self.case.lengths, np.int32)
        attention = decode_attention if case.queries is None else prefill_attention
        layout = case.layout(self.target.platform)
        call = jitted(attention, layout, self.target, self.scale, case.softcap, case.window)
        tables, sinks = jnp.asarray(self.tables), None if self.sinks is None else jnp.asarray(self.sinks)
        if case.queries is None:
            out = call(self.q, self.pages, tables, jnp.asarray(lens), sinks=sinks)
        else:
            counts = np.asarray(case.queries, np.int32)
            rows = [jnp.asarray(a) for a in (self.starts, counts, lens - counts)]
            out = call(self.q, self.pages, tables, *rows, sinks=sinks)
        assert out.shape == (*self.q.shape[:2], layout.result_dim) and out.dtype == self.q.dtype
        return np.asarray(out, np.float32)

    def error(self) -> float:
        """The worst head of the worst owned token: |got - expected| / |expected|."""
        return self.error_of(self.run())

    def error_of(self, got: np.ndarray) -> float:
        owned = np.isfinite(self.expected).all(axis=(1, 2))
        got, want = got[owned], self.expected[owned]
        if not owned.any():
            return 0.0
        return float(np.max(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)))


def by_parts(call: Call, count: int, turn: int = 0) -> float:
    """The error of what devices with a part of every page each come to together; turn: they mistake whose is whose."""
    size, lens = call.case.page_size // count, np.asarray(call.case.lengths, np.int32)
    rows = [jnp.asarray(lens)]
    if call.case.queries is not None:
        counts = np.asarray(call.case.queries, np.int32)
        rows = [jnp.asarray(a) for a in (call.starts, counts, lens - counts)]
    attention = decode_part if call.case.queries is None else prefill_part
    how = (call.case.layout(call.target.platform), call.target, call.scale, call.case.softcap, call.case.window)
    run, found = jitted(attention, *how), []
    for i in range(count):
        part, sinks = Part(jnp.int32((i + turn) % count), count), None
        if call.sinks is not None:
            sinks = jnp.asarray(call.sinks) if i == 0 else jnp.full(call.sinks.shape, MASKED)
        pages = call.pages[:, i * size : (i + 1) * size]
        found.append(run(call.q, pages, jnp.asarray(call.tables), *rows, part, sinks=sinks))
        assert [a.dtype for a in found[-1]] == [jnp.float32, jnp.float32]
    values, lse = (np.stack(arrays).astype(np.float64) for arrays in zip(*found, strict=True))
    weight = np.exp(lse - lse.max(axis=0))[..., None]
    return call.error_of(np.sum(values * weight, axis=0) / np.sum(weight, axis=0))


def dense(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int, case: Case, scale: float, sinks: np.ndarray | None
) -> np.ndarray:
    """One query [q_heads, head_dim] at `position`, keys and values [keys, kv_heads, their size]; float64."""
    group = case.q_heads // case.kv_heads
    first = 0 if case.window is None else max(0, position - case.window + 1)
    out = np.empty((case.q_heads, v.shape[-1]))
    for head in range(case.q_heads):
        keys, values = (a[first : position + 1, head // group].astype(np.float64) for a in (k, v))
        scores = keys @ q[head].astype(np.float64) * scale
        if case.softcap is not None:
            scores = case.softcap * np.tanh(scores / case.softcap)
        if sinks is not None:  # a key of its own, whose value is zero
            scores, values = np.append(scores, sinks[head]), np.vstack([values, np.zeros_like(values[:1])])
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values / weights.sum()
    return out


def stored(rows: np.ndarray, layout: KVLayout) -> np.ndarray:
    """float64 [tokens, kv_heads, 2 or 1 (latent), head_dim] that packed rows stand for, read byte by byte."""
    vectors = layout.kv_heads * (2 if layout.value_dim is None else 1)
    cut = vectors * layout.head_width
    values = rows[:, :cut].astype(np.float64)
    if layout.quantized:
        sizes = [layout.head_width] * vectors
        if layout.value_dim is not None:
            sizes = [layout.value_dim, layout.head_width - layout.value_dim]
        exponents = rows[:, cut:].view(np.int8)[:, : len(sizes)].astype(np.float64)
        values = values * np.repeat(2.0**exponents, sizes, axis=1)
    return values.reshape(-1, layout.kv_heads, vectors // layout.kv_heads, layout.head_width)[..., : layout.head_dim]


def nobody(shape: tuple[int, ...], layout: KVLayout) -> np.ndarray:
    """Page rows that must not be looked at: NaN, or what overflows where there is none."""
    dtype = np.dtype(getattr(ml_dtypes, layout.dtype, layout.dtype))
    if not layout.quantized:
        return np.full(shape, np.nan, dtype)
    rows = np.full(shape, 126, np.int8)  # as an exponent: 2**126
    values = np.int8(127) if layout.dtype == "int8" else np.asarray(np.nan, dtype).view(np.int8)
    rows[..., : layout.tail] = values
    return rows.view(dtype)


def fill(case: Case, target: Target = CPU) -> Call:
    """Pages in random order; poison in the trash page, in spare pages and behind each row's last key."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    layout = case.layout(target.platform)
    counts = [-(-n // case.page_size) for n in case.lengths]
    ids = iter(rng.permutation(np.arange(1, 1 + sum(counts) + SPARE_PAGES)))
    tables = np.zeros((len(counts), case.spec(target.platform).pages_per_seq), np.int32)
    pages = nobody((1 + sum(counts) + SPARE_PAGES, case.page_size, layout.width), layout)
    q = np.full((case.num_tokens, case.q_heads, case.head_dim), np.nan, np.float32)
    sinks = rng.normal(size=case.q_heads).astype(np.float32) + 1 if case.sinks else None
    expected = np.full((case.num_tokens, case.q_heads, layout.result_dim), np.nan, np.float32)
    starts, start, first = [], 0, 0
    dtype = jnp.dtype(case.dtype)
    k, v = (rng.normal(size=(sum(case.lengths), case.kv_heads, case.head_dim)).astype(dtype) for _ in range(2))
    packed = np.asarray(packed_rows(jnp.asarray(k), None if layout.latent else jnp.asarray(v), layout))
    call = Call(case, target, jnp.zeros(()), jnp.zeros(()), tables, sinks, expected, np.zeros(()))
    for row, length in enumerate(case.lengths):
        tables[row, : counts[row]] = [next(ids) for _ in range(counts[row])]
        rows = packed[first : first + length]
        first += length
        for position in range(length):
            pages[tables[row, position // case.page_size], position % case.page_size] = rows[position]
        kv = stored(rows, layout)
        keys, values = kv[:, :, 0], kv[:, :, -1, : layout.result_dim]
        count = min(length, 1) if case.queries is None else case.queries[row]
        starts.append(start)
        for i in range(count):
            at = (row if case.queries is None else start) + i
            q[at] = (2 * rng.normal(size=q[at].shape)).astype(dtype).astype(np.float32)
            expected[at] = dense(q[at], keys, values, length - count + i, case, call.scale, sinks)
        start += count
    call.q, call.pages = jnp.asarray(q.astype(dtype)), jnp.asarray(pages)
    call.starts = np.asarray(starts, np.int32)
    return call


def swap_keys_with_values(call: Call) -> None:
    """Breaks the input: a check that still passes checks nothing. In latent pages the value's end with the rest."""
    layout = call.case.layout(call.target.platform)
    cut = layout.tail
    if layout.value_dim is not None:
        shift = layout.head_dim - layout.value_dim
        call.pages = call.pages.at[:, :, : layout.head_dim].set(
            jnp.roll(call.pages[:, :, : layout.head_dim], shift, axis=2)
        )
        return
    heads = call.pages[:, :, :cut].reshape(*call.pages.shape[:2], layout.kv_heads, 2, -1)[:, :, :, ::-1]
    call.pages = jnp.concatenate([heads.reshape(*call.pages.shape[:2], cut), call.pages[:, :, cut:]], axis=2)


def shift_pages(call: Call, row: int) -> None:
    """Breaks the input: the row's block table is off by one page."""
    call.tables[row] = np.roll(call.tables[row], -1)
