"""How keys and values stand in a page: one array a layer, [pages, page_size, width].

A row is one token: K of head 0, V of head 0, K of head 1, ... each `head_width` lanes, then, when
quantized, `exponent_width` bytes. A quantized head vector x is stored as q with x = q * 2**e, e
an int8 in the order of the vectors: the powers of two of the OCP microscaling formats (2023),
one a token and head. A finer grain than a scale a page, and a token's bytes never change once
written: what another chunking or a prefix hit would leave in the page is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.target import Platform

KVDtype = Literal["float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"]
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
