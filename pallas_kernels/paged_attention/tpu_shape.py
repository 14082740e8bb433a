"""Static sizes of the TPU kernel of paged attention, and the choice of its blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array

from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.target import Target
from pallas_kernels.tuning import lookup

LANES = 128
PACKING = {"float32": 1, "bfloat16": 2, "int8": 4, "float8_e4m3fn": 4, "float8_e5m2": 4}  # rows in a 32 bit word
FIELDS = 8  # of an item: block of queries, row of the table, keys [LO, HI), position of the block's
# token 0, the block's tokens [FIRST, LAST) that are the row's, the next item that has keys
BLOCK, ROW, LO, HI, POSITION, FIRST, LAST, NEXT = range(FIELDS)


@dataclass(frozen=True)
class Shape:
    """Static sizes of a call. A band's rows: its KV heads, then a head's query heads, then tokens of the block."""

    layout: KVLayout
    dtype: str  # of queries and result
    block_tokens: int  # queries of each head in a block, a power of two
    group: int  # query heads of a KV head
    band_heads: int  # KV heads of a band
    rows: int  # of a band, padded to whole tiles
    page_size: int  # a power of two
    chunk_pages: int  # a power of two
    parts: int = 1  # devices that each page is spread over, a power of two; page_size is of one part

    @property
    def bands(self) -> int:
        return -(-self.layout.kv_heads // self.band_heads)

    @property
    def head_rows(self) -> int:
        return self.group * self.block_tokens

    @property
    def chunk(self) -> int:
        """Keys that a turn sees."""
        return self.chunk_pages * self.page_size

    @property
    def shared_tile(self) -> bool:
        """Key and value of a head stand in one tile of lanes."""
        return self.layout.head_width % LANES != 0

    @property
    def lanes(self) -> int:
        """Width of the operands: a head's key or value, or both where they share a tile."""
        return self.layout.head_width * (2 if self.shared_tile else 1)

    @property
    def value_lanes(self) -> int:
        """Width of the result: a latent's first lanes are its value."""
        return self.lanes if self.layout.value_dim is None else self.layout.value_dim

    def page_of(self, position: Array) -> Array:
        """Shifts: division of a traced integer takes its sign, which lowers only where the chip is known."""
        return position >> log2(self.page_size)

    def pages_below(self, position: Array) -> Array:
        return (position + self.page_size - 1) >> log2(self.page_size)

    def keys_before(self, position: Array, index: Array) -> Array:
        """As `Part.keys_before`, of the part of that index."""
        if self.parts == 1:
            return position
        position, whole = jnp.maximum(position, 0), self.parts * self.page_size
        rest = (position & (whole - 1)) - index * self.page_size
        return (position >> log2(whole)) * self.page_size + jnp.clip(rest, 0, self.page_size)

    def heads(self, band: int) -> range:
        return range(band * self.band_heads, min((band + 1) * self.band_heads, self.layout.kv_heads))

    def vmem_bytes(self, sinks: bool) -> int:
        """What a call names: page buffers, blocks of q and result (twice), softmax state, sinks."""
        rows = self.bands * self.rows
        pages = 2 * self.chunk * self.layout.token_bytes
        queries, values = rows * self.lanes, rows * self.value_lanes
        item = jnp.dtype(self.dtype).itemsize
        blocks = 2 * (queries * item + (values * item if self.parts == 1 else 4 * (values + rows * LANES)))
        state = rows * (self.value_lanes + 2 * LANES) * 4
        return pages + blocks + state + (rows * LANES * 4 * 2 if sinks else 0)


@dataclass(frozen=True)
class Maths:
    """How scores come about, static."""

    scale: float
    softcap: float | None
    window: int | None
    sinks: bool


@dataclass(frozen=True)
class Sizes:
    """What the blocks depend on; the fields of `api.AttentionSpec` of these names."""

    kind: Literal["decode", "prefill"]
    tokens: int
    q_heads: int
    page_size: int
    pages_per_seq: int
    dtype: str
    layout: KVLayout
    parts: int = 1

    @property
    def key(self) -> str:
        """Of a tuned choice: tokens rounded up to a power of two, heads, dtypes, page."""
        layout, tokens = self.layout, 1 << (self.tokens - 1).bit_length()
        heads = f"{self.q_heads}/{layout.kv_heads}x{layout.head_dim}"
        return f"{self.kind} {tokens}x{heads} {self.dtype} {layout.dtype} {self.page_size}"


def shape_for(sizes: Sizes, target: Target) -> Shape:
    """Tuned "chunk_tokens" and "block_tokens" (powers of two) where somebody measured, else the computed choice.

    Decode: one token a block; as many KV heads a band as fill a tile's rows. Prefill: a band a KV
    head. A turn never sees more than a power of two below what a row can have, nor less than a page.
    """
    tuned = lookup("paged_attention", target.chip, sizes.key) or {}
    layout, group, tile = sizes.layout, sizes.q_heads // sizes.layout.kv_heads, 8 * PACKING[sizes.dtype]
    chunk = min(tuned.get("chunk_tokens", chunk_tokens(layout, target)), sizes.pages_per_seq * sizes.page_size)
    chunk_pages = max(1, max(_power_below(chunk), LANES) // sizes.page_size)
    if sizes.kind == "decode":
        heads = min(layout.kv_heads, -(-tile // group))
        rows = up(heads * group, tile)
        return Shape(layout, sizes.dtype, 1, group, heads, rows, sizes.page_size, chunk_pages, sizes.parts)
    block = tuned.get("block_tokens", block_tokens(sizes))
    return Shape(layout, sizes.dtype, block, group, 1, group * block, sizes.page_size, chunk_pages, sizes.parts)


def chunk_tokens(layout: KVLayout, target: Target) -> int:
    """Keys of a turn: what arrives in 1.25 us, longer than a copy's latency; 128 to 512 of them."""
    rate = target.facts.memory_bytes_per_s if target.facts is not None else 1e12
    return min(max(int(1.25e-6 * rate) // layout.token_bytes, LANES), 512)


def block_tokens(sizes: Sizes) -> int:
    """Tokens of a prefill block: 512 rows a band, at most 128 tokens, and 8 MiB of weighted values for all heads.

    All query heads of a latent layout are one band: 128 of them fill it with 4 tokens.
    """
    layout, width = sizes.layout, up(sizes.layout.head_width, LANES)
    most = (512 * layout.kv_heads // sizes.q_heads, (8 << 20) // (4 * sizes.q_heads * width), 2 * sizes.tokens - 1)
    tile = 8 * PACKING[sizes.dtype]
    least = tile // math.gcd(sizes.q_heads, tile) if layout.latent else tile
    return max(_power_below(min(*most, 128)), least)


def up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _power_below(number: int) -> int:
    """The largest power of two up to `number`, at least 1."""
    return 1 << (max(number, 1).bit_length() - 1)


def log2(number: int) -> int:
    """Of a power of two."""
    return number.bit_length() - 1
