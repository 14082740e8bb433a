"""Rotations by the compiled CPU kernels: against complex numbers in float64, and tokens kept apart to the bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native import library
from pallas_kernels.rope import rotate, split_rotated
from pallas_kernels.rope.api import choice
from pallas_kernels.rope.spec import RopeSpec
from pallas_kernels.target import CPU, Target

NATIVE = Target(native=library().isa)
needs_native = pytest.mark.skipif(not NATIVE.native, reason=library().missing)
both_types = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8}  # of a pair's length

# tokens, KV heads, queries a KV head, head_dim, numbers that turn
SHAPES = [(1, 1, 1, 64, 64), (5, 3, 3, 64, 64), (4, 2, 7, 128, 64), (700, 2, 2, 128, 128), (3, 8, 1, 256, 64)]


def brought(shape: tuple[int, int, int, int, int], dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(qkv, cos, sin) of tokens at far and near positions."""
    tokens, heads, group, head_dim, rotated = shape
    rng = np.random.default_rng(tokens)
    qkv = jnp.asarray(rng.standard_normal((tokens, heads, group + 2, head_dim)), dtype)
    angles = rng.integers(0, 100_000, (tokens, 1)) * 10_000.0 ** -(np.arange(rotated // 2) / rotated * 2)
    angles = np.concatenate([angles, angles], axis=1)
    return qkv, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def turned(x: np.ndarray, cos: jax.Array, sin: jax.Array) -> np.ndarray:
    """float64 of [tokens, ..., head_dim]: numbers i and i + rotated / 2 are one complex number."""
    half = cos.shape[1] // 2
    by = (np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64))[:, :half]
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * by.reshape(-1, *(1,) * (x.ndim - 2), half)
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)


def close(got: tuple[jax.Array, ...], qkv: jax.Array, cos: jax.Array, sin: jax.Array) -> bool:
    wide = np.asarray(qkv, np.float64)
    qk = turned(wide[:, :, :-1], cos, sin)
    q, k = qk[:, :, :-1].reshape(wide.shape[0], -1, wide.shape[3]), qk[:, :, -1]
    tolerance = 2 * TOLERANCE[str(qkv.dtype)] * abs(wide).max()
    near = all(bool((abs(np.asarray(g, np.float64) - w) <= tolerance).all()) for g, w in zip(got, (q, k), strict=False))
    return near and np.array_equal(np.asarray(got[2]), np.asarray(qkv[:, :, -1]))


def bits(parts: tuple[jax.Array, ...]) -> list[bytes]:
    return [np.asarray(part).tobytes() for part in parts]


@needs_native
@both_types
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_complex_numbers(shape: tuple[int, int, int, int, int], dtype: str) -> None:
    given = brought(shape, dtype)
    assert choice(RopeSpec(shape[3], shape[4], dtype), NATIVE).implementation.name == "cpu"
    for target in (NATIVE, CPU):
        got = split_rotated(*given, target=target)
        assert {str(part.dtype) for part in got} == {dtype}
        assert close(got, *given)


@needs_native
def test_the_check_sees_another_angle_queries_exchanged_and_a_value_turned() -> None:
    qkv, cos, sin = given = brought((5, 3, 3, 64, 64), "bfloat16")
    q, k, v = split_rotated(*given, target=NATIVE)
    assert close((q, k, v), *given)
    assert not close(split_rotated(qkv, cos, -sin, target=NATIVE), *given)
    assert not close((q[:, ::-1], k, v), *given)
    assert not close((q, k, rotate(v, cos, sin)), *given)


@needs_native
@both_types
def test_a_token_has_the_same_bits_whatever_is_beside_it(dtype: str) -> None:
    qkv, cos, sin = brought((700, 2, 2, 128, 128), dtype)
    whole = split_rotated(qkv, cos, sin, target=NATIVE)
    for some in (slice(0, 1), slice(3, 8), slice(699, 700), slice(130, 400)):
        part = split_rotated(qkv[some], cos[some], sin[some], target=NATIVE)
        assert bits(part) == bits(tuple(one[some] for one in whole))


@needs_native
def test_what_is_not_a_number_spoils_its_pair_alone() -> None:
    qkv, cos, sin = brought((4, 2, 2, 64, 64), "float32")
    clean = split_rotated(qkv, cos, sin, target=NATIVE)
    got = split_rotated(qkv.at[1, 0, 2, 5].set(jnp.nan), cos, sin, target=NATIVE)
    spoilt = [np.argwhere(np.isnan(np.asarray(part))).tolist() for part in got]
    assert spoilt == [[], [[1, 0, 5], [1, 0, 37]], []]
    assert bits(got[:1] + got[2:]) == bits(clean[:1] + clean[2:])


@pytest.mark.parametrize(
    ("spec", "target", "reason"),
    [
        (RopeSpec(64, 64, "bfloat16"), Target("tpu", "v6e"), "for cpu"),
        (RopeSpec(64, 64, "bfloat16"), CPU, "the native library is not there"),
        (RopeSpec(64, 64, "bfloat16", num_devices=4), Target(native="avx512"), "for one device, not 4"),
        (RopeSpec(64, 64, "float16"), Target(native="avx512"), "float16"),
        (
            RopeSpec(80, 80, "bfloat16"),
            Target(native="avx512"),
            "80 of 80: halves and heads that are no multiples of 16",
        ),
    ],
)
def test_what_the_compiled_kernel_declines(spec: RopeSpec, target: Target, reason: str) -> None:
    assert ("cpu", reason) in choice(spec, target).declined


def test_shapes_and_types_that_do_not_fit() -> None:
    qkv, cos, sin = brought((4, 2, 2, 64, 64), "float32")
    with pytest.raises(ValueError, match=r"qkv \(4, 2, 256\) is not \[tokens, kv_heads, group \+ 2, head_dim\]"):
        split_rotated(qkv.reshape(4, 2, 256), cos, sin, target=CPU)
    with pytest.raises(ValueError, match=r"cos \(3, 64\) and sin \(4, 64\) do not fit qkv \(4, 2, 4, 64\)"):
        split_rotated(qkv, cos[:3], sin, target=CPU)
    with pytest.raises(ValueError, match="cos is bfloat16, sin float32; float32 is wanted"):
        split_rotated(qkv, cos.astype(jnp.bfloat16), sin, target=CPU)
