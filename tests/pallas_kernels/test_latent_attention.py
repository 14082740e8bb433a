"""Expanded latent prefill against dense float64 attention and against the absorbed form, both over the same pages."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels.kv_layout import KVLayout, kv_layout, pack_rows
from pallas_kernels.latent_attention import expanded_prefill
from pallas_kernels.latent_attention.api import CANDIDATES, choice
from pallas_kernels.latent_attention.cases import CASES, Case
from pallas_kernels.paged_attention import prefill_attention
from pallas_kernels.target import CPU, Target
from tests.pallas_kernels.attention_calls import nobody, stored

SPARE_PAGES = 3
SELDOM = {"int8", "e4m3", "pages_of_512", "long_context"}  # among the slow tests; int8 also has its absorbed form
# |error| of a row's worst head over its norm. In bfloat16 expanded keys and values are rounded, as in a plain forward.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.6e-2}


@dataclass
class Call:
    """A case filled with numbers, and for each token the dense answer."""

    case: Case
    target: Target
    q: Array  # [tokens, q_heads, nope + rope]
    pages: Array
    tables: np.ndarray  # int32 [rows, pages_per_seq]
    starts: np.ndarray  # int32 [rows], first token of each row
    w_uk: Array  # [q_heads, rank, nope]
    w_uv: Array  # [q_heads, rank, v_dim]
    expected: np.ndarray  # float32 [tokens, q_heads, v_dim]; NaN for tokens of nobody

    @property
    def scale(self) -> float:
        return (self.case.nope + self.case.rope) ** -0.5

    @property
    def rows(self) -> list[Array]:
        """What both forms are told of the rows."""
        lens, counts = (np.asarray(a, np.int32) for a in (self.case.lengths, self.case.queries))
        return [jnp.asarray(a) for a in (self.tables, self.starts, counts, lens - counts)]

    def run(self) -> np.ndarray:
        call = expanded(self.case.layout(self.target.platform), self.target, self.scale)
        out = call(self.q, self.pages, *self.rows, self.w_uk, self.w_uv)
        assert out.shape == self.expected.shape and out.dtype == self.q.dtype
        return np.asarray(out, np.float32)

    def absorbed(self) -> np.ndarray:
        """w_uk in the query, w_uv on the result."""
        nope = self.case.nope
        heads = jnp.einsum("thd,hrd->thr", self.q[..., :nope], self.w_uk, precision="highest")
        q = jnp.concatenate([heads, self.q[..., nope:]], axis=-1)
        layout = self.case.layout(self.target.platform)
        out = prefill_attention(q, self.pages, *self.rows, layout=layout, target=self.target, scale=self.scale)
        return np.asarray(jnp.einsum("thr,hrd->thd", out, self.w_uv, precision="highest"), np.float32)

    def error(self, got: np.ndarray) -> float:
        """The worst head of the worst owned token: |got - expected| / |expected|."""
        owned = np.isfinite(self.expected).all(axis=(1, 2))
        if not owned.any():
            return 0.0
        got, want = got[owned], self.expected[owned]
        return float(np.max(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)))


@cache
def expanded(layout: KVLayout, target: Target, scale: float) -> Any:
    return jax.jit(partial(expanded_prefill, layout=layout, target=target, scale=scale))


def dense(q: np.ndarray, latents: np.ndarray, w_uk: np.ndarray, w_uv: np.ndarray, scale: float) -> np.ndarray:
    """One query [q_heads, nope + rope] that sees all of latents [keys, rank + rope]; float64 [q_heads, v_dim]."""
    rank, nope = w_uk.shape[1], w_uk.shape[2]
    scores = np.einsum("kr,hrd,hd->hk", latents[:, :rank], w_uk, q[:, :nope], optimize=True)
    scores = (scores + q[:, nope:] @ latents[:, rank:].T) * scale
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("hk,kr,hrd->hd", weights, latents[:, :rank], w_uv, optimize=True)


def fill(case: Case, target: Target = CPU) -> Call:
    """Pages in random order; poison in trash and spare pages, behind each row's last key, in queries of nobody."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    layout = case.layout(target.platform)
    counts = [-(-n // case.page_size) for n in case.lengths]
    ids = iter(rng.permutation(np.arange(1, 1 + sum(counts) + SPARE_PAGES)))
    tables = np.zeros((len(counts), case.spec(target.platform).pages_per_seq), np.int32)
    pages = nobody((1 + sum(counts) + SPARE_PAGES, case.page_size, layout.width), layout)
    w_uk, w_uv = (
        jnp.asarray(2 * rng.normal(size=(case.q_heads, case.rank, size)) * case.rank**-0.5, case.dtype)
        for size in (case.nope, case.v_dim)
    )
    wide_uk, wide_uv = (np.asarray(w, np.float64) for w in (w_uk, w_uv))
    q = np.full((case.num_tokens, case.q_heads, case.nope + case.rope), np.nan, np.float32)
    expected = np.full((case.num_tokens, case.q_heads, case.v_dim), np.nan, np.float32)
    starts = np.cumsum([0, *case.queries])[:-1].astype(np.int32)
    call = Call(case, target, jnp.zeros(()), jnp.asarray(pages), tables, starts, w_uk, w_uv, expected)
    for row, length in enumerate(case.lengths):
        tables[row, : counts[row]] = [next(ids) for _ in range(counts[row])]
        latents = jnp.asarray(rng.normal(size=(length, 1, layout.head_dim)), jnp.dtype(case.dtype))
        packed = np.asarray(pack_rows(latents, None, layout))
        position = np.arange(length)
        pages[tables[row, position // case.page_size], position % case.page_size] = packed
        kept = stored(packed, layout)[:, 0, 0]
        for i in range(case.queries[row]):
            at = starts[row] + i
            q[at] = np.asarray(jnp.asarray(rng.normal(size=q[at].shape), case.dtype), np.float32)
            seen = length - case.queries[row] + i + 1
            expected[at] = dense(q[at], kept[:seen], wide_uk, wide_uv, call.scale)
    call.q, call.pages = jnp.asarray(q, case.dtype), jnp.asarray(pages)
    return call


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.name in SELDOM else []) for c in CASES]
)
def test_equals_dense_attention(case: Case) -> None:
    call = fill(case)
    assert call.error(call.run()) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    ("name", "platform"),
    [
        ("continues", "cpu"),
        ("int8", "tpu"),
        pytest.param("ragged", "cpu", marks=pytest.mark.slow),
        pytest.param("ragged", "tpu", marks=pytest.mark.slow),
        pytest.param("int8", "cpu", marks=pytest.mark.slow),
    ],
)
def test_equals_the_absorbed_form(name: str, platform: str) -> None:
    """Pages of an accelerator included: wider rows, a wider tail. Both read the same bytes."""
    call = fill(named(name), Target(platform, "none"))  # type: ignore[arg-type]
    owned = np.isfinite(call.expected).all(axis=(1, 2))
    got, other = call.run()[owned], call.absorbed()[owned]
    assert np.max(np.linalg.norm(got - other, axis=-1) / np.linalg.norm(other, axis=-1)) < 2 * TOLERANCE["float32"]


@pytest.mark.parametrize("name", ["idle_rows", "all_idle"])
def test_tokens_of_nobody_come_back_finite(name: str) -> None:
    call = fill(named(name))
    assert np.isfinite(call.run()).all()


@pytest.mark.parametrize("broken", ["page", "rotary key", "weight of keys", "weight of values", "position"])
def test_the_check_notices_broken_input(broken: str) -> None:
    call = fill(named("continues"))
    rank = call.case.rank
    if broken == "page":
        call.tables[1] = np.roll(call.tables[1], -1)
    elif broken == "rotary key":
        call.pages = call.pages.at[:, :, rank:].set(jnp.roll(call.pages[:, :, rank:], 1, axis=2))
    elif broken == "weight of keys":
        call.w_uk = call.w_uk.at[0].multiply(1.1)
    elif broken == "weight of values":
        call.w_uv = jnp.roll(call.w_uv, 1, axis=0)
    else:  # every query sees one key too few
        call.case = replace(call.case, lengths=tuple(n - 1 for n in call.case.lengths))
    assert not call.error(call.run()) < 0.01


def test_a_prompts_nan_stays_with_it() -> None:
    """Also where a block of its queries reaches into the next prompt."""
    case = Case(name="neighbours", lengths=(20, 300, 77), queries=(20, 30, 9))
    call = fill(case)
    together = call.run()
    call.pages = call.pages.at[call.tables[1, 17]].set(jnp.nan)
    spoilt = call.run()
    assert np.isnan(spoilt[20:50]).any(), "row 1 sees its own NaN"
    for mine in (slice(0, 20), slice(50, 59)):
        assert spoilt[mine].tobytes() == together[mine].tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": kv_layout(1, 32, "float32")}, "pages of 1 heads of 32 are not latent"),
        ({"width": 33}, "pages are 33 wide"),
        ({"w_uk": (4, 23, 16)}, r"w_uk \(4, 23, 16\) must be \[4, 24, ...\]"),
        ({"w_uv": (3, 24, 12)}, r"w_uv \(3, 24, 12\) must be \[4, 24, ...\]"),
        ({"head_dim": 25}, "q has head_dim 25, w_uk 16 and the rotary key 8"),
        ({"dtype": "bfloat16"}, "q is float32, w_uk is bfloat16"),
        ({"rows": 3}, "block_tables has 3 rows, lengths 2"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    layout = change.get("layout", kv_layout(1, 32, "float32", value_dim=24))
    q, pages = jnp.zeros((2, 4, change.get("head_dim", 24))), jnp.zeros((4, 16, change.get("width", 32)))
    dtype, lens = change.get("dtype", "float32"), jnp.ones(2, jnp.int32)
    w_uk, w_uv = jnp.zeros(change.get("w_uk", (4, 24, 16)), dtype), jnp.zeros(change.get("w_uv", (4, 24, 12)), dtype)
    tables = jnp.zeros((change.get("rows", 2), 2), jnp.int32)
    with pytest.raises(ValueError, match=message):
        expanded_prefill(q, pages, tables, lens, lens, lens, w_uk, w_uv, layout=layout, target=CPU, scale=1.0)


def test_an_implementation_asked_for_by_name_never_falls_back() -> None:
    spec = CASES[0].spec("cpu")
    assert [candidate.name for candidate in CANDIDATES] == ["reference"]
    assert choice(spec, Target("tpu", "v6e")).implementation.name == "reference"
    with pytest.raises(ValueError, match="expanded_prefill has no implementation 'tpu'"):
        choice(spec, Target("tpu", "v6e", (("expanded_prefill", "tpu"),)))
