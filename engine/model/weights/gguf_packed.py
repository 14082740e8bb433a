"""GGUF's quantized types as numbers with scales: which packing holds each, and its rows unpacked.

Types and bit order are ggml's (ggml-quants.c); the products of a block's scale with the 6- or 8-bit
scales of its groups are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind

from engine.model.packing import Packing
from engine.model.weights.packed import TWICE_E2M1, PackedRows

PACKINGS: dict[Kind, Packing] = {
    Kind.Q4_0: Packing("int4", 32),
    Kind.Q4_1: Packing("int4", 32, symmetric=False),
    Kind.Q5_0: Packing("int8", 32),
    Kind.Q5_1: Packing("int8", 32, symmetric=False),
    Kind.Q8_0: Packing("int8", 32),
    Kind.Q4_K: Packing("int4", 32, symmetric=False),
    Kind.Q5_K: Packing("int8", 32, symmetric=False),
    Kind.Q6_K: Packing("int8", 16),
    Kind.MXFP4: Packing("int8", 32, scale_dtype="bfloat16"),
}
Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # numbers [blocks, block], scales and offsets [blocks, groups]


def unpacked_rows(raw: np.ndarray, kind: Kind) -> PackedRows:
    """Raw rows uint8 [rows, row_bytes] of a type of PACKINGS."""
    rows, block_bytes = len(raw), GGML_QUANT_SIZES[kind][1]
    numbers, scales, offsets = _UNPACK[kind](np.ascontiguousarray(raw).reshape(-1, block_bytes))
    offsets = None if offsets is None else offsets.reshape(rows, -1)
    return PackedRows(numbers.reshape(rows, -1), scales.reshape(rows, -1), offsets)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """float32 [blocks, 1] of the float16 at byte `start`."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _halves(packed: np.ndarray, run: int) -> np.ndarray:
    """Nibbles [blocks, 2 * bytes]: of each `run` bytes the low ones, then the high ones."""
    runs = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1)


def _q4_0(blocks: np.ndarray) -> Parts:
    return _halves(blocks[:, 2:], 16), _half(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> Parts:
    return _halves(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """The high bits [blocks, 32], at their place, of bytes [blocks, 4]."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _q5_0(blocks: np.ndarray) -> Parts:
    numbers = _halves(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return numbers.astype(np.int8) - np.int8(16), _half(blocks, 0), None


def _q5_1(blocks: np.ndarray) -> Parts:
    numbers = _halves(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return numbers.astype(np.int8), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> Parts:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _half(blocks, 0), None


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scales and offsets [blocks, 8] of Q4_K and Q5_K."""
    scales, minima = quants.Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    return _half(blocks, 0) * scales.astype(np.float32), -(_half(blocks, 2) * minima.astype(np.float32))


def _q4_k(blocks: np.ndarray) -> Parts:
    return _halves(blocks[:, 16:], 32), *_k_scales(blocks)


def _q5_k(blocks: np.ndarray) -> Parts:
    bits = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    high = ((blocks[:, 16:48].reshape(-1, 1, 32) >> bits) & 1) << 4
    numbers = _halves(blocks[:, 48:], 32) | high.reshape(len(blocks), -1)
    return numbers.astype(np.int8), *_k_scales(blocks)


def _q6_k(blocks: np.ndarray) -> Parts:
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3) << 4
    numbers = _halves(blocks[:, :128], 64) | high.reshape(len(blocks), -1)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return numbers.astype(np.int8) - np.int8(32), _half(blocks, 208) * scales, None


def _mxfp4(blocks: np.ndarray) -> Parts:
    scales = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return TWICE_E2M1[_halves(blocks[:, 1:], 16)], scales, None


_UNPACK: dict[Kind, Callable[[np.ndarray], Parts]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q8_0: _q8_0,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
    Kind.MXFP4: _mxfp4,
}
