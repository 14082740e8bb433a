"""Named shapes of quantized_matmul, as data: what tests check, benchmarks time and tuning searches.

Knows no arrays. SMALL ones are for the interpreters, REAL ones are layers of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pallas_kernels.quantized import Activations, WeightFormat


@dataclass(frozen=True, kw_only=True)
class Case:
    """x [tokens, k] times a weight [k, n]. group None: one scale a column."""

    name: str
    tokens: int
    k: int
    n: int
    format: WeightFormat
    group: int | None = None
    symmetric: bool = True
    activations: Activations = "float"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    scale_dtype: Literal["float32", "bfloat16"] = "float32"


SMALL = (
    Case(name="int8", tokens=3, k=256, n=256, format="int8"),
    Case(name="int8_float32", tokens=9, k=192, n=128, format="int8", dtype="float32"),
    Case(name="int8_one_row", tokens=1, k=128, n=384, format="int8"),
    Case(name="int8_grouped", tokens=5, k=256, n=128, format="int8", group=64),
    Case(name="int8_over_the_edge", tokens=130, k=128, n=192, format="int8"),
    Case(name="int8_blocks_of_k", tokens=4, k=8192, n=64, format="int8"),
    Case(name="int8_dynamic", tokens=6, k=256, n=256, format="int8", activations="dynamic"),
    Case(name="int8_dynamic_grouped", tokens=6, k=256, n=128, format="int8", group=128, activations="dynamic"),
    Case(name="int4_32", tokens=8, k=256, n=128, format="int4", group=32),
    Case(name="int4_64", tokens=16, k=192, n=256, format="int4", group=64),
    Case(name="int4_64_float32", tokens=7, k=192, n=128, format="int4", group=64, dtype="float32"),
    Case(name="int4_128", tokens=2, k=512, n=128, format="int4", group=128),
    Case(name="int4_128_rows_70", tokens=70, k=256, n=192, format="int4", group=128),
    Case(name="int4_32_offsets", tokens=4, k=128, n=256, format="int4", group=32, symmetric=False),
    Case(name="int4_128_offsets", tokens=20, k=256, n=128, format="int4", group=128, symmetric=False),
    Case(name="int4_32_bf16", tokens=6, k=192, n=128, format="int4", group=32, scale_dtype="bfloat16"),
    Case(
        name="int4_32_offsets_bf16",
        tokens=40,
        k=256,
        n=128,
        format="int4",
        group=32,
        symmetric=False,
        scale_dtype="bfloat16",
    ),
    Case(name="int8_bf16", tokens=3, k=128, n=128, format="int8", scale_dtype="bfloat16"),
    Case(name="int8_32", tokens=5, k=192, n=128, format="int8", group=32),
    Case(name="int8_32_offsets", tokens=5, k=128, n=128, format="int8", group=32, symmetric=False),
    Case(name="int8_16_offsets", tokens=5, k=128, n=128, format="int8", group=16, symmetric=False),
    Case(name="int8_dynamic_32", tokens=6, k=320, n=256, format="int8", activations="dynamic_32"),
    Case(
        name="int4_dynamic_32",
        tokens=7,
        k=256,
        n=128,
        format="int4",
        group=64,
        symmetric=False,
        activations="dynamic_32",
        scale_dtype="bfloat16",
    ),
    Case(name="e4m3", tokens=5, k=256, n=128, format="float8_e4m3fn"),
    Case(name="e4m3_dynamic", tokens=5, k=256, n=128, format="float8_e4m3fn", activations="dynamic"),
    Case(name="e5m2", tokens=5, k=128, n=128, format="float8_e5m2"),
    Case(name="e5m2_dynamic", tokens=5, k=128, n=128, format="float8_e5m2", activations="dynamic"),
)

_LAYERS = (
    ("smollm2_135m_qkv", 576, 960),
    ("smollm2_135m_down", 1536, 576),
    ("smollm2_135m_lm_head", 576, 49152),
    ("llama_8b_qkv", 4096, 6144),
    ("llama_8b_gate_up", 4096, 28672),
    ("llama_8b_down", 14336, 4096),
    ("llama_70b_gate_up", 8192, 57344),
    ("llama_70b_down_of_8", 3584, 8192),  # its share on a mesh of 8
    ("gemma3_12b_down", 15360, 3840),
)
_KINDS: tuple[tuple[str, WeightFormat, int | None, bool, Activations], ...] = (
    ("int8", "int8", None, True, "float"),
    ("int8_32", "int8", 32, True, "float"),  # GGUF's Q8_0
    ("int8_16", "int8", 16, True, "float"),  # Q6_K
    ("int8_dynamic", "int8", None, True, "dynamic"),
    ("int4_128", "int4", 128, True, "float"),
    ("int4_64", "int4", 64, True, "float"),
    ("int4_32_offsets", "int4", 32, False, "float"),  # Q4_1, Q4_K
    ("e4m3", "float8_e4m3fn", None, True, "float"),
    ("e4m3_dynamic", "float8_e4m3fn", None, True, "dynamic"),
)
REAL = tuple(
    Case(
        name=f"{layer}_{kind}_{tokens}",
        tokens=tokens,
        k=k,
        n=n,
        format=format,
        group=group,
        symmetric=symmetric,
        activations=activations,
    )
    for layer, k, n in _LAYERS
    for kind, format, group, symmetric, activations in _KINDS
    if group is None or k % group == 0
    for tokens in (1, 16, 64, 4096)
)
CASES = SMALL + REAL
