"""Rows times their experts' weights, against numpy in float64; every implementation passes the same cases.

Rows of nobody and the weights of experts without rows are NaN: nothing may leak from them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.choice import KernelDeclined
from pallas_kernels.grouped_matmul import gpu, gpu_packed, grouped_matmul
from pallas_kernels.grouped_matmul.api import GroupedSpec, choice
from pallas_kernels.grouped_matmul.cases import REAL, SMALL, Case, even, skewed
from pallas_kernels.packed_gpu import packed
from pallas_kernels.quantized import Quantized, dequantize, quantize, quantized_shape
from pallas_kernels.quantized_matmul.reference import quantize_rows
from pallas_kernels.target import CPU, Target

TARGETS = {
    "reference": CPU,
    "tpu": Target("tpu", "v6e", (("grouped_matmul", "tpu"),), interpret=True),
    "gpu": Target("gpu", "h100", (("grouped_matmul", "gpu"),), interpret=True),
    "tpu_without_8_bit_products": Target("tpu", "tpu7x", (("grouped_matmul", "tpu"),), interpret=True),
}
KERNELS = [name for name in TARGETS if name not in ("reference", "tpu_without_8_bit_products")]
# Interpreters are slow; each of these reaches something that no other of them does. The rest are slow tests.
SHORT = {
    "no_rows",
    "over_a_tile",
    "bfloat16",
    "int8",
    "int8_dynamic",
    "int4_groups_of_64_offsets",
    "int4_groups_of_32_bf16",
    "int4_groups_of_256",
    "int4_many_rows",
    "e4m3",
    "k_in_steps",
}
# Largest error of a row over its largest number: half a step of the result's dtype and the sums' rounding.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8 * 1.01}


def tolerance(case: Case) -> float:
    """Weights with several scales a column are rounded to x's dtype too."""
    return TOLERANCE[case.dtype] * (1.0 if case.format == "none" or case.group is None else 1.5)


def cases(implementation: str) -> list[Any]:
    """Test parameters (implementation, case)."""
    found = [case for case in SMALL if "dynamic" in case.name or implementation != "tpu_without_8_bit_products"]
    return [
        pytest.param(
            implementation,
            case,
            id=f"{implementation}-{case.name}",
            marks=() if implementation == "reference" or case.name in SHORT else pytest.mark.slow,
        )
        for case in found
    ]


@dataclass(frozen=True)
class Call:
    """A case as arrays, and the float64 result of its rows that belong to an expert."""

    x: jax.Array
    w: jax.Array | Quantized
    sizes: jax.Array
    wanted: np.ndarray


def make(case: Case, seed: int = 0) -> Call:
    rng = np.random.default_rng(seed)
    rows = sum(case.sizes)
    numbers = rng.normal(size=(case.num_tokens, case.k)) * 10.0 ** rng.integers(-3, 3, size=(case.num_tokens, 1))
    numbers[rows:] = np.nan
    x = jnp.asarray(numbers, case.dtype)
    idle = np.asarray(case.sizes) == 0
    w, exact = weights(case, rng, idle)
    expert_of = np.repeat(np.arange(len(case.sizes)), case.sizes)
    wide = as_multiplied(x[:rows], case)
    products = [wide[expert_of == e] @ exact[e] for e in range(len(case.sizes))]
    return Call(x, w, jnp.asarray(case.sizes, jnp.int32), np.concatenate(products))


def weights(case: Case, rng: np.random.Generator, idle: np.ndarray) -> tuple[Any, np.ndarray]:
    """The weight with NaN for experts without rows, and its exact value in float64."""
    dense = (rng.normal(size=(len(case.sizes), case.k, case.n)) / case.k**0.5).astype(np.float32)
    if case.format == "none":
        dense[idle] = np.nan
        w = jnp.asarray(dense, case.dtype)
        return w, np.asarray(w, np.float64)
    how = (case.format, case.group, case.symmetric, case.activations, jnp.dtype(case.scale_dtype))
    packed = quantize(dense, *how)
    packed.scales[idle] = np.nan  # type: ignore[index]
    return jax.tree.map(jnp.asarray, packed), np.asarray(dequantize(packed), np.float64)


def as_multiplied(x: jax.Array, case: Case) -> np.ndarray:
    """x as the product sees it, float64: rounded to the weight's format with dynamic activations."""
    if case.activations == "float" or not x.size:
        return np.asarray(x, np.float64)
    numbers, scales = quantize_rows(x, case.format)
    return np.asarray(numbers, np.float64) * np.asarray(scales, np.float64)


def run(target: Target, case: Case, call: Call) -> np.ndarray:
    """[tokens, N]; skips where the implementation says that it does not serve the case."""
    try:
        choice(case.spec(), target)
    except KernelDeclined as reason:
        pytest.skip(str(reason))
    result = jax.jit(partial(grouped_matmul, target=target))(call.x, call.w, call.sizes)
    assert result.dtype == call.x.dtype
    return np.asarray(result.astype(jnp.float32))


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest over the rows of |got - wanted| over the row's largest number."""
    if not wanted.size:
        return 0.0
    return float((np.abs(got - wanted).max(axis=1) / np.abs(wanted).max(axis=1)).max())


@pytest.mark.parametrize(("implementation", "case"), [param for name in TARGETS for param in cases(name)])
def test_each_row_gets_its_experts_product(implementation: str, case: Case) -> None:
    call = make(case)
    got = run(TARGETS[implementation], case, call)
    assert np.isfinite(got).all()
    assert error(got[: sum(case.sizes)], call.wanted) <= tolerance(case)


@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
def test_the_check_fails_when_groups_are_shifted_by_one_row(implementation: str) -> None:
    case = Case(name="shifted", sizes=(5, 7, 4), dtype="bfloat16")
    call = make(case)
    shifted = replace(call, sizes=jnp.asarray((6, 6, 4), jnp.int32))
    got = run(TARGETS[implementation], case, shifted)
    assert error(got, call.wanted) > 100 * TOLERANCE[case.dtype]


def swapped_nibbles(w: Quantized) -> Quantized:
    return replace(w, values=(w.values >> 4) | (w.values << 4))


def moved_scales(w: Quantized) -> Quantized:
    return replace(w, scales=jnp.roll(w.scales, 1, axis=1))


def moved_offsets(w: Quantized) -> Quantized:
    assert w.offsets is not None
    return replace(w, offsets=jnp.roll(w.offsets, 1, axis=1))


def next_expert(w: Quantized) -> Quantized:
    return replace(w, values=jnp.roll(w.values, 1, axis=0))


@pytest.mark.parametrize("spoil", [swapped_nibbles, moved_scales, moved_offsets, next_expert])
@pytest.mark.parametrize("implementation", ["reference", pytest.param("tpu", marks=pytest.mark.slow), "gpu"])
def test_the_check_fails_when_a_packed_weight_is_spoilt(implementation: str, spoil: Any) -> None:
    case = Case(name="spoilt", sizes=(5, 4), format="int4", group=64, symmetric=False, dtype="bfloat16")
    call = make(case)
    assert isinstance(call.w, Quantized)
    got = run(TARGETS[implementation], case, replace(call, w=spoil(call.w)))
    assert error(got, call.wanted) > 10 * tolerance(case)


@pytest.mark.parametrize("format", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "implementation", ["reference", *(pytest.param(name, marks=pytest.mark.slow) for name in KERNELS)]
)
def test_a_row_does_not_depend_on_its_neighbours_bit_for_bit(implementation: str, dtype: Any, format: Any) -> None:
    """The same rows among others, at other places, with other borders."""
    sizes = (30, 0, 3, 7)
    case = Case(name="alone", sizes=sizes, k=256, dtype=dtype, format=format, group=64 if format == "int4" else None)
    call = make(replace(case, sizes=(10, 10, 10, 10)))
    order = np.random.default_rng(1).permutation(40)
    first = run(TARGETS[implementation], case, replace(call, sizes=jnp.asarray((10, 10, 10, 10), jnp.int32)))
    moved = run(TARGETS[implementation], case, replace(call, x=call.x[order], sizes=jnp.asarray(sizes, jnp.int32)))
    expert_first, expert_moved = (np.repeat(np.arange(4), s) for s in ((10, 10, 10, 10), sizes))
    same = [(i, j) for j, i in enumerate(order) if expert_first[i] == expert_moved[j]]
    assert len(same) > 5
    assert all(first[i].tobytes() == moved[j].tobytes() for i, j in same)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_any_group_sizes(sizes: list[int], seed: int) -> None:
    """One program serves them all; what is beyond `tokens` is cut off."""
    tokens = 64
    case = Case(name="any", sizes=(16, 16, 16, 16))
    call = make(case, seed)
    ends = np.minimum(np.cumsum(sizes), tokens)
    expert_of = np.repeat(np.arange(4), np.diff(ends, prepend=0))
    got = np.asarray(_any_sizes(call.x.at[ends[-1] :].set(jnp.nan), call.w, jnp.asarray(sizes, jnp.int32)))
    x, w = np.asarray(call.x, np.float64), np.asarray(call.w, np.float64)
    wanted = np.einsum("tk,tkn->tn", x[: ends[-1]], w[expert_of])
    assert np.isfinite(got).all()
    assert error(got[: ends[-1]], wanted) <= TOLERANCE["float32"]


_any_sizes = jax.jit(partial(grouped_matmul, target=CPU))


def test_a_call_that_does_not_fit_together_names_the_numbers() -> None:
    x, w, sizes = jnp.zeros((4, 16)), jnp.zeros((2, 16, 8)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="K 16, the weight 8"):
        grouped_matmul(x, jnp.zeros((2, 8, 8)), sizes, target=CPU)
    with pytest.raises(ValueError, match=r"int32 \(2,\)"):
        grouped_matmul(x, w, jnp.zeros(3, jnp.int32), target=CPU)
    with pytest.raises(ValueError, match="bfloat16"):
        grouped_matmul(x, w.astype(jnp.bfloat16), sizes, target=CPU)
    with pytest.raises(ValueError, match="experts, K, N"):
        grouped_matmul(x, w[0], sizes, target=CPU)


def test_cases_say_what_they_mean() -> None:
    names = [case.name for case in SMALL + REAL]
    assert len(set(names)) == len(names)
    for rows, experts in ((8, 128), (256, 128), (32768, 128), (8192, 8)):
        assert sum(even(rows, experts)) == sum(skewed(rows, experts)) == rows
        assert len(even(rows, experts)) == len(skewed(rows, experts)) == experts


@pytest.mark.parametrize(("platform", "chip"), [("tpu", "v6e"), ("gpu", "h100")])
@pytest.mark.parametrize(("format", "group"), [("int8", 128), ("int8", 32), ("int4", 32)])
def test_rows_rounded_by_blocks_are_left_to_plain_jax(platform: Any, chip: str, format: Any, group: int) -> None:
    """The kernel knows one scale a row and would multiply by another rounding's numbers."""
    spec = GroupedSpec(4, 128, 128, 2, "bfloat16", format, group, activations="dynamic_32")
    made = choice(spec, Target(platform, chip))
    assert made.implementation.name == "reference"
    assert dict(made.declined)[platform] == "activations with a scale for every 32"


@pytest.mark.parametrize(("platform", "chip"), [("tpu", "v6e"), ("gpu", "h100")])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale_dtype": "float16"}, "scales are float16"),
        ({"group": 16}, "groups of 16 rows"),
        ({"group": 48}, "groups of 48 rows"),
        ({"group": 1024}, "groups of 1024 rows"),
        ({"group": 2048, "offsets": True}, "groups of 2048 rows"),
        ({"format": "int8", "activations": "dynamic"}, "dynamic activations with groups of 64"),
        ({"dtype": "float16"}, "x is float16"),
        ({"k": 2080, "group": 32}, "K 2080"),
        ({"n": 100}, "N 100"),
    ],
)
def test_declines_name_the_numbers(platform: Any, chip: str, change: dict[str, Any], reason: str) -> None:
    spec = replace(GroupedSpec(4, 2048, 256, 2, "bfloat16", "int4", 64), **change)
    assert reason in dict(choice(spec, Target(platform, chip)).declined)[platform]


@pytest.mark.parametrize("group", [*range(32, 513, 32), None])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_every_group_has_stages_on_a_gpu(format: Any, group: int | None) -> None:
    """Of whole groups or parts of one, whole left operands of both halves; two stages and a result fit the memory."""
    target, k = Target("gpu", "h100"), 64 * (group or 7)
    for tokens in (8, 64, 512, 4096):
        w = quantized_shape((8, k, 256), format, group, symmetric=group is None)
        b, form = gpu.blocks(tokens, w, target), packed(w)
        assert k % b.bk == 0 and (b.bk % w.group == 0 or w.group % b.bk == 0)
        assert b.bk % (form.depth * form.packing) == 0 and min(b.bk, w.group) % (form.depth * form.packing) == 0
        assert b.stages >= 2 and target.facts is not None
        ring = b.stages * gpu_packed.stage_bytes(w, b.bm, b.bn, b.bk)
        assert ring + 2 * 2 * b.bn * min(64, b.bm) + 1024 <= target.facts.scratch_bytes
