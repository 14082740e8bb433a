"""How parameters are packed, as plain data: a part of the engine's configuration. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pallas_kernels.quantized import Activations, WeightFormat


# What `--quantization` can make of weights while they are loaded; the numbers are `quantization.FORMATS`.
Quantization = Literal["int8", "int4", "fp8", "w8a8", "w8a8_32", "w4a8_32"]


@dataclass(frozen=True)
class Packing:
    """The kind of a `Quantized`. group: rows that share a scale; None: all of them, one scale a column."""

    format: WeightFormat
    group: int | None = None
    symmetric: bool = True  # False: with offsets
    activations: Activations = "float"
    scale_dtype: Literal["float32", "bfloat16"] = "float32"

    def __str__(self) -> str:
        grouped = "a scale a column" if self.group is None else f"groups of {self.group}"
        offsets = "" if self.symmetric else ", offsets"
        dynamic = "" if self.activations == "float" else f", {self.activations} activations"
        return f"{self.format} in {grouped}{offsets}, {self.scale_dtype} scales{dynamic}"


Packings = tuple[tuple[str, Packing], ...]  # (parameter, how), for those that are packed
