"""Keys and values land where the page ids say, in the documented layout, and nowhere else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_write import write_kv


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writes_each_token_and_nothing_else(dtype: str) -> None:
    rng = np.random.default_rng(0)
    pages = jnp.asarray(rng.normal(size=(7, 4, 2 * 3 * 5)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(6, 3, 5)), jnp.float32) for _ in range(2))
    page_ids, offsets = np.asarray([5, 5, 1, 2, 6, 3], np.int32), np.asarray([0, 3, 1, 2, 3, 0], np.int32)
    got = jax.jit(write_kv)(pages, k, v, jnp.asarray(page_ids), jnp.asarray(offsets))
    expected = np.array(pages)
    for token, (page, offset) in enumerate(zip(page_ids, offsets, strict=True)):
        for head in range(3):
            expected[page, offset, head * 10 : head * 10 + 5] = np.asarray(k[token, head].astype(dtype))
            expected[page, offset, head * 10 + 5 : head * 10 + 10] = np.asarray(v[token, head].astype(dtype))
    assert got.dtype == pages.dtype and np.array_equal(np.asarray(got), expected)


def test_tokens_without_owner_only_touch_the_trash_page() -> None:
    pages = jnp.zeros((3, 4, 2 * 2 * 8))
    ones = jnp.ones((5, 2, 8))
    got = np.asarray(write_kv(pages, ones, ones, jnp.zeros(5, jnp.int32), jnp.asarray([0, 0, 1, 0, 3], jnp.int32)))
    assert not got[1:].any() and got[0, 0].all() and not got[0, 2].any()


@pytest.mark.parametrize("shapes", [((2, 2, 8), (2, 1, 8)), ((2, 3, 8), (2, 3, 8)), ((2, 2, 4), (2, 2, 4))])
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    k, v = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="do not fit pages"):
        write_kv(jnp.zeros((3, 4, 2 * 2 * 8)), k, v, jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))


def test_donated_pages_are_written_in_place() -> None:
    compiled = (
        jax.jit(write_kv, donate_argnums=0)
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
