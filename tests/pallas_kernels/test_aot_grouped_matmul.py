"""grouped_matmul compiles for chips that are not here, without a second copy of the weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.choice import KernelDeclined
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.api import choice
from pallas_kernels.grouped_matmul.cases import REAL, SMALL, Case
from pallas_kernels.quantized import quantized_shape, tree_bytes
from pallas_kernels.target import Target
from tests.pallas_kernels import aot

pytestmark = pytest.mark.aot
CALLS = {"tpu": "tpu_custom_call", "gpu": "mosaic_gpu"}
# The first chip of each compiler on all paths; every chip on every case is slow.
SHORT = {
    "v6e": {"qwen3_30b_up_32", "qwen3_30b_up_4k_int4", "mixtral_8x7b_down_4k", "e4m3_dynamic"},
    "tpu7x": {"qwen3_30b_up_32_e4m3"},
    "h100": {"qwen3_30b_up_4k", "qwen3_30b_up_4k_int4", "int8", "int4_groups_of_96_offsets", "e4m3_dynamic"},
    "h200": {"qwen3_30b_up_32", "qwen3_30b_up_32_int8", "int4_groups_of_256"},
}
MATRIX = [
    pytest.param(chip, case, id=f"{chip}-{case.name}", marks=() if case.name in names else pytest.mark.slow)
    for chip in aot.TOPOLOGIES
    for names in [SHORT.get(chip, set())]
    for case in SMALL + REAL
]


def inputs(case: Case) -> tuple[Any, Any, Any]:
    """Abstract x, w, group_sizes."""
    shape = (len(case.sizes), case.k, case.n)
    dtype = jnp.dtype(case.dtype)
    if case.format == "none":
        w = jax.ShapeDtypeStruct(shape, dtype)
    else:
        how = (case.format, case.group, case.symmetric, case.activations, jnp.dtype(case.scale_dtype))
        w = quantized_shape(shape, *how)
    x = jax.ShapeDtypeStruct((case.num_tokens, case.k), dtype)
    return x, w, jax.ShapeDtypeStruct((len(case.sizes),), jnp.int32)


@pytest.mark.parametrize(("chip", "case"), MATRIX)
def test_compiles_without_a_copy_of_the_weights(chip: str, case: Case) -> None:
    platform = aot.target(chip).platform
    target = Target(platform, chip, (("grouped_matmul", platform),))
    try:
        choice(case.spec(), target)
    except KernelDeclined as reason:
        pytest.skip(str(reason))
    x, w, sizes = inputs(case)
    compiled = aot.compile_op(partial(grouped_matmul, target=target), (x, w, sizes), chip)
    text = aot.hlo(compiled)
    assert text is None or CALLS[platform] in text
    # x may be put in another order, by way of padded copies; the plan of visits and XLA's own reserve are small.
    allowed = 4 * x.size * x.dtype.itemsize + (2 << 20)
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes <= allowed
    if case in REAL and case.num_tokens <= 256:
        assert memory.temp_size_in_bytes < tree_bytes(w) / 8


def test_the_choice_says_why_not() -> None:
    case = next(case for case in REAL if case.name == "qwen3_30b_up_32")
    assert str(choice(case.spec(), aot.target("v6e"))).startswith("grouped_matmul: tpu")
    assert "for tpu" in str(choice(case.spec(), Target()))
