"""Which weights are packed on the device, and into what: by `--quantization`, or as the checkpoint has them.

Only matrices can be that are nothing but multiplied by (`ParamSpec.packable`): those of the layers, and the LM head
where it is asked for. Embeddings, norms and biases stay.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import numpy as np

from engine.errors import ModelError
from engine.model.packing import Packing, Quantization
from engine.model.params import LANES
from pallas_kernels.matmul import cpu as matmul_cpu
from pallas_kernels.panels import in_panels
from pallas_kernels.quantized import BLOCK, Activations, Quantized, WeightFormat, quantize, quantized_shape
from pallas_kernels.quantized_matmul import cpu as quantized_matmul_cpu
from pallas_kernels.target import Target
from sharding.params import ParamSpec

FORMATS: dict[Quantization, tuple[WeightFormat, Activations]] = {
    "int8": ("int8", "float"),
    "int4": ("int4", "float"),
    "fp8": ("float8_e4m3fn", "float"),
    "w8a8": ("int8", "dynamic"),
    "w8a8_32": ("int8", "dynamic_32"),
    "w4a8_32": ("int4", "dynamic_32"),
}
# Rows that share a scale and an offset: 5 bits a weight in all. Rounding to nearest needs groups this
# small, and what ggml packed as Q4_1 comes through as it was (`benchmarks.perplexity` has the figures).
INT4_GROUP = 32


def packing_of(spec: ParamSpec, quantization: Quantization | None) -> Packing | None:
    """What `--quantization` makes of `spec`; None: it stays as it is."""
    if quantization is None or not spec.packable:
        return None
    format, activations = FORMATS[quantization]
    if format == "int4" and spec.fewest_bits > 4:
        format = "int8"
    rows = spec.device_shape[-2]
    if (format == "int4" and rows % INT4_GROUP) or (activations == "dynamic_32" and rows % BLOCK):
        raise ModelError(f"quantization {quantization}: a weight of {rows} rows does not divide into groups of 32")
    if format == "int4":
        return Packing("int4", INT4_GROUP, symmetric=False, activations=activations, scale_dtype="bfloat16")
    return Packing(format, activations=activations)


def packed_shape(spec: ParamSpec, packing: Packing | None, laid_for: Target | None = None) -> Any:
    """What is on the device for `spec`: a ShapeDtypeStruct, or Panels or a Quantized of them."""
    if packing is None:
        return _laid(spec, jax.ShapeDtypeStruct(spec.device_shape, spec.dtype), laid_for)
    return _laid(spec, quantized_shape(spec.device_shape, **_arguments(packing)), laid_for)


def pack(
    spec: ParamSpec,
    array: np.ndarray | Quantized,
    quantization: Quantization | None,
    laid_for: Target | None = None,
) -> Any:
    """A host array of `spec` as it is on the device; what a checkpoint brings packed stays so.

    laid_for: whose kernels it is laid out for; None: it stays as it is declared.
    """
    if isinstance(array, Quantized):
        return _laid(spec, _flat(spec, array), laid_for)
    matrix = array.reshape(spec.device_shape)
    packing = packing_of(spec, quantization)
    return _laid(spec, matrix if packing is None else quantize(matrix, **_arguments(packing)), laid_for)


def _laid(spec: ParamSpec, weight: Any, target: Target | None) -> Any:
    """As the target reads it best."""
    if target is None:
        return weight
    if target.platform == "cpu":
        return _in_panels(weight, target) if spec.packable and len(spec.device_shape) == 2 else weight
    # A GPU looks up rows of any length; its kernel for experts wants whole tiles too.
    return _in_whole_tiles(weight) if spec.by_rows and (spec.lead or target.platform == "tpu") else weight


def _in_whole_tiles(weight: Any) -> Any:
    """With columns of zeros up to a multiple of `LANES`.

    Else libtpu has another dimension in the lanes, which saves the padding, and a program that reads rows copies all
    of them into their order whenever it runs. Stored row by row they would be as large as with the zeros.
    """
    more = -weight.shape[-1] % LANES
    return jax.tree.map(partial(_wider, more), weight) if more else weight


def _wider(more: int, leaf: Any) -> Any:
    shape = (*leaf.shape[:-1], leaf.shape[-1] + more)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    wide = np.zeros(shape, leaf.dtype)
    wide[..., : leaf.shape[-1]] = leaf
    return wide


def _in_panels(weight: Any, target: Target) -> Any:
    """A matrix in panels, if the kernels that it is multiplied by want them."""
    op = "quantized_matmul" if isinstance(weight, Quantized) else "matmul"
    if target.asked(op) not in (None, "cpu"):
        return weight
    if isinstance(weight, Quantized):
        width = quantized_matmul_cpu.panel_of(weight, target)
        return quantized_matmul_cpu.cut(weight, width) if width else weight
    rows, columns = weight.shape
    width = matmul_cpu.panel_of(rows, columns, str(jax.numpy.dtype(weight.dtype)), target)
    return in_panels(weight, width) if width else weight


def _flat(spec: ParamSpec, packed: Quantized) -> Quantized:
    """The packed arrays with the columns of `spec` merged, as `device_shape` merges them."""
    lead, columns = spec.device_shape[:-2], spec.device_shape[-1]
    return jax.tree.map(lambda leaf: leaf.reshape(*lead, -1, columns), packed)


def _arguments(packing: Packing) -> dict[str, Any]:
    return {**asdict(packing), "scale_dtype": jax.numpy.dtype(packing.scale_dtype)}
