"""Root-mean-square norms by the compiled CPU kernels: against float64, and rows kept apart to the bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native import library
from pallas_kernels.rms_norm import add_rms_norm, rms_norm
from pallas_kernels.rms_norm.api import choice
from pallas_kernels.rms_norm.spec import NormSpec
from pallas_kernels.target import CPU, Target

NATIVE = Target(native=library().isa)
needs_native = pytest.mark.skipif(not NATIVE.native, reason=library().missing)
both_types = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
EPS = 1e-5
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8}  # of a number: half a unit in the last place, in bfloat16


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> jax.Array:
    """Rows that differ in size, one of them zeros and one so small that eps counts."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.geomspace(1e-3, 1e3, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    x[shape[0] // 2] = 0
    return jnp.asarray(x, dtype)


def weight_of(*shape: int) -> jax.Array:
    return jnp.asarray(1 + np.random.default_rng(7).standard_normal(shape), jnp.float32)


def close(got: jax.Array, x: jax.Array, weight: jax.Array, eps: float = EPS) -> bool:
    wide = np.asarray(x, np.float64)
    right = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps) * np.asarray(weight, np.float64)
    return bool((abs(np.asarray(got, np.float64) - right) <= TOLERANCE[str(x.dtype)] * abs(right)).all())


def bits(x: jax.Array) -> bytes:
    return np.asarray(x).tobytes()


@needs_native
@both_types
@pytest.mark.parametrize("shape", [(1, 32), (3, 576), (7, 80), (300, 576), (20, 8192)])
def test_equals_float64(shape: tuple[int, int], dtype: str) -> None:
    x, weight = numbers(shape, dtype), weight_of(shape[1])
    assert choice(NormSpec(shape[1], dtype), NATIVE).implementation.name == "cpu"
    got = rms_norm(x, weight, EPS, target=NATIVE)
    assert got.dtype == x.dtype and close(got, x, weight)
    assert close(rms_norm(x, weight, EPS, target=CPU), x, weight)


@needs_native
@both_types
@pytest.mark.parametrize("shape", [(1, 32), (3, 576), (300, 576)])
def test_a_residual_is_added_and_rounded_before(shape: tuple[int, int], dtype: str) -> None:
    x, y, weight = numbers(shape, dtype), numbers(shape, dtype, seed=1), weight_of(shape[1])
    total, normed = add_rms_norm(x, y, weight, EPS, target=NATIVE)
    assert bits(total) == bits(x + y) and close(normed, total, weight)
    assert bits(normed) == bits(rms_norm(total, weight, EPS, target=NATIVE))
    plain_total, plain = add_rms_norm(x, y, weight, EPS, target=CPU)
    assert bits(plain_total) == bits(total) and close(plain, total, weight)


@needs_native
@both_types
def test_rows_take_their_own_of_several_weights(dtype: str) -> None:
    """As queries and keys do, or the groups of Mamba 2's norm."""
    x, weight = numbers((5, 2, 3, 64), dtype), weight_of(3, 64)
    for target in (NATIVE, CPU):
        assert close(rms_norm(x, weight, EPS, target=target), x, weight)


@needs_native
def test_the_check_sees_another_eps_another_weight_and_a_number_less() -> None:
    x, weight = numbers((5, 576), "bfloat16"), weight_of(576)
    got = rms_norm(x, weight, EPS, target=NATIVE)
    assert close(got, x, weight)
    assert not close(rms_norm(x, weight, 2 * EPS, target=NATIVE), x, weight)
    assert not close(rms_norm(x, jnp.roll(weight, 1), EPS, target=NATIVE), x, weight)
    assert not close(got, x.at[4, 0].set(2 * jnp.max(jnp.abs(x))), weight)


@needs_native
@both_types
@pytest.mark.parametrize("size", [64, 576, 4096])
def test_a_row_has_the_same_bits_whatever_is_beside_it(size: int, dtype: str) -> None:
    x, y, weight = numbers((300, size), dtype), numbers((300, size), dtype, seed=1), weight_of(size)
    alone = rms_norm(x, weight, EPS, target=NATIVE)
    total, normed = add_rms_norm(x, y, weight, EPS, target=NATIVE)
    for rows in (*range(1, 21), 64):
        for first in (0, 300 - rows):
            some = slice(first, first + rows)
            assert bits(rms_norm(x[some], weight, EPS, target=NATIVE)) == bits(alone[some])
            got = add_rms_norm(x[some], y[some], weight, EPS, target=NATIVE)
            assert (bits(got[0]), bits(got[1])) == (bits(total[some]), bits(normed[some]))


@needs_native
@both_types
def test_what_is_not_a_number_spoils_its_row_alone(dtype: str) -> None:
    x, y, weight = numbers((9, 96), dtype), numbers((9, 96), dtype, seed=1), weight_of(96)
    clean = np.asarray(add_rms_norm(x, y, weight, EPS, target=NATIVE)[1])
    spoilt = x.at[2, 7].set(jnp.nan), y.at[5, 95].set(jnp.inf)
    total, normed = map(np.asarray, add_rms_norm(*spoilt, weight, EPS, target=NATIVE))
    assert np.isnan(total[2, 7]) and (~np.isfinite(total)).sum() == 2
    assert np.isnan(normed[2]).all() and np.isnan(normed[5, 95])
    others = np.delete(np.arange(9), (2, 5))
    assert np.array_equal(normed[others], clean[others])


@pytest.mark.parametrize(
    ("spec", "target", "reason"),
    [
        (NormSpec(576, "bfloat16"), Target("tpu", "v6e"), "for cpu"),
        (NormSpec(576, "bfloat16"), CPU, "the native library is not there"),
        (NormSpec(576, "bfloat16", num_devices=4), Target(native="avx512"), "for one device, not 4"),
        (NormSpec(576, "float16"), Target(native="avx512"), "float16"),
        (NormSpec(24, "bfloat16"), Target(native="avx512"), "rows of 24: not multiples of 16"),
    ],
)
def test_what_the_compiled_kernel_declines(spec: NormSpec, target: Target, reason: str) -> None:
    assert ("cpu", reason) in choice(spec, target).declined


def test_the_reference_can_be_asked_for() -> None:
    asked = Target(native="avx512", implementations=(("rms_norm", "reference"),))
    assert str(choice(NormSpec(576, "bfloat16"), asked)) == "rms_norm: reference"


def test_shapes_and_types_that_do_not_fit() -> None:
    x, weight = jnp.zeros((2, 3, 32)), jnp.zeros((32,))
    with pytest.raises(ValueError, match=r"the weight \(2, 32\) has not the last dimensions of x \(2, 3, 32\)"):
        rms_norm(x, jnp.zeros((2, 32)), EPS, target=CPU)
    with pytest.raises(ValueError, match=r"x is float32 \(2, 3, 32\), y is float32 \(3, 2, 32\)"):
        add_rms_norm(x, jnp.zeros((3, 2, 32)), weight, EPS, target=CPU)
    with pytest.raises(ValueError, match=r"y is bfloat16"):
        add_rms_norm(x, x.astype(jnp.bfloat16), weight, EPS, target=CPU)
