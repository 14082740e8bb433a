"""Keys and values land where the page ids say, in the documented layout, and nowhere else."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_layout import KVDtype, kv_layout, unpack_rows
from pallas_kernels.kv_write import write_kv
from pallas_kernels.target import CPU
from tests.pallas_kernels.attention_calls import stored

DTYPES: tuple[KVDtype, ...] = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
# Half a step of the stored number over the vector's largest: int8 has 7 bits but for a power-of-two scale.
STEP = {"float32": 0.0, "bfloat16": 2**-8, "int8": 1 / 127, "float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_each_token_and_nothing_else(dtype: KVDtype, platform: str) -> None:
    rng = np.random.default_rng(0)
    layout = kv_layout(3, 5, dtype, platform)  # type: ignore[arg-type]
    before = jnp.asarray(rng.normal(size=(7, 4, layout.width)) * 10, dtype)
    k, v = (jnp.asarray(rng.normal(size=(6, 3, 5)) * 10.0 ** rng.integers(-6, 6), jnp.float32) for _ in range(2))
    page_ids, offsets = np.asarray([5, 5, 1, 2, 6, 3], np.int32), np.asarray([0, 3, 1, 2, 3, 0], np.int32)
    write = jax.jit(partial(write_kv, layout=layout, target=CPU))
    got = np.asarray(write(before, k, v, jnp.asarray(page_ids), jnp.asarray(offsets)))
    kv = stored(got[page_ids, offsets], layout)
    for i, wanted in enumerate((k, v)):
        largest = np.abs(wanted).max(axis=-1, keepdims=True)
        assert (np.abs(kv[:, :, i] - wanted) <= STEP[dtype] * largest * 1.0001).all()
    untouched = np.ones(got.shape[:2], bool)
    untouched[page_ids, offsets] = False
    assert got.dtype == before.dtype and got[untouched].tobytes() == np.asarray(before)[untouched].tobytes()


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_are_one_vector_of_two_parts(dtype: KVDtype, platform: str) -> None:
    """Each part keeps its own precision, however much larger the other is."""
    rng = np.random.default_rng(3)
    layout = kv_layout(1, 7, dtype, platform, value_dim=5)  # type: ignore[arg-type]
    assert layout.tail == {"cpu": 7, "tpu": 128, "gpu": 64}[platform]
    latent = np.asarray(rng.normal(size=(4, 1, 7)), np.float32) * np.repeat([1e-3, 1e4], [5, 2]).astype(np.float32)
    write = jax.jit(partial(write_kv, layout=layout, target=CPU))
    ids, offsets = jnp.asarray([1, 1, 2, 1]), jnp.asarray([0, 3, 1, 2])
    pages = np.asarray(write(jnp.zeros((3, 4, layout.width), dtype), jnp.asarray(latent), None, ids, offsets))
    rows = pages[[1, 1, 2, 1], [0, 3, 1, 2]]
    got = stored(rows, layout)
    assert got.shape == (4, 1, 1, 7)
    for part in (slice(0, 5), slice(5, 7)):
        wanted = latent[..., part]
        largest = np.abs(wanted).max(axis=-1, keepdims=True)
        assert (np.abs(got[:, :, 0, part] - wanted) <= STEP[dtype] * largest * 1.0001).all()
    assert np.array_equal(np.asarray(unpack_rows(jnp.asarray(rows), layout), np.float64), got)
    assert np.count_nonzero(np.any(pages.astype(np.float32), axis=-1)) == 4


@pytest.mark.parametrize(
    ("kv_heads", "value_dim"), [(2, 512), (1, 576), (1, 0)], ids=["two_heads", "no_rest", "no_value"]
)
def test_a_latent_layout_that_cannot_be_is_refused(kv_heads: int, value_dim: int) -> None:
    with pytest.raises(ValueError, match=f"these are {kv_heads} KV heads, value_dim {value_dim}, head_dim 576"):
        kv_layout(kv_heads, 576, "bfloat16", value_dim=value_dim)


def test_latents_have_no_values_and_others_do() -> None:
    k, zeros = jnp.zeros((2, 1, 24)), jnp.zeros(2, jnp.int32)
    latent, plain = kv_layout(1, 24, "float32", value_dim=16), kv_layout(1, 24, "float32")
    for layout, v, message in ((latent, k, "latent layout of 24 holds its values"), (plain, None, "v is missing")):
        with pytest.raises(ValueError, match=message):
            write_kv(jnp.zeros((3, 4, layout.width)), k, v, zeros, zeros, layout=layout, target=CPU)
    with pytest.raises(ValueError, match=r"k \(2, 1, 23\) and v None do not fit 1 heads of 24"):
        write_kv(jnp.zeros((3, 4, 24)), k[..., :23], None, zeros, zeros, layout=latent, target=CPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_back_agrees_with_the_bytes(dtype: KVDtype) -> None:
    """`unpack_rows` against a byte-by-byte reading; zeros, subnormals and huge values included."""
    rng = np.random.default_rng(1)
    layout = kv_layout(2, 8, dtype, "gpu")
    scale = np.asarray([0, 1e-40, 1e-20, 1, 448, 449, 1e20, 3e38], np.float32)[:, None, None]
    k, v = (jnp.asarray(rng.uniform(-1, 1, size=(8, 2, 8)).astype(np.float32) * scale) for _ in range(2))
    pages = jnp.zeros((1, 8, layout.width), dtype)
    rows = write_kv(pages, k, v, jnp.zeros(8, jnp.int32), jnp.arange(8), layout=layout, target=CPU)[0]
    assert np.array_equal(np.asarray(unpack_rows(rows, layout), np.float64), stored(np.asarray(rows), layout))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_every_size_come_back(dtype: KVDtype) -> None:
    """Every exponent a number can need, through a scatter and a gather: no byte of it may be taken for a NaN."""
    layout = kv_layout(1, 1, dtype)
    powers = np.arange(-100, 120, dtype=np.float32)
    k = jnp.asarray(1.5 * 2.0**powers, jnp.float32).reshape(-1, 1, 1)
    ids, offsets = jnp.arange(powers.size), jnp.zeros(powers.size, jnp.int32)
    pages = jnp.zeros((powers.size, 1, layout.width), dtype)
    pages = jax.jit(partial(write_kv, layout=layout, target=CPU))(pages, k, -k, ids, offsets)
    got = np.asarray(jax.jit(lambda pages, ids: unpack_rows(pages[ids, 0], layout))(pages, ids))[:, 0, :, 0]
    assert np.allclose(got * 2.0 ** -powers[:, None], [1.5, -1.5], rtol=STEP[dtype])


def test_int8_stores_zero_for_what_is_not_finite() -> None:
    layout = kv_layout(1, 4, "int8")
    k = jnp.asarray([[[1.0, jnp.nan, 2.0, jnp.inf]]])
    rows = write_kv(
        jnp.zeros((1, 1, layout.width), "int8"), k, k, jnp.zeros(1, int), jnp.zeros(1, int), layout=layout, target=CPU
    )
    assert np.isfinite(np.asarray(unpack_rows(rows, layout))).all()


def test_tokens_without_owner_only_touch_the_trash_page() -> None:
    pages = jnp.zeros((3, 4, 2 * 2 * 8))
    ones = jnp.ones((5, 2, 8))
    ids, offsets = jnp.zeros(5, jnp.int32), jnp.asarray([0, 0, 1, 0, 3], jnp.int32)
    got = np.asarray(write_kv(pages, ones, ones, ids, offsets, layout=kv_layout(2, 8, "float32"), target=CPU))
    assert not got[1:].any() and got[0, 0].all() and not got[0, 2].any()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 2, 8), (2, 1, 8)), "do not fit 2 heads of 8"),
        (((2, 3, 8), (2, 3, 8)), "do not fit 2 heads of 8"),
        (((2, 2, 4), (2, 2, 4)), "do not fit 2 heads of 8"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    k, v = (jnp.zeros(shape) for shape in shapes)
    zeros = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=message):
        write_kv(jnp.zeros((3, 4, 32)), k, v, zeros, zeros, layout=kv_layout(2, 8, "float32"), target=CPU)
    with pytest.raises(ValueError, match="pages are 33 wide"):
        k = jnp.zeros((2, 2, 8))
        write_kv(jnp.zeros((3, 4, 33)), k, k, zeros, zeros, layout=kv_layout(2, 8, "float32"), target=CPU)


def test_donated_pages_are_written_in_place() -> None:
    compiled = (
        jax.jit(partial(write_kv, layout=kv_layout(2, 64, "float32"), target=CPU), donate_argnums=0)
        .lower(
            jax.ShapeDtypeStruct((64, 16, 256), jnp.float32),
            *[jax.ShapeDtypeStruct((4, 2, 64), jnp.float32)] * 2,
            *[jax.ShapeDtypeStruct((4,), jnp.int32)] * 2,
        )
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes == 64 * 16 * 256 * 4
    assert memory.temp_size_in_bytes < 64 * 16 * 256 * 4 // 4, "no second pool"
