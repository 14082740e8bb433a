"""How Hopper kernels make packed bytes wide: exactly, whatever is above the byte."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packed_gpu

BYTES = np.arange(256)


@pytest.mark.parametrize("above", [0, -256], ids=["zeros", "ones"])
def test_every_byte_becomes_its_numbers(above: int) -> None:
    bits = jnp.asarray(BYTES + above, jnp.int16)
    assert np.array_equal(packed_gpu._integers(bits).astype(jnp.float32), BYTES.astype(np.int8))
    low, high = (half.astype(jnp.float32) for half in packed_gpu._nibbles(bits, offsets=False))
    assert np.array_equal(low, BYTES % 16 - 8) and np.array_equal(high, 16 * (BYTES // 16 - 8))
    low, high = (half.astype(jnp.float32) for half in packed_gpu._nibbles(bits, offsets=True))
    assert np.array_equal(low, BYTES % 16) and np.array_equal(high, 16 * (BYTES // 16))
