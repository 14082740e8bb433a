"""Named shapes of expanded latent prefill, as data: what tests check and benchmarks time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pallas_kernels.kv_layout import KVLayout, kv_layout
from pallas_kernels.latent_attention.api import ExpandedSpec
from pallas_kernels.target import Platform


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: row r sees lengths[r] keys at its end, the last queries[r] of them have queries."""

    name: str
    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    padding: int = 0  # tokens of nobody at the end
    q_heads: int = 4
    rank: int = 24  # of the latent
    nope: int = 16
    rope: int = 8
    v_dim: int = 12
    page_size: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    kv_dtype: Literal["int8", "float8_e4m3fn", "float8_e5m2"] | None = None  # None: as dtype
    pages_per_seq: int | None = None  # None: what the longest row needs and two more

    @property
    def num_tokens(self) -> int:
        return sum(self.queries) + self.padding

    def layout(self, platform: Platform) -> KVLayout:
        return kv_layout(1, self.rank + self.rope, self.kv_dtype or self.dtype, platform, value_dim=self.rank)

    def spec(self, platform: Platform) -> ExpandedSpec:
        """What `api.choice` sees of this call."""
        return ExpandedSpec(
            tokens=self.num_tokens,
            rows=len(self.lengths),
            pages_per_seq=self.pages_per_seq or -(-max(self.lengths) // self.page_size) + 2,
            q_heads=self.q_heads,
            nope_dim=self.nope,
            value_dim=self.v_dim,
            page_size=self.page_size,
            dtype=self.dtype,
            layout=self.layout(platform),
        )


CASES = (
    Case(name="one_token", lengths=(1,), queries=(1,)),
    Case(name="ragged", lengths=(7, 30, 1, 16), queries=(7, 30, 1, 16), padding=10),
    Case(name="continues", lengths=(40, 170, 23), queries=(8, 31, 1), padding=3, q_heads=3),
    Case(name="idle_rows", lengths=(20, 9, 0, 0), queries=(20, 9, 0, 0), padding=3),
    Case(name="all_idle", lengths=(0, 0), queries=(0, 0), padding=16),
    Case(name="chunk_borders", lengths=(255, 256, 257), queries=(255, 3, 257), q_heads=2),
    Case(name="long_context", lengths=(1500, 6), queries=(40, 6), page_size=32),
    Case(name="pages_of_1", lengths=(19, 130), queries=(19, 2), page_size=1, padding=5),
    Case(name="pages_of_512", lengths=(600, 20), queries=(30, 20), page_size=512),
    Case(name="bfloat16", lengths=(140, 33), queries=(140, 5), padding=7, dtype="bfloat16", rank=64, nope=32, rope=32),
    Case(name="int8", lengths=(70, 40, 0), queries=(70, 9, 0), kv_dtype="int8", padding=5),
    Case(name="e4m3", lengths=(64, 130), queries=(10, 130), kv_dtype="float8_e4m3fn", dtype="bfloat16"),
)
# DeepSeek-V3 and V2-Lite.
_V3: dict[str, Any] = {"q_heads": 128, "rank": 512, "nope": 128, "rope": 64, "v_dim": 128, "page_size": 32,
                       "dtype": "bfloat16"}  # fmt: skip
_V2_LITE: dict[str, Any] = {**_V3, "q_heads": 16}
REAL = (
    Case(name="deepseek_v3_prefill_512_of_4k", lengths=(4096,), queries=(512,), **_V3),
    Case(name="deepseek_v3_prefill_2k_of_32k", lengths=(32768,), queries=(2048,), **_V3),
    Case(name="deepseek_v2_lite_prefill_2k", lengths=(1500, 548), queries=(1500, 548), **_V2_LITE),
)
