"""Named shapes of paged attention, as data: what tests check and benchmarks time.

Knows no arrays; a case says what a step would bring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pallas_kernels.kv_layout import KVLayout, kv_layout
from pallas_kernels.paged_attention.api import AttentionSpec
from pallas_kernels.target import Platform


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. `lengths` counts the keys that each row sees at its end; 0 marks an idle row.

    Decode: one query a row, the last of its keys. Prefill: the last `queries[r]` keys of row r
    have queries, on one token axis that `padding` tokens of nobody extend.
    """

    name: str
    lengths: tuple[int, ...]
    queries: tuple[int, ...] | None = None  # None: decode
    padding: int = 0
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    value_dim: int | None = None  # of a latent cache
    page_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    kv_dtype: Literal["int8", "float8_e4m3fn", "float8_e5m2"] | None = None  # None: as dtype
    pages_per_seq: int | None = None  # None: what the longest row needs and two more

    @property
    def num_tokens(self) -> int:
        """Queries in the call, padding included."""
        return len(self.lengths) if self.queries is None else sum(self.queries) + self.padding

    def layout(self, platform: Platform) -> KVLayout:
        return kv_layout(self.kv_heads, self.head_dim, self.kv_dtype or self.dtype, platform, self.value_dim)

    def spec(self, platform: Platform) -> AttentionSpec:
        """What `api.choice` sees of this call."""
        return AttentionSpec(
            kind="decode" if self.queries is None else "prefill",
            tokens=self.num_tokens,
            rows=len(self.lengths),
            pages_per_seq=self.pages_per_seq or -(-max(self.lengths) // self.page_size) + 2,
            q_heads=self.q_heads,
            page_size=self.page_size,
            dtype=self.dtype,
            layout=self.layout(platform),
            softcap=self.softcap,
            window=self.window,
            sinks=self.sinks,
        )


_LATENT: dict[str, Any] = {"q_heads": 8, "kv_heads": 1, "head_dim": 192, "value_dim": 128}
_LATENT_16: dict[str, Any] = {**_LATENT, "q_heads": 16}
_LATENT_128: dict[str, Any] = {**_LATENT, "q_heads": 128}
# Small: every feature, sizes that an interpreter can do.
DECODE = (
    Case(name="decode_one_key", lengths=(1,)),
    Case(name="decode_mha", lengths=(7, 16, 17), q_heads=3, kv_heads=3),
    Case(name="decode_gqa_3", lengths=(5, 33), q_heads=9, kv_heads=3),
    Case(name="decode_mqa_8_head_128", lengths=(40, 1), q_heads=8, kv_heads=1, head_dim=128),
    Case(name="decode_head_80", lengths=(15, 30), head_dim=80),
    Case(name="decode_idle_rows", lengths=(0, 20, 0, 129, 0)),
    Case(name="decode_all_idle", lengths=(0, 0)),
    Case(name="decode_pages_of_1", lengths=(3, 131), page_size=1),
    Case(name="decode_pages_of_256", lengths=(255, 256, 257, 0), page_size=256),
    Case(name="decode_chunk_borders", lengths=(127, 128, 129, 256)),
    Case(name="decode_long", lengths=(2000, 3, 1025), page_size=32),
    Case(name="decode_window", lengths=(10, 500, 0, 24, 25, 131), window=24),
    Case(name="decode_window_1_softcap", lengths=(1, 2, 300), window=1, softcap=5.0),
    Case(name="decode_softcap_bfloat16", lengths=(100, 260), softcap=10.0, dtype="bfloat16"),
    Case(name="decode_head_96_bfloat16", lengths=(33, 64), head_dim=96, dtype="bfloat16", kv_heads=1),
    Case(name="decode_head_256_bfloat16", lengths=(17, 140), head_dim=256, dtype="bfloat16"),
    Case(name="decode_sinks", lengths=(1, 0, 50, 300), sinks=True, window=40),
    Case(name="decode_sinks_bfloat16", lengths=(9, 130, 0), sinks=True, dtype="bfloat16", q_heads=8, head_dim=128),
    Case(name="decode_int8", lengths=(1, 0, 50, 130), kv_dtype="int8", q_heads=9, kv_heads=3),
    Case(name="decode_int8_head_80", lengths=(40, 18), kv_dtype="int8", dtype="bfloat16", head_dim=80, page_size=32),
    Case(name="decode_e4m3_window", lengths=(70, 9, 300), kv_dtype="float8_e4m3fn", dtype="bfloat16", window=32,
         head_dim=128, page_size=32),
    Case(name="decode_latent", lengths=(1, 33, 0, 130), **_LATENT),
    Case(name="decode_latent_bfloat16", lengths=(40, 9), dtype="bfloat16", page_size=32, **_LATENT),
    Case(name="decode_latent_window", lengths=(300, 5), window=40, softcap=9.0, sinks=True, **_LATENT),
    Case(name="decode_latent_lanes", lengths=(20, 131), q_heads=3, kv_heads=1, head_dim=40, value_dim=24),
    Case(name="decode_latent_int8", lengths=(70, 0, 9), kv_dtype="int8", page_size=32, **_LATENT),
    Case(name="decode_latent_e4m3", lengths=(33,), kv_dtype="float8_e4m3fn", dtype="bfloat16", page_size=32, **_LATENT),
    Case(name="decode_e5m2", lengths=(33, 0, 16), kv_dtype="float8_e5m2", dtype="bfloat16", softcap=20.0, page_size=32),
)  # fmt: skip
PREFILL = (
    Case(name="prefill_one_token", lengths=(1,), queries=(1,)),
    Case(name="prefill_ragged", lengths=(7, 30, 1, 16), queries=(7, 30, 1, 16), padding=10),
    Case(name="prefill_continues", lengths=(40, 170, 23), queries=(8, 31, 1), padding=3, q_heads=9, kv_heads=3),
    Case(name="prefill_idle_rows", lengths=(20, 9, 0, 0), queries=(20, 9, 0, 0), padding=3, q_heads=2),
    Case(name="prefill_all_idle", lengths=(0, 0), queries=(0, 0), padding=16),
    Case(name="prefill_block_borders", lengths=(127, 128, 129), queries=(127, 128, 129), q_heads=2, kv_heads=1),
    Case(name="prefill_long_context", lengths=(1500, 6), queries=(40, 6), page_size=32, head_dim=128, kv_heads=1),
    Case(name="prefill_window", lengths=(300, 12, 40), queries=(150, 12, 20), window=24, head_dim=80),
    Case(name="prefill_softcap_mqa_8", lengths=(50, 20), queries=(50, 3), q_heads=8, kv_heads=1, softcap=5.0),
    Case(name="prefill_pages_of_1", lengths=(19, 130), queries=(19, 2), page_size=1, padding=5),
    Case(name="prefill_bfloat16", lengths=(140, 33), queries=(140, 5), padding=7, dtype="bfloat16", window=100),
    Case(name="prefill_head_256_bfloat16", lengths=(40, 21), queries=(30, 21), dtype="bfloat16", head_dim=256),
    Case(name="prefill_sinks", lengths=(90, 14), queries=(60, 14), sinks=True, window=30, padding=6),
    Case(name="prefill_sinks_bfloat16", lengths=(33, 150), queries=(33, 20), sinks=True, dtype="bfloat16", q_heads=8),
    Case(name="prefill_int8", lengths=(70, 40, 0), queries=(70, 9, 0), kv_dtype="int8", padding=5, page_size=32),
    Case(name="prefill_e4m3", lengths=(64, 130), queries=(10, 130), kv_dtype="float8_e4m3fn", dtype="bfloat16",
         head_dim=128, page_size=32),
    Case(name="prefill_latent", lengths=(7, 40, 20), queries=(7, 11, 20), padding=5, **_LATENT),
    Case(name="prefill_latent_bfloat16", lengths=(150, 6), queries=(30, 6), dtype="bfloat16", page_size=32, **_LATENT),
    Case(name="prefill_latent_128_heads", lengths=(5, 20), queries=(5, 7), padding=2, dtype="bfloat16",
         **_LATENT_128),
    # A few queries a row, as in verification: contexts of many key blocks, of which the first's last is not every
    # query's; an odd chunk, one from the start, idle rows.
    Case(name="prefill_latent_verify", lengths=(259, 700, 70, 5, 0, 0), queries=(5, 4, 1, 5, 0, 0), padding=2,
         dtype="bfloat16", page_size=32, pages_per_seq=32, **_LATENT_16),
    Case(name="prefill_latent_window", lengths=(90, 14), queries=(60, 14), window=30, sinks=True, **_LATENT),
    Case(name="prefill_latent_int8", lengths=(70, 9), queries=(20, 9), kv_dtype="int8", page_size=32, **_LATENT),
    Case(name="prefill_e5m2", lengths=(33,), queries=(33,), kv_dtype="float8_e5m2", dtype="bfloat16", page_size=32),
)  # fmt: skip
# Real: the shapes of models and loads that people serve. For compilers, benchmarks and tuning.
_SMOLLM2 = {"q_heads": 9, "kv_heads": 3, "head_dim": 64, "page_size": 32, "dtype": "bfloat16"}
_LLAMA_8B = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "page_size": 32, "dtype": "bfloat16"}
_LLAMA_70B = {**_LLAMA_8B, "q_heads": 64}
_QWEN3_30B = {**_LLAMA_8B, "kv_heads": 4}
_GEMMA3_27B = {**_LLAMA_8B, "kv_heads": 16, "window": 1024}
_GPT_OSS = {**_LLAMA_8B, "q_heads": 64, "head_dim": 64, "window": 128, "sinks": True}
_PHI3 = {**_LLAMA_8B, "kv_heads": 32, "head_dim": 96}
_GEMMA2_9B = {**_LLAMA_8B, "q_heads": 16, "head_dim": 256, "softcap": 50.0}
# Multi-head latent attention in its absorbed form: a latent of 512 and a rotary key of 64.
_DEEPSEEK_V3: dict[str, Any] = {"q_heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "page_size": 32,
                                "dtype": "bfloat16"}  # fmt: skip
_DEEPSEEK_V2_LITE: dict[str, Any] = {**_DEEPSEEK_V3, "q_heads": 16}
REAL = (
    Case(name="smollm2_decode_32x1k", lengths=(1024,) * 32, **_SMOLLM2),
    Case(name="smollm2_prefill_2k", lengths=(2048,), queries=(2048,), **_SMOLLM2),
    Case(name="llama8b_decode_8x1k", lengths=(1024,) * 8, **_LLAMA_8B),
    Case(name="llama8b_decode_64x1k", lengths=(1024,) * 64, **_LLAMA_8B),
    Case(name="llama8b_decode_256x1k", lengths=(1024,) * 256, **_LLAMA_8B),
    Case(name="llama8b_decode_8x8k", lengths=(8192,) * 8, **_LLAMA_8B),
    Case(name="llama8b_decode_1x32k", lengths=(32768,), **_LLAMA_8B),
    Case(name="llama8b_decode_64x1k_int8", lengths=(1024,) * 64, kv_dtype="int8", **_LLAMA_8B),
    Case(name="llama8b_decode_64x1k_e4m3", lengths=(1024,) * 64, kv_dtype="float8_e4m3fn", **_LLAMA_8B),
    Case(name="llama8b_prefill_1k", lengths=(1024,), queries=(1024,), **_LLAMA_8B),
    Case(name="llama8b_prefill_8k", lengths=(8192,), queries=(8192,), **_LLAMA_8B),
    Case(name="llama8b_prefill_chunk_of_8k", lengths=(8192,), queries=(1024,), **_LLAMA_8B),
    Case(name="llama8b_prefill_ragged_4k", lengths=(700, 90, 2000, 1300), queries=(700, 90, 2000, 1300), padding=6,
         **_LLAMA_8B),
    Case(name="llama8b_prefill_8k_int8", lengths=(8192,), queries=(8192,), kv_dtype="int8", **_LLAMA_8B),
    Case(name="llama70b_decode_32x4k", lengths=(4096,) * 32, **_LLAMA_70B),
    Case(name="qwen3_30b_decode_32x4k", lengths=(4096,) * 32, **_QWEN3_30B),
    Case(name="gemma3_27b_decode_16x8k_window", lengths=(8192,) * 16, **_GEMMA3_27B),
    Case(name="gemma2_9b_prefill_4k_softcap", lengths=(4096,), queries=(4096,), **_GEMMA2_9B),
    Case(name="gpt_oss_decode_32x4k_sinks", lengths=(4096,) * 32, **_GPT_OSS),
    Case(name="gpt_oss_prefill_4k_sinks", lengths=(4096,), queries=(4096,), **_GPT_OSS),
    Case(name="phi3_decode_16x2k_head_96", lengths=(2048,) * 16, **_PHI3),
    Case(name="deepseek_v3_decode_32x4k", lengths=(4096,) * 32, **_DEEPSEEK_V3),
    Case(name="deepseek_v3_decode_32x4k_int8", lengths=(4096,) * 32, kv_dtype="int8", **_DEEPSEEK_V3),
    Case(name="deepseek_v3_prefill_512_of_4k", lengths=(4096,), queries=(512,), **_DEEPSEEK_V3),
    Case(name="deepseek_v3_verify_16x4k", lengths=(4096,) * 16, queries=(5,) * 16, **_DEEPSEEK_V3),
    Case(name="deepseek_v2_lite_decode_32x4k", lengths=(4096,) * 32, **_DEEPSEEK_V2_LITE),
    Case(name="deepseek_v2_lite_prefill_512_of_4k", lengths=(4096,), queries=(512,), **_DEEPSEEK_V2_LITE),
    Case(name="deepseek_v2_lite_verify_16x4k", lengths=(4096,) * 16, queries=(5,) * 16, **_DEEPSEEK_V2_LITE),
)  # fmt: skip
CASES = DECODE + PREFILL
