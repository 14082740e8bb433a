"""The activation of a gated MLP by the compiled CPU kernels: against float64, blocks in place, rows kept apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated import gated
from pallas_kernels.gated.api import choice
from pallas_kernels.gated.spec import GatedSpec
from pallas_kernels.native import library
from pallas_kernels.target import CPU, Target

NATIVE = Target(native=library().isa)
needs_native = pytest.mark.skipif(not NATIVE.native, reason=library().missing)
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-7}  # of a number: rounded to bfloat16 twice


def numbers(rows: int, columns: int, dtype: str) -> jax.Array:
    x = np.random.default_rng(columns).standard_normal((rows, columns)) * 8
    x[0, :4] = (0.0, -100.0, 100.0, -3e38)
    return jnp.asarray(x, dtype)


def wanted(x: jax.Array, block: int) -> np.ndarray:
    turns = np.asarray(x, np.float64).reshape(x.shape[0], -1, 2, block)
    gate, up = turns[:, :, 0], turns[:, :, 1]
    return (gate / (1 + np.exp(np.minimum(-gate, 700))) * up).reshape(x.shape[0], -1)


def close(got: jax.Array, x: jax.Array, block: int) -> bool:
    right = wanted(x, block)
    least = np.finfo(np.float32).tiny * 2**30  # a gate of -100 leaves e**-100 of it
    return bool((abs(np.asarray(got, np.float64) - right) <= TOLERANCE[str(x.dtype)] * abs(right) + least).all())


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "size", "block"), [(1, 32, 32), (3, 96, 32), (37, 1536, 128)])
def test_equals_float64(rows: int, size: int, block: int, dtype: str) -> None:
    x = numbers(rows, 2 * size, dtype)
    assert choice(GatedSpec(block, dtype, "silu"), NATIVE).implementation.name == "cpu"
    got = gated(x, "silu", block, target=NATIVE)
    assert got.dtype == x.dtype and close(got, x, block)
    assert close(gated(x, "silu", block, target=CPU), x, block)


@needs_native
def test_the_check_sees_gate_and_up_in_each_others_place() -> None:
    x = numbers(3, 192, "float32")
    swapped = x.reshape(3, -1, 2, 32)[:, :, ::-1].reshape(3, -1)
    assert not close(gated(swapped, "silu", 32, target=NATIVE), x, 32)


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_a_number_spoils_itself_alone(dtype: str) -> None:
    x = np.array(numbers(5, 64, dtype))
    clean = np.asarray(gated(jnp.asarray(x), "silu", 32, target=NATIVE))
    x[2, 7] = x[3, 40] = np.nan
    got = np.asarray(gated(jnp.asarray(x), "silu", 32, target=NATIVE))
    spoilt = np.isnan(got)
    assert spoilt[2, 7] and spoilt[3, 8] and spoilt.sum() == 2
    assert np.array_equal(got[~spoilt], clean[~spoilt])


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (GatedSpec(128, "bfloat16", "gelu_tanh"), "gelu_tanh"),
        (GatedSpec(128, "bfloat16", "silu", clamped=True), "clamped"),
        (GatedSpec(128, "float16", "silu"), "float16"),
        (GatedSpec(24, "bfloat16", "silu"), "blocks of 24: not multiples of 16"),
    ],
)
def test_what_the_compiled_kernel_declines(spec: GatedSpec, reason: str) -> None:
    assert ("cpu", reason) in choice(spec, Target(native="avx512")).declined


def test_columns_that_are_no_pairs_of_blocks() -> None:
    with pytest.raises(ValueError, match=r"x \(1, 48\) has no pairs of blocks of 32 columns"):
        gated(jnp.zeros((1, 48)), "silu", 32, target=CPU)
