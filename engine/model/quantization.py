"""`--quantization`: which weights are packed while they are loaded, and into what.

The matrices of the layers are (`ParamSpec.packable`); embeddings, LM head, norms and biases stay.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np

from engine.errors import ModelError
from pallas_kernels.quantized import Quantized, WeightFormat, quantize, quantized_shape
from sharding.params import ParamSpec

Quantization = Literal["int8", "int4", "fp8"]
FORMATS: dict[Quantization, WeightFormat] = {"int8": "int8", "int4": "int4", "fp8": "float8_e4m3fn"}
# Rows that share a scale and an offset: 5 bits a weight in all. Rounding to nearest needs groups this
# small, and what ggml packed as Q4_1 comes through as it was (`benchmarks.perplexity` has the figures).
INT4_GROUP = 32


def packed_shape(spec: ParamSpec, quantization: Quantization | None) -> Any:
    """What is on the device for `spec`: a ShapeDtypeStruct, or a Quantized of them."""
    if quantization is None or not spec.packable:
        return jax.ShapeDtypeStruct(spec.device_shape, spec.dtype)
    return quantized_shape(spec.device_shape, **_how(spec, quantization))


def pack(spec: ParamSpec, array: np.ndarray, quantization: Quantization | None) -> np.ndarray | Quantized:
    """The host array of `spec` as `packed_shape` says."""
    matrix = array.reshape(spec.device_shape)
    if quantization is None or not spec.packable:
        return matrix
    return quantize(matrix, **_how(spec, quantization))


def _how(spec: ParamSpec, quantization: Quantization) -> dict[str, Any]:
    if quantization != "int4":
        return {"format": FORMATS[quantization]}
    rows = spec.device_shape[-2]
    if rows % INT4_GROUP:
        raise ModelError(f"quantization int4: a weight of {rows} rows does not divide into groups of {INT4_GROUP}")
    return {"format": "int4", "group": INT4_GROUP, "symmetric": False, "scale_dtype": "bfloat16"}
