"""quantized_matmul compiled for chips that are not here: which kernel serves, and no second copy of the weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.quantized import quantized_shape, tree_bytes
from pallas_kernels.quantized_matmul import gpu, quantized_matmul, tpu
from pallas_kernels.quantized_matmul.api import MatmulSpec
from pallas_kernels.quantized_matmul.cases import REAL, SMALL, Case
from pallas_kernels.target import Target
from tests.pallas_kernels import aot

pytestmark = pytest.mark.aot
QUICK = {
    "v5e": ("int8_over_the_edge", "llama_8b_down_int4_128_16", "int4_32_offsets_bf16"),
    "v5p": ("llama_8b_down_int8_1", "int4_32_offsets", "int8_16_offsets"),
    "v6e": ("smollm2_135m_lm_head_int8_16", "smollm2_135m_qkv_int4_64_16", "llama_8b_qkv_e4m3_4096"),
    "tpu7x": ("llama_8b_gate_up_int4_64_64", "llama_8b_down_e4m3_dynamic_16"),
    "h100": ("llama_8b_down_int8_1", "smollm2_135m_down_int4_32_offsets_64", "int4_32_bf16", "int8_32"),
    "h200": ("smollm2_135m_lm_head_int8_16", "llama_8b_gate_up_int4_128_64", "llama_8b_qkv_e4m3_dynamic_16"),
}


def spec_of(case: Case) -> MatmulSpec:
    group = case.group or case.k
    offsets = not case.symmetric
    how = (case.format, group, offsets, case.activations, case.scale_dtype)
    return MatmulSpec(case.tokens, case.k, case.n, case.dtype, *how)


def declines(case: Case, target: Target) -> str | None:
    return (tpu if target.platform == "tpu" else gpu).declines(spec_of(case), target)


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def params() -> list[Any]:
    return [
        pytest.param(chip, case, id=f"{chip}-{case.name}", marks=[] if case.name in quick else [pytest.mark.slow])
        for chip, quick in QUICK.items()
        for case in SMALL + REAL
        if declines(case, aot.target(chip)) is None
    ]


@pytest.mark.parametrize(("chip", "case"), params())
def test_compiles(chip: str, case: Case) -> None:
    platform = aot.target(chip).platform
    target = replace(aot.target(chip), implementations=(("quantized_matmul", platform),))
    kind = (case.format, case.group, case.symmetric, case.activations, jnp.dtype(case.scale_dtype))
    w = quantized_shape((case.k, case.n), *kind)
    x = jax.ShapeDtypeStruct((case.tokens, case.k), jnp.dtype(case.dtype))
    compiled = aot.compile_op(lambda x, w: quantized_matmul(x, w, target=target), (x, w), chip)
    text = aot.hlo(compiled)
    if text is not None:
        assert ("tpu_custom_call" if platform == "tpu" else "mosaic_gpu") in text
    # Copies of x (its columns reordered or made 8-bit, padded to blocks), sums of a split K: never the weight.
    split = gpu.computed_blocks(case.tokens, w, target).splits if platform == "gpu" else 0
    padded = -(-case.tokens // 64) * 64
    allowed = (1 << 20) + 6 * padded * case.k + 4 * (split + 2) * padded * case.n
    temp = temporary_bytes(compiled)
    assert temp < allowed
    if case.tokens <= 64 and tree_bytes(w) > (8 << 20):
        assert temp < tree_bytes(w)


@pytest.mark.parametrize("chip", ["v5e", pytest.param("h200", marks=pytest.mark.slow)])
def test_the_fallback_never_has_a_wide_weight(chip: str) -> None:
    """4096 tokens on a GPU take the reference: it dequantizes 16 Mi weights at a time."""
    target = replace(aot.target(chip), implementations=(("quantized_matmul", "reference"),))
    w = quantized_shape((4096, 28672), "int4", 128)
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    compiled = aot.compile_op(lambda x, w: quantized_matmul(x, w, target=target), (x, w), chip)
    # At most: a block in float32 and bfloat16, and its sums in float32.
    assert temporary_bytes(compiled) < (1 << 24) * 8 + 2 * 4 * 4096 * 4096 + (32 << 20)


def test_what_the_gpu_leaves_to_the_reference() -> None:
    declined = {case.name for case in REAL if declines(case, aot.target("h200"))}
    assert declined == {case.name for case in REAL if case.tokens == 4096 or case.group == 16}
    assert not [case.name for case in REAL if declines(case, aot.target("v5e"))]
