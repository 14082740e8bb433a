"""Weights are quantized within half a step, packed without loss, and cut at a group's border like the numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized import (
    Quantized,
    dequantize,
    pack_int4,
    quantize,
    quantized_shape,
    tree_bytes,
    unpack_int4,
)

KINDS: dict[str, dict[str, Any]] = {
    "int8": {"format": "int8"},
    "int8 grouped": {"format": "int8", "group": 64},
    "int8 32 offsets": {"format": "int8", "group": 32, "symmetric": False},
    "int4 32": {"format": "int4", "group": 32},
    "int4 64": {"format": "int4", "group": 64},
    "int4 128": {"format": "int4", "group": 128},
    "int4 32 offsets": {"format": "int4", "group": 32, "symmetric": False},
    "int4 128 offsets": {"format": "int4", "group": 128, "symmetric": False},
    "int4 one group": {"format": "int4"},
    "e4m3": {"format": "float8_e4m3fn"},
    "e5m2": {"format": "float8_e5m2"},
}


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def excess(w: np.ndarray, q: Quantized) -> np.ndarray:
    """|w - dequantize(q)| over what rounding to nearest allows; at most 1. Symmetric int4 may cut off one end."""
    error = np.abs(w - np.asarray(dequantize(q)))
    step = np.repeat(np.abs(np.asarray(q.scales, np.float32)), q.group, axis=-2)
    if q.format == "int4" and q.offsets is None:
        within = np.abs(w) <= 7.5 * step
        return np.where(within, error / (0.5 * step), 0)
    if q.format in ("int8", "int4"):
        return error / (0.5 * step)
    mantissa, least = (3, 2.0**-9) if q.format == "float8_e4m3fn" else (2, 2.0**-16)
    ulp = np.maximum(np.exp2(np.floor(np.log2(np.abs(w / step))) - mantissa), least)
    return error / (0.5 * ulp * step)


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_within_half_a_step(kind: str) -> None:
    w = weight(256, 96)
    assert excess(w, quantize(w, **KINDS[kind])).max() < 1.001


def test_scales_off_by_one_group_are_noticed() -> None:
    w = weight(256, 96) * np.repeat(np.arange(1, 9), 32)[:, None]
    q = quantize(w, "int4", 32)
    moved = Quantized(q.values, np.roll(q.scales, 1, axis=0), None, "int4")  # type: ignore[arg-type]
    assert excess(w, moved).max() > 1.5


def test_swapped_nibbles_are_noticed() -> None:
    w = weight(256, 96)
    q = quantize(w, "int4", 64)
    values: Any = (np.asarray(q.values) >> 4) | (np.asarray(q.values) << 4)
    assert excess(w, Quantized(values, q.scales, None, "int4")).max() > 1.5


@pytest.mark.parametrize("group", [32, 64, 128])
def test_symmetric_int4_beats_the_plain_scale(group: int) -> None:
    """In squared error it is at most that of largest / 7, which cuts nothing off."""
    w = weight(256, 64)
    groups = w.reshape(-1, group, 64)
    scales = np.abs(groups).max(axis=1, keepdims=True) / 7
    plain = np.square(np.rint(groups / scales) * scales - groups).sum(axis=1)
    ours = np.square(np.asarray(dequantize(quantize(w, "int4", group))).reshape(groups.shape) - groups).sum(axis=1)
    assert (ours <= plain * (1 + 1e-5)).all()
    assert ours.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize("group", [2, 32, 128])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_packing_loses_nothing(group: int, lead: tuple[int, ...]) -> None:
    nibbles = np.random.default_rng(1).integers(0, 16, (*lead, 256, 24)).astype(np.uint8)
    packed = pack_int4(nibbles, group)
    assert packed.shape == (*lead, 128, 24)
    np.testing.assert_array_equal(unpack_int4(packed, group), nibbles)
    np.testing.assert_array_equal(np.asarray(unpack_int4(jnp.asarray(packed), group)), nibbles)
    assert isinstance(unpack_int4(packed, group), np.ndarray)


def test_a_byte_holds_a_row_of_each_half() -> None:
    nibbles = np.arange(16, dtype=np.uint8)[:, None]
    np.testing.assert_array_equal(pack_int4(nibbles, 8)[:, 0], [0x40, 0x51, 0x62, 0x73, 0xC8, 0xD9, 0xEA, 0xFB])


@pytest.mark.parametrize("kind", ["int4 32", "int4 32 offsets", "int8 grouped"])
def test_cut_at_a_group_border_is_the_quantized_cut(kind: str) -> None:
    w = weight(256, 24)
    whole, cut = quantize(w, **KINDS[kind]), quantize(w[64:192], **KINDS[kind])
    rows = slice(32, 96) if whole.format == "int4" else slice(64, 192)
    np.testing.assert_array_equal(whole.values[rows], cut.values)
    groups = slice(64 // whole.group, 192 // whole.group)
    np.testing.assert_array_equal(whole.scales[groups], cut.scales)
    if whole.offsets is not None and cut.offsets is not None:
        np.testing.assert_array_equal(whole.offsets[groups], cut.offsets)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(256, 40), (2, 128, 24)])
def test_abstract_shapes_are_those_of_the_numbers(kind: str, shape: tuple[int, ...]) -> None:
    real, abstract = quantize(weight(*shape), **KINDS[kind]), quantized_shape(shape, **KINDS[kind])
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    for ours, said in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
        assert (ours.shape, ours.dtype) == (said.shape, said.dtype)
    assert real.shape == shape
    assert tree_bytes(real) == tree_bytes(abstract) == sum(leaf.nbytes for leaf in jax.tree.leaves(real))


def test_experts_are_quantized_one_by_one() -> None:
    w = weight(3, 128, 40)
    q = quantize(w, "int4", 32, symmetric=False)
    one = quantize(w[1], "int4", 32, symmetric=False)
    np.testing.assert_array_equal(q.values[1], one.values)
    np.testing.assert_array_equal(np.asarray(dequantize(q))[1], np.asarray(dequantize(one)))


def test_blocks_of_columns_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(128, 50)
    whole = quantize(w, "int8")
    monkeypatch.setattr("pallas_kernels.quantized._BLOCK", 128 * 7)
    np.testing.assert_array_equal(quantize(w, "int8").values, whole.values)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
@pytest.mark.parametrize("kind", ["int8", "int4 32", "int4 32 offsets"])
def test_numbers_are_rounded_by_the_stored_scales(kind: str, dtype: Any) -> None:
    w = weight(128, 32)
    q = quantize(w, **KINDS[kind], scale_dtype=dtype)
    assert q.scales.dtype == dtype
    assert excess(w, q).max() < 1.2  # the largest may no longer be in range


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_weights_of_checkpoints(dtype: Any) -> None:
    w = weight(128, 32).astype(dtype)
    assert excess(w.astype(np.float32), quantize(w, "int8")).max() < 1.001


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_constants_survive(kind: str) -> None:
    w = np.zeros((128, 4), np.float32)
    w[:, 1] = 3.0
    back = np.asarray(dequantize(quantize(w, **KINDS[kind])))
    assert (back[:, [0, 2, 3]] == 0).all()
    np.testing.assert_allclose(back[:, 1], 3.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_every_float8_is_decoded(dtype: Any) -> None:
    every = np.arange(256, dtype=np.uint8).view(dtype)
    name: Any = str(np.dtype(dtype))
    q = Quantized(every[None], np.ones((1, 256), np.float32), None, name)  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.asarray(jax.jit(dequantize)(q))[0], every.astype(np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "int4", "group": 48}, "K 256 is not a multiple of group 48"),
        ({"format": "int4", "group": 1}, "group 1 must be even"),
        ({"format": "int3"}, "int3"),
        ({"format": "float8_e4m3fn", "symmetric": False}, "offsets are for int4 and int8, not float8"),
        ({"format": "int8", "activations": "static"}, "static"),
        ({"format": "int4", "group": 32, "activations": "dynamic"}, "8-bit"),
        ({"format": "float8_e4m3fn", "activations": "dynamic_32"}, "for int4 and int8"),
        ({"format": "int8", "scale_dtype": np.float64}, "float64"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight(256, 8), **arguments)
    with pytest.raises(ValueError, match=message):
        quantized_shape((256, 8), **arguments)


def test_weights_that_are_not_finite_are_refused() -> None:
    w = weight(128, 8)
    w[70, 5] = np.nan
    for kind in KINDS:
        with pytest.raises(ValueError, match="not finite"):
            quantize(w, **KINDS[kind])


def test_a_vector_is_no_weight() -> None:
    with pytest.raises(ValueError, match=r"\(8,\)"):
        quantize(weight(8), "int8")
