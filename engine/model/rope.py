"""Rotary frequencies of every scaling method, reduced to `Rope` (inverse frequencies and one factor).

Knows the standard names of the rope fields (rope_type, rope_theta, factor ...), not where a
config keeps them. Arithmetic is float32 in the order that trained models used (transformers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import ModelError
from engine.model.config import Rope

F32 = np.float32


@dataclass(frozen=True)
class Context:
    """Lengths in tokens that scaling methods depend on."""

    max_position: int  # what the config says the model can do
    max_model_len: int  # what this engine will serve; decides LongRoPE's factors


class Fields:
    """Rope fields as numbers; errors name the field, and a field that nobody read is one."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self._left = dict(fields)
        self._where = where

    def number(self, name: str, default: float | None = None) -> float | None:
        value = self._left.pop(name, None)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ModelError(f"{self._where}.{name} must be a number >= 0, got {value!r}")
        return float(value)

    def required(self, name: str) -> float:
        value = self.number(name)
        if not value:
            raise ModelError(f"{self._where}.{name} must be a number > 0, and is missing or 0")
        return value

    def numbers(self, name: str, length: int) -> np.ndarray:
        """float32 [length], all positive."""
        value = self._left.pop(name, None)
        if not isinstance(value, list) or len(value) != length:
            got = f"{len(value)} values" if isinstance(value, list) else repr(value)
            raise ModelError(f"{self._where}.{name} must be a list of {length} numbers, got {got}")
        if any(isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x < math.inf for x in value):
            raise ModelError(f"{self._where}.{name} must hold positive numbers only")
        return np.asarray(value, F32)

    def flag(self, name: str, default: bool) -> bool:
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self._where}.{name} must be true or false, got {value!r}")
        return value

    def text(self, name: str, default: str) -> str:
        value = self._left.pop(name, None)
        return default if value is None else str(value)

    def finish(self, rope_type: str) -> None:
        for name, value in self._left.items():
            if value is not None and value is not False:
                raise ModelError(f"{self._where}.{name} = {value!r} is not known for rope_type {rope_type!r}")


def make_rope(parameters: Mapping[str, Any], head_dim: int, context: Context, where: str = "rope_parameters") -> Rope:
    """`Rope` from the standard fields: rope_type (or type), rope_theta, and what the type needs.

    `where` is how errors call the dict. Raises ModelError for an unknown type or field.
    """
    fields = Fields(parameters, where)
    legacy_type = fields.text("type", "default")
    rope_type = fields.text("rope_type", legacy_type)
    if rope_type not in ROPE_TYPES:
        raise ModelError(f"{where}.rope_type {rope_type!r} is not supported; known: {', '.join(ROPE_TYPES)}")
    theta = fields.required("rope_theta")
    if theta <= 1:
        raise ModelError(f"{where}.rope_theta must be greater than 1, got {theta}")
    partial = fields.number("partial_rotary_factor", 1.0) or 0.0
    dim = int(head_dim * partial)
    if dim % 2 or not 0 < dim <= head_dim:
        raise ModelError(f"{where}.partial_rotary_factor {partial} of head_dim {head_dim} rotates {dim} dimensions; "
                         "an even number up to head_dim is needed")  # fmt: skip
    inv_freq, scale = ROPE_TYPES[rope_type](fields, theta, dim, context)
    fields.finish(rope_type)
    return Rope(tuple(float(f) for f in inv_freq.astype(F32)), float(scale))


def wavelengths(theta: float, dim: int) -> np.ndarray:
    """float32 [dim / 2]: theta ** (2 i / dim), the inverse of the unscaled frequencies."""
    exponents = np.arange(0, dim, 2, dtype=F32) / F32(dim)
    # The power in float64, rounded once: nearest to what torch's float32 pow returns.
    return (theta ** exponents.astype(np.float64)).astype(F32)


def _original_length(fields: Fields, context: Context) -> float:
    """Tokens of context that the unscaled frequencies were trained for."""
    original = fields.number("original_max_position_embeddings") or float(context.max_position)
    if original <= 1:
        raise ModelError(f"rope original_max_position_embeddings must be greater than 1, got {original}")
    return original


def _default(fields: Fields, theta: float, dim: int, context: Context) -> tuple[np.ndarray, float]:
    return F32(1) / wavelengths(theta, dim), 1.0


def _linear(fields: Fields, theta: float, dim: int, context: Context) -> tuple[np.ndarray, float]:
    return F32(1) / wavelengths(theta, dim) / F32(fields.required("factor")), 1.0


def _llama3(fields: Fields, theta: float, dim: int, context: Context) -> tuple[np.ndarray, float]:
    """Llama 3.1: keep short wavelengths, stretch long ones by factor, blend in between."""
    factor = F32(fields.required("factor"))
    low, high = fields.required("low_freq_factor"), fields.required("high_freq_factor")
    if high <= low:
        raise ModelError(f"rope high_freq_factor {high} must be greater than low_freq_factor {low}")
    original = _original_length(fields, context)
    inv_freq = F32(1) / wavelengths(theta, dim)
    wavelength = F32(2 * math.pi) / inv_freq
    blend = ((F32(original) / wavelength - F32(low)) / F32(high - low)).astype(F32)
    blended = (F32(1) - blend) * inv_freq / factor + blend * inv_freq
    stretched = np.where(wavelength > F32(original / low), inv_freq / factor, blended)
    return np.where(wavelength < F32(original / high), inv_freq, stretched), 1.0


def _yarn(fields: Fields, theta: float, dim: int, context: Context) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones, ramp between."""
    original = _original_length(fields, context)
    factor = fields.number("factor") or context.max_position / original
    beta_fast, beta_slow = fields.number("beta_fast") or 32.0, fields.number("beta_slow") or 1.0
    low, high = (_yarn_dim(beta, dim, theta, original) for beta in (beta_fast, beta_slow))
    if fields.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = np.clip((np.arange(dim // 2, dtype=F32) - F32(low)) / F32(high - low), 0, 1).astype(F32)
    wavelength = wavelengths(theta, dim)
    keep = F32(1) - ramp
    inv_freq = F32(1) / (F32(factor) * wavelength) * (F32(1) - keep) + F32(1) / wavelength * keep
    return inv_freq, _yarn_scale(fields, factor)


def _yarn_dim(num_rotations: float, dim: int, theta: float, original: float) -> float:
    """The dimension that turns `num_rotations` times within the original context."""
    return dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_scale(fields: Fields, factor: float) -> float:
    attention_factor = fields.number("attention_factor")
    mscale, mscale_all_dim = fields.number("mscale"), fields.number("mscale_all_dim")

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if attention_factor is not None:
        return attention_factor
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def _longrope(fields: Fields, theta: float, dim: int, context: Context) -> tuple[np.ndarray, float]:
    """LongRoPE (arXiv 2402.13753): one factor per dimension, a set for short and one for long contexts.

    One set serves every request: a KV cache cannot change its angles when a sequence grows.
    """
    original = _original_length(fields, context)
    short, long = fields.numbers("short_factor", dim // 2), fields.numbers("long_factor", dim // 2)
    factor = fields.number("factor") or context.max_position / original
    attention_factor = fields.number("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = long if context.max_model_len > original else short
    return F32(1) / (factors * wavelengths(theta, dim)), attention_factor


ROPE_TYPES: dict[str, Callable[[Fields, float, int, Context], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
