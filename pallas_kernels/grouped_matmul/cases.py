"""Named shapes of grouped_matmul, as data: what tests check and benchmarks time.

Knows no arrays; a case says what a step would bring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pallas_kernels.grouped_matmul.api import GroupedSpec
from pallas_kernels.quantized import Activations, WeightFormat


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: rows of each expert, then `padding` rows of nobody."""

    name: str
    sizes: tuple[int, ...]
    padding: int = 0
    k: int = 128
    n: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    format: WeightFormat | Literal["none"] = "none"
    group: int | None = None  # None: per channel
    symmetric: bool = True
    activations: Activations = "float"
    scale_dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def num_tokens(self) -> int:
        return sum(self.sizes) + self.padding

    @property
    def num_active(self) -> int:
        """Experts with rows."""
        return sum(size > 0 for size in self.sizes)

    def spec(self) -> GroupedSpec:
        """What `api.choice` sees of this call."""
        group = 0 if self.format == "none" else self.group or self.k
        return GroupedSpec(
            tokens=self.num_tokens,
            k=self.k,
            n=self.n,
            experts=len(self.sizes),
            dtype=self.dtype,
            format=self.format,
            group=group,
            offsets=not self.symmetric,
            activations=self.activations,
            scale_dtype=self.scale_dtype,
        )


def even(rows: int, experts: int) -> tuple[int, ...]:
    """`rows` spread as evenly as they go, the first experts one more."""
    return tuple(rows // experts + (expert < rows % experts) for expert in range(experts))


def skewed(rows: int, experts: int) -> tuple[int, ...]:
    """`rows` in shares of 1, 1/2, 1/3, ... over experts in a mixed order; small shares round to none."""
    total = sum(1 / rank for rank in range(1, experts + 1))
    sizes = [int(rows / (rank * total)) for rank in range(1, experts + 1)]
    sizes[0] += rows - sum(sizes)
    step = next(s for s in (7, 5, 3, 1) if experts % s or s == 1)
    return tuple(sizes[expert * step % experts] for expert in range(experts))


# Small: every feature, sizes that an interpreter can do.
SMALL = (
    Case(name="one_row", sizes=(0, 1, 0)),
    Case(name="one_expert", sizes=(20,)),
    Case(name="ragged", sizes=(3, 0, 17, 1, 0, 11), padding=4),
    Case(name="all_in_one", sizes=(0, 0, 40, 0), k=256),
    Case(name="no_rows", sizes=(0, 0, 0), padding=16),
    Case(name="borders_on_tiles", sizes=(8, 16, 64, 8), n=256),
    Case(name="more_experts_than_rows", sizes=(0, 1, 0, 0, 1, 0, 2, 0, 0, 1, 0, 0), padding=3),
    Case(name="over_a_tile", sizes=(130, 5, 150), padding=20),
    Case(name="k_in_steps", sizes=(2, 0, 6), k=4224, dtype="bfloat16"),
    Case(name="k_in_steps_int8", sizes=(2, 0, 6), k=4224, dtype="bfloat16", format="int8"),
    Case(name="bfloat16", sizes=(5, 0, 33, 9), padding=1, k=256, n=256, dtype="bfloat16"),
    Case(name="half_a_block", sizes=(3, 0, 9, 1), padding=2, n=192),
    Case(name="half_a_block_bfloat16", sizes=(5, 0, 33, 9), k=192, n=320, dtype="bfloat16"),
    Case(name="half_a_block_int8", sizes=(4, 0, 12), n=192, format="int8", dtype="bfloat16"),
    Case(name="half_a_block_int4", sizes=(4, 0, 12), n=192, format="int4", group=32, dtype="bfloat16", k=256),
    Case(name="bfloat16_many_rows", sizes=(150, 3, 0, 140), padding=40, dtype="bfloat16"),
    Case(name="bfloat16_decode", sizes=(1, 0, 2, 0, 1, 0, 0, 4), k=256, dtype="bfloat16"),
    Case(name="int8", sizes=(4, 0, 12), padding=2, format="int8", dtype="bfloat16", k=256),
    Case(name="int8_float32", sizes=(9, 1, 0), format="int8"),
    Case(name="int8_groups", sizes=(7, 2), format="int8", group=128, k=256, dtype="bfloat16"),
    Case(name="int8_dynamic", sizes=(6, 0, 3), format="int8", activations="dynamic", dtype="bfloat16"),
    Case(name="int4_groups_of_32", sizes=(5, 3, 0), format="int4", group=32, k=256, dtype="bfloat16"),
    Case(name="int4_groups_of_64_offsets", sizes=(0, 6, 3), format="int4", group=64, symmetric=False, k=256,
         dtype="bfloat16"),
    Case(name="int4_groups_of_32_bf16", sizes=(0, 6, 3), format="int4", group=32, symmetric=False, k=256,
         dtype="bfloat16", scale_dtype="bfloat16"),
    Case(name="int4_groups_of_128", sizes=(2, 0, 9), format="int4", group=128, k=256),
    Case(name="int4_groups_of_256", sizes=(3, 0, 14, 1), padding=3, format="int4", group=256, k=512, n=256,
         dtype="bfloat16"),
    Case(name="int4_groups_of_96_offsets", sizes=(7, 2), format="int4", group=96, symmetric=False, k=192,
         dtype="bfloat16"),
    Case(name="int4_one_group", sizes=(0, 5, 3), format="int4", k=256, dtype="bfloat16"),
    Case(name="int4_many_rows", sizes=(150, 3, 0, 140), padding=11, format="int4", group=64, dtype="bfloat16"),
    Case(name="int8_decode", sizes=(1, 0, 2, 0, 1, 0, 0, 4), format="int8", k=256, dtype="bfloat16"),
    Case(name="int8_groups_of_160_offsets", sizes=(7, 2), format="int8", group=160, symmetric=False, k=320,
         dtype="bfloat16"),
    Case(name="e4m3", sizes=(4, 0, 12), format="float8_e4m3fn", dtype="bfloat16"),
    Case(name="e4m3_dynamic", sizes=(2, 9), format="float8_e4m3fn", activations="dynamic", dtype="bfloat16"),
    Case(name="e5m2", sizes=(4, 7, 0), format="float8_e5m2", dtype="bfloat16"),
    Case(name="e5m2_groups_of_32", sizes=(4, 7, 0), format="float8_e5m2", group=32, dtype="bfloat16",
         scale_dtype="bfloat16"),
)  # fmt: skip
# Real: (rows are tokens times experts a token) of models that people serve. For compilers, benchmarks and tuning.
_QWEN3_UP = {"k": 2048, "n": 1536, "dtype": "bfloat16"}
_QWEN3_DOWN = {"k": 768, "n": 2048, "dtype": "bfloat16"}
_MIXTRAL_UP = {"k": 4096, "n": 28672, "dtype": "bfloat16"}
_MIXTRAL_DOWN = {"k": 14336, "n": 4096, "dtype": "bfloat16"}
_GPT_OSS_UP = {"k": 2880, "n": 5760, "dtype": "bfloat16"}
_GPT_OSS_DOWN = {"k": 2880, "n": 2944, "dtype": "bfloat16"}  # 2880 in whole tiles
_GRANITE_UP = {"k": 1024, "n": 1024, "dtype": "bfloat16"}
_INT4 = {"format": "int4", "group": 128}
REAL = (
    Case(name="qwen3_30b_up_1", sizes=even(8, 128), **_QWEN3_UP),
    Case(name="qwen3_30b_up_32", sizes=skewed(256, 128), **_QWEN3_UP),
    Case(name="qwen3_30b_up_4k", sizes=skewed(32768, 128), **_QWEN3_UP),
    Case(name="qwen3_30b_up_4k_even", sizes=even(32768, 128), **_QWEN3_UP),
    Case(name="qwen3_30b_down_32", sizes=skewed(256, 128), **_QWEN3_DOWN),
    Case(name="qwen3_30b_down_4k", sizes=skewed(32768, 128), **_QWEN3_DOWN),
    Case(name="qwen3_30b_up_32_int8", sizes=skewed(256, 128), format="int8", **_QWEN3_UP),
    Case(name="qwen3_30b_up_32_int4", sizes=skewed(256, 128), **_INT4, **_QWEN3_UP),
    Case(name="qwen3_30b_up_32_int4_offsets", sizes=skewed(256, 128), symmetric=False, **_INT4, **_QWEN3_UP),
    Case(name="qwen3_30b_up_32_e4m3", sizes=skewed(256, 128), format="float8_e4m3fn", **_QWEN3_UP),
    Case(name="qwen3_30b_up_4k_int8", sizes=skewed(32768, 128), format="int8", **_QWEN3_UP),
    Case(name="qwen3_30b_up_4k_int4", sizes=skewed(32768, 128), **_INT4, **_QWEN3_UP),
    Case(name="qwen3_30b_up_4k_int4_offsets", sizes=skewed(32768, 128), symmetric=False, **_INT4, **_QWEN3_UP),
    Case(name="qwen3_30b_down_4k_int4", sizes=skewed(32768, 128), **_INT4, **_QWEN3_DOWN),
    Case(name="mixtral_8x7b_up_16", sizes=even(32, 8), **_MIXTRAL_UP),
    Case(name="mixtral_8x7b_up_4k", sizes=skewed(8192, 8), **_MIXTRAL_UP),
    Case(name="mixtral_8x7b_down_4k", sizes=skewed(8192, 8), **_MIXTRAL_DOWN),
    Case(name="mixtral_8x7b_up_16_int4", sizes=even(32, 8), **_INT4, **_MIXTRAL_UP),
    Case(name="gpt_oss_20b_up_32", sizes=skewed(128, 32), **_GPT_OSS_UP),
    Case(name="gpt_oss_20b_up_4k", sizes=skewed(16384, 32), **_GPT_OSS_UP),
    Case(name="gpt_oss_120b_down_32", sizes=skewed(128, 128), **_GPT_OSS_DOWN),
    Case(name="gpt_oss_120b_down_32_int8", sizes=skewed(128, 128), format="int8", **_GPT_OSS_DOWN),
    Case(name="granite_3b_up_2k", sizes=skewed(16384, 40), **_GRANITE_UP),
)  # fmt: skip
