"""Paged attention against dense float32 attention in numpy, with NaN wherever nobody may look."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels.kv_write import write_kv
from pallas_kernels.paged_attention import decode_attention, prefill_attention
from pallas_kernels.paged_attention.cases import CASES, DECODE, PREFILL, Case

SPARE_PAGES = 3
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3}  # |error| of a row's worst head over its norm


@cache
def jitted(attention: Callable[..., Array], scale: float, softcap: float | None, window: int | None) -> Any:
    return jax.jit(partial(attention, scale=scale, softcap=softcap, window=window))


@dataclass
class Call:
    """A case filled with numbers: what goes in, and for each token the dense answer."""

    case: Case
    q: Array  # [tokens, q_heads, head_dim]
    pages: Array  # [pages, page_size, 2 * kv_heads * head_dim]
    tables: np.ndarray  # int32 [rows, pages_per_seq]
    expected: np.ndarray  # float32 [tokens, q_heads, head_dim]; NaN for tokens of nobody
    starts: np.ndarray  # int32 [rows], first token of each row

    @property
    def scale(self) -> float:
        return 1.3 * self.case.head_dim**-0.5

    def run(self) -> np.ndarray:
        case, lens = self.case, np.asarray(self.case.lengths, np.int32)
        attention = decode_attention if case.queries is None else prefill_attention
        call = jitted(attention, self.scale, case.softcap, case.window)
        tables = jnp.asarray(self.tables)
        if case.queries is None:
            out = call(self.q, self.pages, tables, jnp.asarray(lens))
        else:
            counts = np.asarray(case.queries, np.int32)
            rows = [jnp.asarray(a) for a in (self.starts, counts, lens - counts)]
            out = call(self.q, self.pages, tables, *rows)
        assert out.shape == self.q.shape and out.dtype == self.q.dtype
        return np.asarray(out, np.float32)

    def error(self) -> float:
        """The worst head of the worst owned token: |got - expected| / |expected|."""
        owned = np.isfinite(self.expected).all(axis=(1, 2))
        got, want = self.run()[owned], self.expected[owned]
        if not owned.any():
            return 0.0
        return float(np.max(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)))


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int, case: Case, scale: float) -> np.ndarray:
    """One query [q_heads, head_dim] at `position`, keys and values [keys, kv_heads, head_dim]; float64."""
    group = case.q_heads // case.kv_heads
    first = 0 if case.window is None else max(0, position - case.window + 1)
    out = np.empty_like(q, np.float64)
    for head in range(case.q_heads):
        keys, values = (a[first : position + 1, head // group].astype(np.float64) for a in (k, v))
        scores = keys @ q[head].astype(np.float64) * scale
        if case.softcap is not None:
            scores = case.softcap * np.tanh(scores / case.softcap)
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values / weights.sum()
    return out


def fill(case: Case) -> Call:
    """Pages in random order; NaN in the trash page, in spare pages and behind each row's last key."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    dtype = jnp.dtype(case.dtype)
    counts = [-(-n // case.page_size) for n in case.lengths]
    ids = iter(rng.permutation(np.arange(1, 1 + sum(counts) + SPARE_PAGES)))
    tables = np.zeros((len(counts), max(counts) + 2), np.int32)
    pages = np.full(
        (1 + sum(counts) + SPARE_PAGES, case.page_size, case.kv_heads, 2, case.head_dim), np.nan, np.float32
    )
    tokens = case.num_tokens
    q = np.full((tokens, case.q_heads, case.head_dim), np.nan, np.float32)
    expected, starts, start = q.copy(), [], 0
    call = Call(case, jnp.zeros(()), jnp.zeros(()), tables, expected, np.zeros(()))
    for row, length in enumerate(case.lengths):
        tables[row, : counts[row]] = [next(ids) for _ in range(counts[row])]
        kv = np.asarray(jnp.asarray(rng.normal(size=(2, length, case.kv_heads, case.head_dim)), dtype), np.float32)
        for position in range(length):
            page, offset = tables[row, position // case.page_size], position % case.page_size
            pages[page, offset, :, 0], pages[page, offset, :, 1] = kv[0, position], kv[1, position]
        count = min(length, 1) if case.queries is None else case.queries[row]
        starts.append(start)
        for i in range(count):
            at = (row if case.queries is None else start) + i
            q[at] = np.asarray(jnp.asarray(2 * rng.normal(size=q[at].shape), dtype), np.float32)
            expected[at] = dense(q[at], kv[0], kv[1], length - count + i, case, call.scale)
        start += count
    call.q, call.pages = jnp.asarray(q, dtype), jnp.asarray(pages.reshape(*pages.shape[:2], -1), dtype)
    call.starts = np.asarray(starts, np.int32)
    return call


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_dense_attention(case: Case) -> None:
    assert fill(case).error() < TOLERANCE[case.dtype]


# Padding behind a prompt in the same block looks past the prompt's last key, into stale values.
@pytest.mark.parametrize(
    "name",
    [
        "decode_idle_rows",
        "decode_all_idle",
        "prefill_idle_rows",
        "prefill_all_idle",
    ],
)
def test_tokens_of_nobody_come_back_finite(name: str) -> None:
    call = fill(next(case for case in CASES if case.name == name))
    call.q = jnp.nan_to_num(call.q)  # as in a step, where padding is the hidden state of token 0
    assert np.isfinite(call.run()).all()


@pytest.mark.parametrize("case", [DECODE[2], PREFILL[2]], ids=lambda case: case.name)
def test_the_check_notices_keys_swapped_with_values(case: Case) -> None:
    call = fill(case)
    shape = call.pages.shape
    call.pages = call.pages.reshape(*shape[:2], case.kv_heads, 2, -1)[:, :, :, ::-1].reshape(shape)
    assert not call.error() < 0.1


@pytest.mark.parametrize("case", [DECODE[2], PREFILL[2]], ids=lambda case: case.name)
def test_the_check_notices_a_shifted_page(case: Case) -> None:
    call = fill(case)
    call.tables[1] = np.roll(call.tables[1], -1)
    assert not call.error() < 0.01


@pytest.mark.parametrize("case", [DECODE[11], PREFILL[7]], ids=lambda case: case.name)
def test_the_check_notices_a_window_of_one_more(case: Case) -> None:
    call = fill(case)
    assert case.window is not None
    call.case = replace(case, window=case.window + 1)
    assert not call.error() < 0.01


def test_a_rows_result_does_not_depend_on_the_others() -> None:
    """Bit for bit: the same row with long, short, idle and NaN-ridden neighbours."""
    case = Case(name="neighbours", lengths=(20, 300, 0, 77), window=50)
    call = fill(case)
    together = call.run()
    spoilt = replace(call, pages=call.pages.at[call.tables[1, 17]].set(jnp.nan))
    assert np.isnan(spoilt.run()[1]).any(), "row 1 sees its own NaN"
    for row in (0, 3):
        lengths = tuple(n if i == row else 0 for i, n in enumerate(case.lengths))
        alone = replace(call, case=replace(case, lengths=lengths)).run()
        assert alone[row].tobytes() == together[row].tobytes() == spoilt.run()[row].tobytes()


def test_written_keys_are_what_attention_reads() -> None:
    """`write_kv` and `decode_attention` agree on the layout of a page."""
    case = Case(name="written", lengths=(21, 6))
    call = fill(case)
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(27, case.kv_heads, case.head_dim)).astype(np.float32) for _ in range(2))
    row = np.repeat([0, 1], case.lengths)
    position = np.concatenate([np.arange(n) for n in case.lengths])
    page_ids = call.tables[row, position // case.page_size]
    call.pages = write_kv(
        jnp.full_like(call.pages, jnp.nan),
        jnp.asarray(k),
        jnp.asarray(v),
        jnp.asarray(page_ids),
        jnp.asarray(position % case.page_size, jnp.int32),
    )
    for i, length in enumerate(case.lengths):
        call.expected[i] = dense(np.asarray(call.q[i]), k[row == i], v[row == i], length - 1, case, call.scale)
    assert call.error() < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 100}, "pages are 100 wide"),
        ({"q_heads": 3}, "q_heads 3 must be a multiple of kv_heads 2"),
        ({"rows": 3}, "block_tables has 3 rows, lengths 2"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    q = jnp.zeros((2, change.get("q_heads", 4), 64))
    pages = jnp.zeros((4, 16, change.get("width", 256)))
    tables, lens = jnp.zeros((change.get("rows", 2), 2), jnp.int32), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match=message):
        decode_attention(q, pages, tables, lens, scale=1.0)
    with pytest.raises(ValueError, match=message):
        prefill_attention(q, pages, tables, lens, lens, lens, scale=1.0)
