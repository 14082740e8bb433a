"""How keys and values stand in a page: one array a layer, [pages, page_size, width].

A row is one token: K of head 0, V of head 0, K of head 1, ... each `head_width` lanes, then, when
quantized, `exponent_width` bytes. A quantized head vector x is stored as q with x = q * 2**e, e
an int8 in the order of the vectors: the powers of two of the OCP microscaling formats (2023),
one a token and head. A finer grain than a scale a page, and a token's bytes never change once
written: what another chunking or a prefix hit would leave in the page is the same.

A latent layout (`value_dim`; MLA, arXiv 2405.04434) keeps one vector a token, which is the key of
every query head, and whose first value_dim lanes are the value too: DeepSeek's normed latent
of 512 followed by its rotary key of 64. Quantized, each of the two parts has its exponent.
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
    """A page's row, static. Lanes behind head_dim of a vector are zero."""

    kv_heads: int
    head_dim: int
    head_width: int
    dtype: KVDtype
    exponent_width: int = 0
    value_dim: int | None = None  # a latent layout: the vector's first lanes that are its value

    def __post_init__(self) -> None:
        if self.value_dim is not None and not (self.kv_heads == 1 and 0 < self.value_dim < self.head_dim):
            raise ValueError(
                f"a latent layout has 1 KV head and 0 < value_dim < head_dim; these are {self.kv_heads} KV heads, "
                f"value_dim {self.value_dim}, head_dim {self.head_dim}"
            )

    @property
    def quantized(self) -> bool:
        return self.dtype in LARGEST

    @property
    def latent(self) -> bool:
        return self.value_dim is not None

    @property
    def result_dim(self) -> int:
        """Elements of attention's result, a query head."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def head_vectors(self) -> int:
        """Vectors of a KV head: key and value, or the one that is both."""
        return 1 if self.latent else 2

    @property
    def exponents(self) -> int:
        """Powers of two of a quantized row: one a vector, or one for each part of a latent."""
        return 2 * self.kv_heads

    @property
    def tail(self) -> int:
        """Elements before the exponents."""
        return self.head_vectors * self.kv_heads * self.head_width

    @property
    def width(self) -> int:
        """Elements of a token's row."""
        return self.tail + self.exponent_width

    @property
    def token_bytes(self) -> int:
        return self.width * jnp.dtype(self.dtype).itemsize


def kv_layout(
    kv_heads: int, head_dim: int, dtype: KVDtype, platform: Platform = "cpu", value_dim: int | None = None
) -> KVLayout:
    """The layout for a platform: on accelerators a head fills multiples of 64 lanes.

    A TPU tile is 128 lanes wide, a TMA swizzle 128 bytes: heads of 80 or 96 would straddle them. A
    latent stands alone in its row, so on a TPU it fills whole tiles.
    """
    grain, exponents = (1, 16) if platform == "cpu" else (64, 128 if platform == "tpu" else 16)
    if platform == "tpu" and value_dim is not None:
        grain = 128
    head_width = -(-head_dim // grain) * grain
    exponent_width = -(-2 * kv_heads // exponents) * exponents if dtype in LARGEST else 0
    return KVLayout(kv_heads, head_dim, head_width, dtype, exponent_width, value_dim)


def check_pages(kv_pages: Array, layout: KVLayout) -> None:
    """ValueError unless kv_pages [pages, page_size, layout.width] are of the layout."""
    if kv_pages.shape[2] != layout.width or kv_pages.dtype != layout.dtype:
        raise ValueError(
            f"pages are {kv_pages.shape[2]} wide, {kv_pages.dtype}; the layout says {layout.width}, {layout.dtype}"
        )


def check_rows(k: Array, v: Array | None, layout: KVLayout) -> None:
    """ValueError unless k and v (None in a latent layout) [tokens, kv_heads, head_dim] fit the layout."""
    heads = f"{layout.kv_heads} heads of {layout.head_dim}"
    if layout.latent and v is not None:
        raise ValueError(f"a latent layout of {layout.head_dim} holds its values in its keys; v is {v.shape}")
    if not layout.latent and v is None:
        raise ValueError(f"v is missing; a layout of {heads} is not latent")
    if k.shape[1:] != (layout.kv_heads, layout.head_dim) or (v is not None and v.shape != k.shape):
        raise ValueError(f"k {k.shape} and v {None if v is None else v.shape} do not fit {heads}")


def pack_rows(k: Array, v: Array | None, layout: KVLayout) -> Array:
    """Rows [tokens, layout.width] in the layout's dtype from k and v [tokens, kv_heads, head_dim]; v None: latent.

    Quantized: e is the smallest exponent at which the head's largest magnitude still fits; int8
    rounds to nearest even and stores 0 for what is not finite: a step that computes such a value
    ends its request, and masks keep it from others.
    """
    check_rows(k, v, layout)
    kv = k[:, :, None] if v is None else jnp.stack([k, v], axis=2)
    kv = jnp.pad(kv, ((0, 0), (0, 0), (0, 0), (0, layout.head_width - layout.head_dim)))
    if not layout.quantized:
        return kv.reshape(-1, layout.width).astype(layout.dtype)
    wide = kv.astype(jnp.float32)
    exponents = _exponents(_largest(wide, layout), layout.dtype)
    scaled = wide * _by_lane(_power_of_two(-exponents), layout, layout.head_width)
    values = jnp.where(jnp.isfinite(scaled), jnp.round(scaled), 0) if layout.dtype == "int8" else scaled
    tail = jnp.pad(exponents.reshape(-1, layout.exponents), ((0, 0), (0, layout.exponent_width - layout.exponents)))
    tail = jax.lax.bitcast_convert_type(tail.astype(jnp.int8), jnp.dtype(layout.dtype))
    return jnp.concatenate([values.astype(layout.dtype).reshape(-1, layout.tail), tail], axis=1)


def unpack_rows(rows: Array, layout: KVLayout) -> Array:
    """float32 [..., kv_heads, 2 (key, value) or 1 (latent), head_dim] of rows [..., layout.width]."""
    lead = rows.shape[:-1]
    values = rows[..., : layout.tail].astype(jnp.float32)
    values = values.reshape(*lead, layout.kv_heads, layout.head_vectors, layout.head_width)[..., : layout.head_dim]
    if not layout.quantized:
        return values
    tail = rows[..., layout.tail : layout.tail + layout.exponents]
    exponents = jax.lax.bitcast_convert_type(tail, jnp.int8).astype(jnp.int32).reshape(*lead, layout.kv_heads, 2)
    return values * _by_lane(_power_of_two(exponents), layout, layout.head_dim)


def _largest(wide: Array, layout: KVLayout) -> Array:
    """[..., kv_heads, 2] of vectors [..., kv_heads, head_vectors, lanes]: largest magnitudes that share an exponent."""
    size = jnp.abs(wide)
    if layout.value_dim is None:
        return jnp.max(size, axis=-1)
    parts = size[..., : layout.value_dim], size[..., layout.value_dim :]
    return jnp.concatenate([jnp.max(part, axis=-1) for part in parts], axis=-1)


def _by_lane(powers: Array, layout: KVLayout, lanes: int) -> Array:
    """powers [..., kv_heads, 2] laid over vectors [..., kv_heads, head_vectors, lanes]."""
    if layout.value_dim is None:
        return powers[..., None]
    first = jnp.arange(lanes) < layout.value_dim
    return jnp.where(first, powers[..., :1], powers[..., 1:])[..., None, :]


def _exponents(largest: Array, dtype: str) -> Array:
    """int32 e with largest <= LARGEST * 2**e, as small as possible, within [-126, 126]."""
    mantissa, exponent = jnp.frexp(largest / LARGEST[dtype])  # in [0.5, 1) times 2**exponent
    exponent = jnp.where(mantissa == 0.5, exponent - 1, exponent)
    if dtype == "float8_e5m2":  # as bytes -3 to -1 are NaNs of it, and XLA on CPUs moves all NaNs as one
        exponent = jnp.where((exponent >= -3) & (exponent < 0), 0, exponent)
    return jnp.clip(jnp.where(largest > 0, exponent, -126), -126, 126).astype(jnp.int32)


def _power_of_two(exponents: Array) -> Array:
    """float32 2**e, exact, for e in [-126, 127]."""
    return jax.lax.bitcast_convert_type((exponents + 127) << 23, jnp.float32)
