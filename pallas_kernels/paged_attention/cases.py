"""Named shapes of paged attention, as data: what tests check and benchmarks time.

Knows no arrays; a case says what a step would bring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
    page_size: int = 16
    window: int | None = None
    softcap: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def num_tokens(self) -> int:
        """Queries in the call, padding included."""
        return len(self.lengths) if self.queries is None else sum(self.queries) + self.padding


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
)
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
)
CASES = DECODE + PREFILL
