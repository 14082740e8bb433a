"""Paged attention on a CPU's own paths, the compiled kernels and plain JAX, against dense attention in numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_layout import kv_layout
from pallas_kernels.kv_write import write_kv
from pallas_kernels.native import library
from pallas_kernels.paged_attention import cpu, decode_attention, prefill_attention
from pallas_kernels.paged_attention.api import choice
from pallas_kernels.paged_attention.cases import CASES, Case
from pallas_kernels.target import CPU, Target
from tests.pallas_kernels.attention_calls import TOLERANCE, dense, fill, shift_pages, swap_keys_with_values

NATIVE = Target(native=library().isa)
needs_native = pytest.mark.skipif(not NATIVE.native, reason=library().missing)
own_paths = pytest.mark.parametrize(
    "target", [pytest.param(CPU, id="plain"), pytest.param(NATIVE, id="compiled", marks=needs_native)]
)
COMPILED = [case for case in CASES if cpu.declines(case.spec("cpu"), Target(native=NATIVE.native or "avx2")) is None]


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_dense_attention(case: Case) -> None:
    assert fill(case).error() < TOLERANCE[case.dtype]


@needs_native
@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.name)
def test_compiled_kernels_equal_dense_attention(case: Case) -> None:
    assert choice(case.spec("cpu"), NATIVE).implementation.name == "cpu"
    assert fill(case, NATIVE).error() < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("decode_e5m2", "pages in float8_e5m2"),
        ("decode_latent_int8", "a quantized latent has two scales a vector"),
        ("decode_latent_lanes", "heads of 40 and values of 24: not multiples of 16"),
    ],
)
def test_what_the_compiled_kernels_decline(name: str, reason: str) -> None:
    assert ("cpu", reason) in choice(named(name).spec("cpu"), Target(native="avx512")).declined


@pytest.mark.parametrize(
    "name",
    ["decode_head_80", "decode_int8_head_80", "decode_latent_int8", "prefill_window", "prefill_int8", "prefill_latent"],
)
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_reference_reads_an_accelerators_layout(name: str, platform: str) -> None:
    """Where a kernel declines, the reference serves: wider heads, a wider tail."""
    case = named(name)
    target = Target(platform, "none")  # type: ignore[arg-type]
    assert fill(case, target).error() < TOLERANCE[case.dtype]


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
@own_paths
def test_tokens_of_nobody_come_back_finite(name: str, target: Target) -> None:
    call = fill(named(name), target)
    call.q = jnp.nan_to_num(call.q)  # as in a step, where padding is the hidden state of token 0
    assert np.isfinite(call.run()).all()


BROKEN = ["decode_gqa_3", "decode_latent", "prefill_continues", "prefill_latent"]


@own_paths
@pytest.mark.parametrize("name", BROKEN)
def test_the_check_notices_keys_swapped_with_values(name: str, target: Target) -> None:
    call = fill(named(name), target)
    swap_keys_with_values(call)
    assert not call.error() < 0.1


@own_paths
@pytest.mark.parametrize("name", BROKEN)
def test_the_check_notices_a_shifted_page(name: str, target: Target) -> None:
    call = fill(named(name), target)
    shift_pages(call, 1)
    assert not call.error() < 0.01


@pytest.mark.parametrize("case", [named("decode_window"), named("prefill_window")], ids=lambda case: case.name)
@own_paths
def test_the_check_notices_a_window_of_one_more(case: Case, target: Target) -> None:
    call = fill(case, target)
    assert case.window is not None
    call.case = replace(case, window=case.window + 1)
    assert not call.error() < 0.01


@pytest.mark.parametrize("name", ["decode_sinks", "prefill_sinks"])
@own_paths
def test_the_check_notices_a_sink_left_out(name: str, target: Target) -> None:
    call = fill(named(name), target)
    call.sinks = None
    assert not call.error() < 0.01


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        ("decode_int8", 0),  # the first key
        ("prefill_e4m3", 0),
        ("decode_latent_int8", 0),  # the lanes that are the value too
        ("decode_latent_int8", 1),  # the others
        ("prefill_latent_int8", 1),
    ],
)
def test_the_check_notices_an_exponent_off_by_one(name: str, vector: int) -> None:
    call = fill(named(name))
    raw = np.array(call.pages).view(np.int8)
    raw[..., call.case.layout("cpu").tail + vector] += 1
    call.pages = jnp.asarray(raw.view(call.pages.dtype))
    assert not call.error() < 0.01


@own_paths
def test_a_rows_result_does_not_depend_on_the_others(target: Target) -> None:
    """Bit for bit: the same row with long, short, idle and NaN-ridden neighbours."""
    case = Case(name="neighbours", lengths=(20, 300, 0, 77), window=50)
    call = fill(case, target)
    together = call.run()
    spoilt = replace(call, pages=call.pages.at[call.tables[1, 17]].set(jnp.nan))
    assert np.isnan(spoilt.run()[1]).any(), "row 1 sees its own NaN"
    for row in (0, 3):
        lengths = tuple(n if i == row else 0 for i, n in enumerate(case.lengths))
        alone = replace(call, case=replace(case, lengths=lengths)).run()
        assert alone[row].tobytes() == together[row].tobytes() == spoilt.run()[row].tobytes()


@needs_native
@pytest.mark.parametrize(
    "case",
    [
        Case(name="whole", lengths=(1100,), queries=(1100,), q_heads=3, kv_heads=1),  # parts are merged
        Case(name="whole", lengths=(600,), queries=(600,), q_heads=8, kv_heads=2, window=70, softcap=9.0, sinks=True),
        Case(name="whole", lengths=(560,), queries=(560,), kv_dtype="int8", dtype="bfloat16"),
    ],
    ids=["long", "window", "int8"],
)
def test_a_query_has_the_same_bits_in_every_chunk_and_as_a_decode_row(case: Case) -> None:
    """Compiled kernels: what chunking, preemption and prefix hits change is not the result."""
    call, length = fill(case, NATIVE), case.lengths[0]
    whole = call.run()
    for count in (1, 5, 33, 129):
        part = replace(call, case=replace(case, queries=(count,)), q=call.q[length - count :])
        assert part.run().tobytes() == whole[length - count :].tobytes(), count
    row = replace(call, case=replace(case, queries=None), q=call.q[length - 1 :])
    assert row.run().tobytes() == whole[length - 1 :].tobytes()


@own_paths
def test_written_keys_are_what_attention_reads(target: Target) -> None:
    """`write_kv` and `decode_attention` agree on the layout of a page."""
    case = Case(name="written", lengths=(21, 6))
    call = fill(case, target)
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
        layout=case.layout("cpu"),
        target=target,
    )
    for i, length in enumerate(case.lengths):
        call.expected[i] = dense(np.asarray(call.q[i]), k[row == i], v[row == i], length - 1, case, call.scale, None)
    assert call.error() < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 100}, "pages are 100 wide"),
        ({"q_heads": 3}, "q_heads 3 must be a multiple of kv_heads 2"),
        ({"rows": 3}, "block_tables has 3 rows, lengths 2"),
        ({"head_dim": 32}, "q has head_dim 32, the layout 64"),
        ({"sinks": 5}, r"sinks \(5,\) must be one a query head"),
        ({"dtype": "bfloat16"}, "q is float32, pages are bfloat16"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    q_heads = change.get("q_heads", 4)
    dtype = change.get("dtype", "float32")
    q = jnp.zeros((2, q_heads, change.get("head_dim", 64)))
    pages = jnp.zeros((4, 16, change.get("width", 256)), dtype)
    tables, lens = jnp.zeros((change.get("rows", 2), 2), jnp.int32), jnp.ones(2, jnp.int32)
    how: dict[str, Any] = {
        "layout": kv_layout(2, 64, dtype),
        "target": CPU,
        "scale": 1.0,
        "sinks": jnp.zeros(change["sinks"]) if "sinks" in change else None,
    }
    with pytest.raises(ValueError, match=message):
        decode_attention(q, pages, tables, lens, **how)
    with pytest.raises(ValueError, match=message):
        prefill_attention(q, pages, tables, lens, lens, lens, **how)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_an_implementation_asked_for_by_name_never_falls_back(kind: str) -> None:
    spec = next(case for case in CASES if case.name.startswith(kind)).spec("cpu")
    op = f"{kind}_attention"
    with pytest.raises(ValueError, match=f"{op} has no implementation 'fastest'; there are "):
        choice(spec, Target(implementations=((op, "fastest"),)))
    assert choice(spec, Target(implementations=((op, "reference"),))).implementation.name == "reference"
