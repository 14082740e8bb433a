"""Paged attention and kv_write compiled for TPUs that are not here: the kernel is in the program, the pool once.

The short set compiles for v6e; `-m "aot and slow"` compiles every case for every chip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from pallas_kernels.kv_layout import KVDtype, kv_layout
from pallas_kernels.kv_write import tpu as kv_write
from pallas_kernels.kv_write import write_kv
from pallas_kernels.paged_attention import decode_attention, decode_part, prefill_attention, prefill_part, tpu
from pallas_kernels.paged_attention.api import choice
from pallas_kernels.paged_attention.cases import CASES, REAL, Case
from pallas_kernels.paged_attention.part import Part
from pallas_kernels.target import Target
from tests.pallas_kernels import aot

pytestmark = pytest.mark.aot
OFTEN = {
    "decode_gqa_3",
    "decode_e5m2",
    "prefill_sinks_bfloat16",
    "prefill_int8",
    "llama8b_decode_64x1k",
    "llama8b_decode_64x1k_int8",
    "llama8b_prefill_1k",
    "gpt_oss_decode_32x4k_sinks",
    "deepseek_v3_decode_32x4k",
    "deepseek_v2_lite_prefill_512_of_4k",
}
SPREAD = ("llama8b_decode_64x1k", "llama8b_prefill_1k", "deepseek_v3_decode_32x4k", "llama8b_decode_64x1k_int8")
WRITES: dict[str, tuple[KVDtype, int, int]] = {  # dtype, tokens, KV heads of 128
    "decode_bfloat16": ("bfloat16", 64, 8),
    "decode_int8": ("int8", 64, 8),
    "decode_float32": ("float32", 8, 2),
    "prefill_e4m3": ("float8_e4m3fn", 1024, 8),
    "prefill_e5m2": ("float8_e5m2", 1024, 1),
    "prefill_mha_bfloat16": ("bfloat16", 2048, 32),
}
SHORT_WRITES = {"decode_bfloat16", "decode_int8", "prefill_e4m3"}


def everywhere(names: Iterable[str], often: set[str]) -> list[Any]:
    """(name, chip): slow but for the short set on v6e."""
    return [
        pytest.param(
            name, chip, id=f"{name}-{chip}", marks=[] if chip == "v6e" and name in often else [pytest.mark.slow]
        )
        for name in names
        for chip in aot.CHIPS["tpu"]
    ]


def attention(
    case: Case, target: Target, pages: int | None = None
) -> tuple[Callable[..., Array], list[jax.ShapeDtypeStruct]]:
    spec = case.spec("tpu")
    pages = pages or max(
        64, 4 * sum(-(-n // case.page_size) for n in case.lengths)
    )  # a pool is more than one call's pages
    rows = jax.ShapeDtypeStruct((spec.rows,), jnp.int32)
    shapes = [
        jax.ShapeDtypeStruct((spec.tokens, spec.q_heads, case.head_dim), case.dtype),
        jax.ShapeDtypeStruct((pages, case.page_size, spec.layout.width), spec.layout.dtype),
        jax.ShapeDtypeStruct((spec.rows, spec.pages_per_seq), jnp.int32),
        *[rows] * (1 if case.queries is None else 3),
        jax.ShapeDtypeStruct((spec.q_heads,), jnp.float32),
    ]
    op = decode_attention if case.queries is None else prefill_attention
    fixed = {"layout": spec.layout, "target": target, "scale": 0.1, "softcap": case.softcap, "window": case.window}
    return lambda *a: op(*a[:-1], sinks=a[-1] if case.sinks else None, **fixed), shapes


def size(shape: jax.ShapeDtypeStruct) -> int:
    return shape.size * shape.dtype.itemsize


@pytest.mark.parametrize(("name", "chip"), everywhere((case.name for case in CASES + REAL), OFTEN))
def test_attention_compiles_and_reads_the_pool_in_place(name: str, chip: str) -> None:
    case = next(case for case in CASES + REAL if case.name == name)
    target = aot.target(chip)
    function, shapes = attention(case, target)
    chosen = choice(case.spec("tpu"), target)
    if chosen.implementation.name != "tpu":
        assert "page_size" in str(chosen) or "latents of 128 lanes" in str(chosen)
        return
    compiled = aot.compile_op(function, shapes, chip)
    text = aot.hlo(compiled)
    assert text is None or "tpu_custom_call" in text
    memory = compiled.memory_analysis()
    assert memory is not None
    padded = 3 * tpu.padded_bytes(case.spec("tpu"), target) + (2 << 20)  # q and result laid out in blocks, small change
    assert memory.temp_size_in_bytes < padded
    if case in REAL and case.queries is None:
        assert memory.temp_size_in_bytes < size(shapes[1]) // 8, "no second pool"


@pytest.mark.parametrize(("name", "chip"), everywhere(SPREAD, {"llama8b_decode_64x1k"}))
def test_parts_of_pages_compile(name: str, chip: str) -> None:
    """Of pages whose tokens are spread over four devices: no second pool, and no whole pages."""
    case, target = next(case for case in REAL if case.name == name), aot.target(chip)
    spec = replace(case.spec("tpu"), parts=4)
    assert choice(spec, target).implementation.name == "tpu"
    _, (q, pages, tables, *rows, _) = attention(case, target)
    op: Callable[..., tuple[Array, Array]] = decode_part if case.queries is None else prefill_part
    how = {"layout": spec.layout, "target": target, "scale": 0.1}

    def here(q: Array, pages: Array, tables: Array, index: Array, *rows: Array) -> tuple[Array, Array]:
        return op(q, pages, tables, *rows, Part(index, 4), **how)

    shapes = [q, pages, tables, jax.ShapeDtypeStruct((), jnp.int32), *rows]
    compiled = aot.compile_op(here, shapes, chip)
    text, memory = aot.hlo(compiled), compiled.memory_analysis()
    assert text is None or "tpu_custom_call" in text
    assert memory is not None
    padded = 8 * tpu.padded_bytes(spec, target) + (2 << 20)  # float32 values, and a tile's lanes for each log-sum-exp
    assert memory.temp_size_in_bytes < padded


@pytest.mark.slow
@pytest.mark.parametrize("chip", aot.CHIPS["tpu"])
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("case", [case for case in REAL if case.value_dim is not None], ids=lambda case: case.name)
def test_latents_compile_at_every_page_size(case: Case, page_size: int, chip: str) -> None:
    """A pool of a GiB is not copied; 512 queries of 128 heads are 80 MiB, which are laid out in blocks."""
    case, target = replace(case, page_size=page_size), aot.target(chip)
    spec = case.spec("tpu")
    if spec.layout.quantized and page_size < 32:
        assert "page_size 16" in (tpu.declines(spec, target) or "")
        return
    assert tpu.declines(spec, target) is None
    function, shapes = attention(case, target, pages=(1 << 30) // page_size // spec.layout.token_bytes)
    memory = aot.compile_op(function, shapes, chip).memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < size(shapes[1]) // 4, "no second pool"


@pytest.mark.parametrize(("name", "chip"), everywhere(WRITES, SHORT_WRITES))
def test_kv_write_compiles_in_place(name: str, chip: str) -> None:
    dtype, tokens, heads = WRITES[name]
    layout, target = kv_layout(heads, 128, dtype, "tpu"), aot.target(chip)
    pool = jax.ShapeDtypeStruct((4096, 32, layout.width), dtype)
    new = jax.ShapeDtypeStruct((tokens, heads, 128), jnp.float32 if dtype == "float32" else jnp.bfloat16)
    places = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    write = partial(write_kv, layout=layout, target=target)
    compiled = aot.compile_op(write, [pool, new, new, places, places], chip, donate=(0,))
    text, memory = aot.hlo(compiled), compiled.memory_analysis()
    assert text is None or "tpu_custom_call" in text
    assert memory is not None and memory.alias_size_in_bytes == size(pool)
    assert memory.temp_size_in_bytes < size(pool) // 8, "no second pool"


@pytest.mark.slow
@pytest.mark.parametrize("chip", aot.CHIPS["tpu"])
@pytest.mark.parametrize(("dtype", "tokens"), [("bfloat16", 64), ("bfloat16", 1024), ("int8", 64)])
def test_latents_are_written_in_place(dtype: KVDtype, tokens: int, chip: str) -> None:
    layout, target = kv_layout(1, 576, dtype, "tpu", value_dim=512), aot.target(chip)
    pool = jax.ShapeDtypeStruct((8192, 32, layout.width), dtype)
    new = jax.ShapeDtypeStruct((tokens, 1, 576), jnp.bfloat16)
    places = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def write(pages: Array, latents: Array, ids: Array, offsets: Array) -> Array:
        return write_kv(pages, latents, None, ids, offsets, layout=layout, target=target)

    compiled = aot.compile_op(write, [pool, new, places, places], chip, donate=(0,))
    text, memory = aot.hlo(compiled), compiled.memory_analysis()
    assert text is None or "tpu_custom_call" in text
    assert memory is not None and memory.alias_size_in_bytes == size(pool)
    assert memory.temp_size_in_bytes < size(pool) // 8, "no second pool"


def test_the_check_sees_a_second_pool() -> None:
    """XLA's scatter into pages of int8 copies them: why the kernel is there."""
    target = Target("tpu", "v6e", implementations=(("kv_write", "reference"),))
    layout = kv_layout(8, 128, "int8", "tpu")
    pool = jax.ShapeDtypeStruct((4096, 32, layout.width), "int8")
    new, places = jax.ShapeDtypeStruct((64, 8, 128), jnp.bfloat16), jax.ShapeDtypeStruct((64,), jnp.int32)
    write = partial(write_kv, layout=layout, target=target)
    memory = aot.compile_op(write, [pool, new, new, places, places], "v6e", donate=(0,)).memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes >= size(pool)


@pytest.mark.parametrize("chip", aot.CHIPS["tpu"])
def test_scratch_fits_every_chip(chip: str) -> None:
    """What docs/aot.md prints: VMEM that the calls name."""
    target = aot.target(chip)
    facts = target.facts
    assert facts is not None
    for case in REAL:
        assert 0 < tpu.scratch_bytes(case.spec("tpu"), target) <= facts.scratch_bytes // 2
    for dtype, tokens, heads in WRITES.values():
        shape = kv_write.shape_for(tokens, kv_layout(heads, 128, dtype, "tpu").width, dtype)
        assert 0 < shape.bytes <= facts.scratch_bytes // 2
