"""Expanded latent prefill compiled for chips that are not here: neither the pool nor the expanded context is copied.

The short set compiles for v6e; all chips are slow.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.latent_attention import expanded_prefill
from pallas_kernels.latent_attention.cases import REAL, Case
from tests.pallas_kernels import aot

pytestmark = pytest.mark.aot
SHORT = ("deepseek_v3_prefill_2k_of_32k", "v6e")


def size(shape: jax.ShapeDtypeStruct) -> int:
    return shape.size * shape.dtype.itemsize


@pytest.mark.parametrize(
    ("case", "chip"),
    [
        pytest.param(
            case, chip, id=f"{case.name}-{chip}", marks=[] if (case.name, chip) == SHORT else [pytest.mark.slow]
        )
        for case in REAL
        for chip in aot.TOPOLOGIES
    ],
)
def test_compiles_without_the_expanded_context(case: Case, chip: str) -> None:
    target = aot.target(chip)
    spec = case.spec(target.platform)
    rows = jax.ShapeDtypeStruct((spec.rows,), jnp.int32)
    pool = jax.ShapeDtypeStruct(((1 << 31) // spec.page_size // spec.layout.token_bytes, spec.page_size,
                                 spec.layout.width), spec.layout.dtype)  # fmt: skip
    weights = [jax.ShapeDtypeStruct((case.q_heads, case.rank, last), spec.dtype) for last in (case.nope, case.v_dim)]
    shapes = [
        jax.ShapeDtypeStruct((spec.tokens, case.q_heads, case.nope + case.rope), spec.dtype),
        pool,
        jax.ShapeDtypeStruct((spec.rows, spec.pages_per_seq), jnp.int32),
        *[rows] * 3,
        *weights,
    ]
    call = partial(expanded_prefill, layout=spec.layout, target=target, scale=0.1)
    memory = aot.compile_op(call, shapes, chip).memory_analysis()
    assert memory is not None
    state = 4 * (spec.tokens + 256) * case.q_heads * case.v_dim  # float32 values of all queries
    chunk = 256 * case.q_heads * (4 * 256 + 6 * (case.nope + case.v_dim))  # scores, keys and values of a turn
    weight_bytes = sum(map(size, weights))
    assert memory.temp_size_in_bytes < 4 * state + 4 * chunk + 2 * weight_bytes, "no expanded context"
    assert memory.temp_size_in_bytes < size(pool) // 2, "no second pool"
