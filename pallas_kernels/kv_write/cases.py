"""Named shapes of kv_write, as data: what benchmarks time.

Knows no arrays; a case says what a step would bring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pallas_kernels.kv_layout import KVLayout, kv_layout
from pallas_kernels.kv_write.api import WriteSpec
from pallas_kernels.target import Platform


@dataclass(frozen=True, kw_only=True)
class Case:
    """`rows` sequences write `tokens_per_row` tokens each, the last of pages of `page_size`: 1 is decode."""

    name: str
    rows: int
    tokens_per_row: int = 1
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 32
    pages: int = 64  # of the pool
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    kv_dtype: Literal["int8", "float8_e4m3fn", "float8_e5m2"] | None = None  # None: as dtype

    @property
    def num_tokens(self) -> int:
        return self.rows * self.tokens_per_row

    def layout(self, platform: Platform) -> KVLayout:
        return kv_layout(self.kv_heads, self.head_dim, self.kv_dtype or self.dtype, platform)

    def spec(self, platform: Platform) -> WriteSpec:
        """What `api.choice` sees of this call."""
        return WriteSpec(self.num_tokens, self.page_size, self.layout(platform))


SMALL = (
    Case(name="write_decode", rows=5),
    Case(name="write_decode_int8", rows=3, kv_dtype="int8"),
    Case(name="write_prefill", rows=2, tokens_per_row=40),
    Case(name="write_prefill_e4m3", rows=1, tokens_per_row=33, kv_dtype="float8_e4m3fn"),
)
_LLAMA_8B: dict[str, Any] = {"kv_heads": 8, "head_dim": 128, "pages": 4096}
REAL = (
    Case(name="llama8b_write_decode_64", rows=64, **_LLAMA_8B),
    Case(name="llama8b_write_decode_256", rows=256, **_LLAMA_8B),
    Case(name="llama8b_write_decode_64_int8", rows=64, kv_dtype="int8", **_LLAMA_8B),
    Case(name="llama8b_write_prefill_2k", rows=1, tokens_per_row=2048, **_LLAMA_8B),
    Case(name="llama8b_write_prefill_2k_e4m3", rows=1, tokens_per_row=2048, kv_dtype="float8_e4m3fn", **_LLAMA_8B),
    Case(name="llama8b_write_prefill_4x500", rows=4, tokens_per_row=500, **_LLAMA_8B),
)
CASES = SMALL + REAL
