"""Which weights are packed on the device, and into what: by `--quantization`, or as the checkpoint has them.

Only the matrices of the layers can be (`ParamSpec.packable`); embeddings, LM head, norms and biases stay.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import jax
import numpy as np

from engine.errors import ModelError
from engine.model.packing import Packing
from pallas_kernels.matmul import cpu as matmul_cpu
from pallas_kernels.panels import in_panels
from pallas_kernels.quantized import Quantized, WeightFormat, quantize, quantized_shape
from pallas_kernels.quantized_matmul import cpu as quantized_matmul_cpu
from pallas_kernels.target import Target
from sharding.params import ParamSpec

Quantization = Literal["int8", "int4", "fp8"]
FORMATS: dict[Quantization, WeightFormat] = {"int8": "int8", "int4": "int4", "fp8": "float8_e4m3fn"}
# Rows that share a scale and an offset: 5 bits a weight in all. Rounding to nearest needs groups this
# small, and what ggml packed as Q4_1 comes through as it was (`benchmarks.perplexity` has the figures).
INT4_GROUP = 32


def packing_of(spec: ParamSpec, quantization: Quantization | None) -> Packing | None:
    """What `--quantization` makes of `spec`; None: it stays as it is."""
    if quantization is None or not spec.packable:
        return None
    if quantization != "int4":
        return Packing(FORMATS[quantization])
    rows = spec.device_shape[-2]
    if rows % INT4_GROUP:
        raise ModelError(f"quantization int4: a weight of {rows} rows does not divide into groups of {INT4_GROUP}")
    return Packing("int4", INT4_GROUP, symmetric=False, scale_dtype="bfloat16")


def packed_shape(spec: ParamSpec, packing: Packing | None, panels_for: Target | None = None) -> Any:
    """What is on the device for `spec`: a ShapeDtypeStruct, or Panels or a Quantized of them."""
    if packing is None:
        return _laid(spec, jax.ShapeDtypeStruct(spec.device_shape, spec.dtype), panels_for)
    return _laid(spec, quantized_shape(spec.device_shape, **_arguments(packing)), panels_for)


def pack(
    spec: ParamSpec,
    array: np.ndarray | Quantized,
    quantization: Quantization | None,
    panels_for: Target | None = None,
) -> Any:
    """A host array of `spec` as it is on the device; what a checkpoint brings packed stays so.

    panels_for: where matrices are cut into panels if kernels of this target are best at that.
    """
    if isinstance(array, Quantized):
        return _laid(spec, _flat(spec, array), panels_for)
    matrix = array.reshape(spec.device_shape)
    packing = packing_of(spec, quantization)
    return _laid(spec, matrix if packing is None else quantize(matrix, **_arguments(packing)), panels_for)


def _laid(spec: ParamSpec, weight: Any, panels_for: Target | None) -> Any:
    """In panels, if `spec` is only ever multiplied by, and by kernels that want them."""
    if panels_for is None or not spec.packable or len(spec.device_shape) != 2:
        return weight
    op = "quantized_matmul" if isinstance(weight, Quantized) else "matmul"
    if panels_for.asked(op) not in (None, "cpu"):
        return weight
    if isinstance(weight, Quantized):
        width = quantized_matmul_cpu.panel_of(weight, panels_for)
        return quantized_matmul_cpu.cut(weight, width) if width else weight
    rows, columns = spec.device_shape
    width = matmul_cpu.panel_of(rows, columns, str(jax.numpy.dtype(weight.dtype)), panels_for)
    return in_panels(weight, width) if width else weight


def _flat(spec: ParamSpec, packed: Quantized) -> Quantized:
    """The packed arrays with the columns of `spec` merged, as `device_shape` merges them."""
    lead, columns = spec.device_shape[:-2], spec.device_shape[-1]
    return jax.tree.map(lambda leaf: leaf.reshape(*lead, -1, columns), packed)


def _arguments(packing: Packing) -> dict[str, Any]:
    return {**asdict(packing), "scale_dtype": jax.numpy.dtype(packing.scale_dtype)}
