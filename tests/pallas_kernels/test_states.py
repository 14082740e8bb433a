"""The ops with a state a sequence, against float64 recurrences that take one token at a time.

One suite for all: rows of any length, sources, copies on the way, decode rows beside them, NaN in
everything that must not be read, and chunks cut anywhere.
"""

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

from pallas_kernels.gated_delta import api as gated_delta
from pallas_kernels.gated_delta.reference import unit_lower_inverse
from pallas_kernels.short_conv import api as short_conv
from pallas_kernels.ssd import api as ssd
from pallas_kernels.states import DecodeStates, PrefillStates
from pallas_kernels.target import CPU, Target

POOL = 12  # rows
Tokens = tuple[np.ndarray, ...]  # float64 [tokens, ...] each


@dataclass(frozen=True)
class Op:
    """run(tokens, pool, decode, prefill) -> (out, pool); one(state, token) -> (out, state) in float64."""

    state: tuple[int, ...]
    tokens: Callable[[np.random.Generator, int], Tokens]
    run: Callable[..., tuple[Array, Array]]
    one: Callable[..., tuple[np.ndarray, np.ndarray]]


CHANNELS, WIDTH = 6, 4
FIXED = np.random.default_rng(5)
WEIGHT, BIAS = FIXED.normal(size=(WIDTH, CHANNELS)), FIXED.normal(size=CHANNELS)


def f32(a: np.ndarray) -> Array:
    return jnp.asarray(a, jnp.float32)


def conv_one(window: np.ndarray, token: Tokens) -> tuple[np.ndarray, np.ndarray]:
    seen = np.concatenate([window.reshape(WIDTH - 1, CHANNELS), token[0][None]])
    return (seen * WEIGHT).sum(axis=0) + BIAS, seen[1:].reshape(-1)


def conv_run(tokens: Any, pool: Array, decode: DecodeStates, prefill: PrefillStates | None) -> tuple[Array, Array]:
    return short_conv.short_conv(tokens[0], pool, f32(WEIGHT), f32(BIAS), decode, prefill, target=CPU)


def ssd_op(heads: int, head_dim: int, state_dim: int, groups: int, target: Target = CPU) -> Op:
    a, skip = -np.exp(FIXED.normal(size=heads)), FIXED.normal(size=heads)

    def tokens(rng: np.random.Generator, n: int) -> Tokens:
        sizes = ((heads, head_dim), (groups, state_dim), (groups, state_dim))
        return *(rng.normal(size=(n, *size)) for size in sizes), np.exp(rng.normal(-1, 1, size=(n, heads)))

    def one(state: np.ndarray, token: Tokens) -> tuple[np.ndarray, np.ndarray]:
        x, b, c, dt = token
        b, c = (np.repeat(each, heads // groups, axis=0) for each in (b, c))
        state = state * np.exp(dt * a)[:, None, None] + np.einsum("h,hp,hn->hpn", dt, x, b)
        return np.einsum("hpn,hn->hp", state, c) + skip[:, None] * x, state

    def run(tokens: Any, pool: Array, decode: DecodeStates, prefill: PrefillStates | None) -> tuple[Array, Array]:
        return ssd.ssd(ssd.SSDInput(*tokens, a=f32(a), skip=f32(skip)), pool, decode, prefill, target=target)

    return Op((heads, head_dim, state_dim), tokens, run, one)


def delta_op(key_heads: int, value_heads: int, key_dim: int, value_dim: int, target: Target = CPU) -> Op:
    def tokens(rng: np.random.Generator, n: int) -> Tokens:
        q, k = rng.normal(size=(2, n, key_heads, key_dim))
        k = k + 2  # alike, so that tokens overwrite each other
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
        gate = (n, value_heads)
        return q, k, rng.normal(size=(*gate, value_dim)), -np.exp(rng.normal(-3, 1, size=gate)), rng.uniform(size=gate)

    def one(state: np.ndarray, token: Tokens) -> tuple[np.ndarray, np.ndarray]:
        q, k, v, log_decay, beta = token
        q, k = (np.repeat(each, value_heads // key_heads, axis=0) for each in (q, k))
        state = state * np.exp(log_decay)[:, None, None]
        delta = beta[:, None] * (v - np.einsum("hkv,hk->hv", state, k))
        state = state + np.einsum("hk,hv->hkv", k, delta)
        return np.einsum("hkv,hk->hv", state, q), state

    def run(tokens: Any, pool: Array, decode: DecodeStates, prefill: PrefillStates | None) -> tuple[Array, Array]:
        return gated_delta.gated_delta(gated_delta.DeltaInput(*tokens), pool, decode, prefill, target=target)

    return Op((value_heads, key_dim, value_dim), tokens, run, one)


OPS = {
    "short_conv": Op(((WIDTH - 1) * CHANNELS,), lambda rng, n: (rng.normal(size=(n, CHANNELS)),), conv_run, conv_one),
    "ssd": ssd_op(4, 5, 3, 2),
    "gated_delta": delta_op(2, 4, 6, 5),
}


@dataclass(frozen=True)
class Case:
    """Decode rows are pool rows 0 ...; chunk r ends in pool row 4 + r and may copy to row 8 + r."""

    name: str
    decode: tuple[bool, ...] = ()  # active
    nobodys: int = 0  # idle decode rows behind them, which share pool row 7
    decode_copies: tuple[bool, ...] = ()  # decode row r copies to pool row 8 + r
    lens: tuple[int, ...] | None = None  # of chunks; None: a decode step
    sources: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()  # tokens after which a copy is taken; 0: none
    padding: int = 0
    room: int = 0  # tokens that each chunk has room for; 0: chunks stand one behind the other
    keeps: bool = True  # chunks leave their states


CASES = (
    Case("decode", decode=(True, False, True)),
    Case("continues", lens=(7, 1, 3, 20), sources=(4, 5, 8, -1), copies=(0, 1, 2, 16), padding=5),
    Case("mixed", decode=(True, True, False), lens=(9, 4, 0), sources=(-1, 10, 0), copies=(9, 0, 0), padding=3),
    Case("idle", decode=(True, False, True), nobodys=3, decode_copies=(True, True, False)),
    Case("room", lens=(5, 0, 2, 3), sources=(4, 5, 6, 7), copies=(0, 0, 1, 3), room=5),
    Case("tried", lens=(4, 4, 4), sources=(0, 1, 9), copies=(0, 0, 0), room=4, keeps=False),
    Case("blocks", lens=(300, 129, 2), sources=(-1, 5, -1), copies=(130, 64, 0), padding=40),
)


@dataclass
class Call:
    """A case filled with numbers: the op's arguments, and what must come of them."""

    op: Op
    tokens: Tokens  # NaN for tokens of nobody
    pool: np.ndarray  # NaN in rows that nobody reads
    decode: DecodeStates
    prefill: PrefillStates | None
    out: np.ndarray  # NaN for tokens of nobody
    after: dict[int, np.ndarray]  # pool row -> state

    def check(self) -> float:
        """The worst relative error of an owned token or kept state; raises if another row of the pool changed."""
        arrays = tuple(f32(a) for a in self.tokens)
        out, pool = jitted(self.op)(arrays, f32(self.pool), self.decode, self.prefill)
        owned = np.isfinite(self.out).reshape(len(self.out), -1).all(axis=1)
        errors = [relative(np.asarray(out)[t], self.out[t]) for t in np.flatnonzero(owned)]
        for row in range(POOL):
            if row in self.after:
                errors.append(relative(np.asarray(pool)[row], self.after[row]))
            else:
                np.testing.assert_array_equal(np.asarray(pool)[row], np.float32(self.pool[row]))
        return max(errors, default=0.0)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    return float(error) if np.isfinite(error) else np.inf


@cache
def jitted(op: Op) -> Any:
    return jax.jit(op.run)


def fill(op: Op, case: Case, seed: int = 0) -> Call:
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), seed])
    lens, num_decode = case.lens or (), len(case.decode) + case.nobodys
    total = num_decode + (case.room * len(lens) or sum(lens)) + case.padding
    tokens = op.tokens(rng, total)
    states = rng.normal(size=(POOL, *op.state))
    pool = np.full_like(states, np.nan)
    used = [*(r for r, on in enumerate(case.decode) if on), *(s for s in case.sources if s >= 0)]
    pool[used] = states[used]
    owners = np.zeros(total, bool)
    after: dict[int, np.ndarray] = {}
    results: dict[int, np.ndarray] = {}

    def feed(t: int, state: np.ndarray) -> np.ndarray:
        owners[t] = True
        results[t], state = op.one(state, tuple(a[t] for a in tokens))
        return state

    for row, active in enumerate(case.decode):
        if active:
            after[row] = feed(row, states[row])
            if any(case.decode_copies[row : row + 1]):
                after[8 + row] = after[row]
    start = num_decode
    for row, count in enumerate(lens):
        state = states[case.sources[row]] if case.sources[row] >= 0 else np.zeros(op.state)
        for i in range(count):
            state = feed(start + i, state)
            if i + 1 == case.copies[row]:
                after[8 + row] = state
        if count and case.keeps:
            after[4 + row] = state
        start += case.room or count
    for a in tokens:
        a[~owners] = np.nan
    shape = next(iter(results.values())).shape if results else (1,)
    out = np.full((total, *shape), np.nan)
    for t, value in results.items():
        out[t] = value
    return Call(op, tokens, pool, *indices(case), out, after)


def indices(case: Case) -> tuple[DecodeStates, PrefillStates | None]:
    """What the op is told of the rows."""

    def ints(values: Any) -> Array:
        return jnp.asarray(np.asarray(values, np.int32).reshape(-1))

    idle = (False,) * case.nobodys
    rows = (*range(len(case.decode)), *(7 for _ in idle))
    to = [8 + row if copied else -1 for row, copied in enumerate(case.decode_copies)] + [-1 for _ in idle]
    copy_to = ints(to) if case.decode_copies else None
    decode = DecodeStates(ints(rows), jnp.asarray(np.asarray((*case.decode, *idle), bool)), copy_to)
    if case.lens is None:
        return decode, None
    copies = [8 + row if at else -1 for row, at in enumerate(case.copies)]
    starts = np.cumsum([0, *(case.room or count for count in case.lens)])[:-1]
    rows = (starts, case.lens, case.sources, range(4, 4 + len(case.lens)), copies, case.copies)
    prefill = PrefillStates(*(ints(row) for row in rows), each=case.room)
    return decode, prefill if case.keeps else replace(prefill, target=None)


# The last state of a chunk of 300 tokens that forgets slowly.
TOLERANCE = 3e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", OPS)
def test_equals_one_token_at_a_time(name: str, case: Case) -> None:
    assert fill(OPS[name], case).check() < TOLERANCE


@pytest.mark.parametrize("broken", ["source", "target", "copy", "a token", "length"])
@pytest.mark.parametrize("name", OPS)
def test_the_check_notices_broken_input(name: str, broken: str) -> None:
    call = fill(OPS[name], CASES[1])
    rows = call.prefill
    assert rows is not None
    if broken == "source":
        call.prefill = replace(rows, source=rows.source.at[0].set(5))
    elif broken == "target":
        assert rows.target is not None
        call.prefill = replace(rows, target=rows.target.at[0].set(6))
    elif broken == "copy":
        call.prefill = replace(rows, copy_at=rows.copy_at.at[3].add(-1))
    elif broken == "a token":
        call.tokens[0][2] *= 1.01
    else:
        call.prefill = replace(rows, q_len=rows.q_len.at[0].add(-1))
    try:
        assert call.check() > 10 * TOLERANCE
    except AssertionError as error:
        assert "not equal" in str(error).lower()  # a row of the pool that must not change


@pytest.mark.parametrize("name", OPS)
def test_a_rows_nan_stays_with_it(name: str) -> None:
    """And its neighbours' results do not change by a bit."""
    op = OPS[name]
    call = fill(op, CASES[1])
    arrays = tuple(f32(a) for a in call.tokens)
    out, pool = jitted(op)(arrays, f32(call.pool), call.decode, call.prefill)
    spoilt, spoilt_pool = jitted(op)((arrays[0].at[3].set(jnp.nan), *arrays[1:]), f32(call.pool), call.decode,
                                     call.prefill)  # fmt: skip
    assert np.isnan(np.asarray(spoilt)[3:6]).any() and not np.isnan(np.asarray(spoilt)[7:31]).any()
    np.testing.assert_array_equal(np.asarray(spoilt)[7:31], np.asarray(out)[7:31])
    np.testing.assert_array_equal(np.asarray(spoilt_pool)[5:], np.asarray(pool)[5:])


@pytest.mark.parametrize("name", ["short_conv", "ssd", pytest.param("gated_delta", marks=pytest.mark.slow)])
def test_chunks_may_be_cut_anywhere(name: str) -> None:
    """Forty tokens at once, and in pieces that continue each other, one of them as a decode row."""
    op, rng = OPS[name], np.random.default_rng(8)
    tokens = tuple(f32(a) for a in op.tokens(rng, 40))
    decode, whole = indices(Case("whole", lens=(40,), sources=(-1,), copies=(0,)))
    expected, _ = jitted(op)(tokens, jnp.zeros((POOL, *op.state)), decode, whole)
    pool, start = jnp.full((POOL, *op.state), jnp.nan), 0
    for count in (17, 16, 1, 6):
        piece = tuple(jnp.roll(a, -start, axis=0) for a in tokens)
        decode, rows = indices(Case("piece", lens=(count,), sources=(4 if start else -1,), copies=(0,)))
        if count == 1:
            decode, rows = DecodeStates(jnp.asarray([4]), jnp.asarray([True])), None
            piece = tuple(a[:1] for a in piece)
        out, pool = jitted(op)(piece, pool, decode, rows)
        assert relative(np.asarray(out)[:count], np.asarray(expected[start : start + count])) < TOLERANCE
        start += count


@pytest.mark.parametrize("name", ["short_conv", "ssd", pytest.param("gated_delta", marks=pytest.mark.slow)])
def test_bfloat16_tokens_and_float32_states(name: str) -> None:
    call = fill(OPS[name], CASES[2])
    tokens = tuple(jnp.asarray(a, jnp.bfloat16 if i < 3 else jnp.float32) for i, a in enumerate(call.tokens))
    pool = jnp.asarray(call.pool, jnp.bfloat16 if name == "short_conv" else jnp.float32)
    out, kept = jitted(OPS[name])(tokens, pool, call.decode, call.prefill)
    assert out.dtype == jnp.bfloat16 and kept.dtype == pool.dtype
    assert relative(np.asarray(out[:2], np.float32), call.out[:2]) < 0.02


def test_the_inverse_is_stable_where_powers_are_not() -> None:
    """Equal keys: the matrix is all ones, whose powers reach 1e17 before they cancel."""
    matrix = np.tril(np.full((1, 63, 63), 0.98, np.float32), -1)
    expected = np.linalg.inv(np.eye(63) + matrix[0].astype(np.float64))
    np.testing.assert_allclose(jax.jit(unit_lower_inverse)(f32(matrix))[0], expected, atol=1e-5)


def test_an_implementation_asked_for_by_name_never_falls_back() -> None:
    spec = short_conv.ConvSpec(1, 2, 6, 4, "float32")
    assert str(short_conv.choice(spec, Target("tpu", "v6e"))) == "short_conv: reference"
    with pytest.raises(ValueError, match="short_conv has no implementation 'tpu'"):
        short_conv.choice(spec, Target("tpu", "v6e", (("short_conv", "tpu"),)))


@pytest.mark.parametrize("name", OPS)
def test_a_pool_that_does_not_fit_is_refused(name: str) -> None:
    call = fill(OPS[name], CASES[0])
    run = partial(OPS[name].run, tuple(f32(a) for a in call.tokens))
    with pytest.raises(ValueError, match=r"pool .* must be"):
        run(jnp.zeros((POOL, 7)), call.decode, call.prefill)
    with pytest.raises(ValueError, match=r"pool .* must be"):
        run(jnp.zeros(call.pool.shape, jnp.float16), call.decode, call.prefill)
