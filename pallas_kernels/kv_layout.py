"""How keys and values stand in a page: one array a layer, [pages, page_size, width].

A row is one token: K of head 0, V of head 0, K of head 1, ... each `head_width` lanes, then, when
quantized, `exponent_width` bytes. A quantized head vector x is stored as q with x = q * 2**e, e
an int8 in the order of the vectors: the powers of two of the OCP microscaling formats (2023),
one a token and head. A finer grain than a scale a page, and a token's bytes never change once
written: what another chunking or a prefix hit would leave in the page is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.target import KVDtype, Platform

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}  # of the stored number


@dataclass(frozen=True)
class KVLayout:
    """A page's row, static. Lanes behind head_dim of a head are zero."""

    kv_heads: int
    head_dim: int
    head_width: int
    dtype: KVDtype
    exponent_width: int = 0

    @property
    def quantized(self) -> bool:
        return self.dtype in LARGEST

    @property
    def width(self) -> int:
        """Elements of a token's row."""
        return 2 * self.kv_heads * self.head_width + self.exponent_width

    @property
    def token_bytes(self) -> int:
        return self.width * jnp.dtype(self.dtype).itemsize


def kv_layout(kv_heads: int, head_dim: int, dtype: KVDtype, platform: Platform = "cpu") -> KVLayout:
    """The layout for a platform: on accelerators a head fills multiples of 64 lanes.

    A TPU tile is 128 lanes wide, a TMA swizzle 128 bytes: heads of 80 or 96 would straddle them.
    """
    grain, exponents = (1, 16) if platform == "cpu" else (64, 128 if platform == "tpu" else 16)
    head_width = -(-head_dim // grain) * grain
    exponent_width = -(-2 * kv_heads // exponents) * exponents if dtype in LARGEST else 0
    return KVLayout(kv_heads, head_dim, head_width, dtype, exponent_width)


def pack_rows(k: Array, v: Array, layout: KVLayout) -> Array:
    """Rows [tokens, layout.width] in the layout's dtype from k and v [tokens, kv_heads, head_dim].

    Quantized: e is the smallest exponent at which the head's largest magnitude still fits; int8
    rounds to nearest even and stores 0 for what is not finite: a step that computes such a value
    ends its request, and masks keep it from others.
    """
    kv = jnp.stack([k, v], axis=2)
    kv = jnp.pad(kv, ((0, 0), (0, 0), (0, 0), (0, layout.head_width - layout.head_dim)))
    if not layout.quantized:
        return kv.reshape(-1, layout.width).astype(layout.dtype)
    wide = kv.astype(jnp.float32)
    exponents = _exponents(jnp.max(jnp.abs(wide), axis=-1), LARGEST[layout.dtype])
    scaled = wide * _power_of_two(-exponents)[..., None]
    values = jnp.where(jnp.isfinite(scaled), jnp.round(scaled), 0) if layout.dtype == "int8" else scaled
    heads = 2 * layout.kv_heads
    tail = jnp.pad(exponents.reshape(-1, heads), ((0, 0), (0, layout.exponent_width - heads)))
    tail = jax.lax.bitcast_convert_type(tail.astype(jnp.int8), jnp.dtype(layout.dtype))
    return jnp.concatenate([values.astype(layout.dtype).reshape(-1, heads * layout.head_width), tail], axis=1)


def unpack_rows(rows: Array, layout: KVLayout) -> Array:
    """float32 [..., kv_heads, 2 (key, value), head_dim] of rows [..., layout.width]."""
    lead, heads = rows.shape[:-1], 2 * layout.kv_heads
    values = rows[..., : heads * layout.head_width].astype(jnp.float32)
    values = values.reshape(*lead, layout.kv_heads, 2, layout.head_width)[..., : layout.head_dim]
    if not layout.quantized:
        return values
    tail = rows[..., heads * layout.head_width :][..., :heads]
    exponents = jax.lax.bitcast_convert_type(tail, jnp.int8).astype(jnp.int32)
    return values * _power_of_two(exponents).reshape(*lead, layout.kv_heads, 2, 1)


def _exponents(largest: Array, limit: float) -> Array:
    """int32 e with largest <= limit * 2**e, as small as possible, within [-126, 126]."""
    mantissa, exponent = jnp.frexp(largest / limit)  # in [0.5, 1) times 2**exponent
    exponent = jnp.where(mantissa == 0.5, exponent - 1, exponent)
    return jnp.clip(jnp.where(largest > 0, exponent, -126), -126, 126).astype(jnp.int32)


def _power_of_two(exponents: Array) -> Array:
    """float32 2**e, exact, for e in [-126, 127]."""
    return jax.lax.bitcast_convert_type((exponents + 127) << 23, jnp.float32)
