"""Hopper kernels of paged attention compiled for chips that are not here; the short set on an H100, all of it slow."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import decode_attention, gpu, prefill_attention
from pallas_kernels.paged_attention.cases import CASES, REAL, Case
from pallas_kernels.target import Target
from tests.pallas_kernels.aot import CHIPS, compile_op, hlo

pytestmark = pytest.mark.aot
SHORT = {"llama8b_decode_64x1k", "llama8b_decode_64x1k_int8", "llama8b_prefill_chunk_of_8k"}
COMPILED = [case for case in REAL + CASES if gpu.declines(case.spec("gpu"), Target("gpu", "h100")) is None]


def compiled(case: Case, chip: str) -> tuple[jax.stages.Compiled, int]:
    """The op by its public function, and the bytes of its pool: a quarter more pages than the rows have."""
    asked = (("decode_attention", "gpu"), ("prefill_attention", "gpu"))
    layout, rows, spec = case.layout("gpu"), len(case.lengths), case.spec("gpu")
    options: dict[str, Any] = {
        "layout": layout,
        "target": Target("gpu", chip, asked),
        "scale": case.head_dim**-0.5,
        "softcap": case.softcap,
        "window": case.window,
    }
    pages = max(64, sum(-(-n // case.page_size) for n in case.lengths) * 5 // 4)
    q = jax.ShapeDtypeStruct((case.num_tokens, case.q_heads, case.head_dim), jnp.dtype(case.dtype))
    pool = jax.ShapeDtypeStruct((pages, case.page_size, layout.width), jnp.dtype(layout.dtype))
    tables = jax.ShapeDtypeStruct((rows, spec.pages_per_seq), jnp.int32)
    per_row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    sinks = jax.ShapeDtypeStruct((case.q_heads,), jnp.float32) if case.sinks else None
    op, counts = (decode_attention, 1) if case.queries is None else (prefill_attention, 3)

    def call(q: Any, pool: Any, tables: Any, sinks: Any, *per_row: Any) -> jax.Array:
        return partial(op, **options)(q, pool, tables, *per_row, sinks=sinks)

    program = compile_op(call, (q, pool, tables, sinks, *[per_row] * counts), chip)
    return program, pool.size * pool.dtype.itemsize


def check(case: Case, program: jax.stages.Compiled, pool_bytes: int) -> None:
    """On the kernel, and without a second pool; tiles of prefill's queries and results may outweigh a small one."""
    text, memory = hlo(program), program.memory_analysis()
    assert text is not None and "mosaic_gpu" in text
    assert memory is not None
    most = pool_bytes / 4
    if case.queries is not None:
        most = max(most, 4 * case.num_tokens * case.q_heads * case.head_dim * 2 + (1 << 22))
    if pool_bytes > 1 << 24 or case.num_tokens >= 1024:
        assert memory.temp_size_in_bytes < most


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS["gpu"])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("case", [case for case in COMPILED if case.head_dim == 576], ids=lambda case: case.name)
def test_latents_compile_at_every_page_size(case: Case, page_size: int, chip: str) -> None:
    check(case, *compiled(replace(case, page_size=page_size), chip))


@pytest.mark.parametrize(
    ("case", "chip"),
    [
        pytest.param(
            case,
            chip,
            id=f"{case.name}-{chip}",
            marks=() if case.name in SHORT and chip == "h100" else pytest.mark.slow,
        )
        for case in COMPILED
        for chip in CHIPS["gpu"]
    ],
)
def test_compiles_to_the_kernel_without_a_second_pool(case: Case, chip: str) -> None:
    check(case, *compiled(case, chip))
