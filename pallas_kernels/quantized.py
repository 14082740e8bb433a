"""A weight kept packed: low-bit numbers with scales, one type for every backend and op.

w[k, n] = values[k, n] * scales[k // group, n] (+ offsets[k // group, n]), group = K / scales.shape[-2].
Per-channel weights have one group. int4 stores two nibbles a byte, each group by itself: byte row
j of a group holds row j in its low nibble and row j + group / 2 in its high one, so that a cut
along K at a group's border cuts the bytes too. A nibble is 0 to 15; without offsets it stands for
nibble - 8. A leading dimension, if any, is the expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
from jax import Array

WeightFormat = Literal["int8", "int4", "float8_e4m3fn", "float8_e5m2"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """[..., K, N] in `format`. A pytree of its arrays; format and activations are static.

    activations: "float" multiplies x as it is with the dequantized weight; "dynamic" quantizes each
    row of x to the weight's 8-bit format first, scale from the row's largest magnitude.
    """

    values: Array  # int8 or float8 [..., K, N]; int4: uint8 [..., K / 2, N]
    scales: Array  # float32, bfloat16 or float16 [..., K / group, N]
    offsets: Array | None  # like scales; None: symmetric
    format: WeightFormat = field(metadata={"static": True})
    activations: Literal["float", "dynamic"] = field(default="float", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        *lead, rows, columns = self.values.shape
        return (*lead, rows * 2 if self.format == "int4" else rows, columns)

    @property
    def group(self) -> int:
        """Rows of the weight that share a scale."""
        return self.shape[-2] // self.scales.shape[-2]
