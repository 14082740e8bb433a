"""quantized_matmul against x @ dequantize(w) in float64, by every implementation; kernels in their interpreters."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.choice import KernelDeclined
from pallas_kernels.matmul import matmul
from pallas_kernels.native import library
from pallas_kernels.quantized import LARGEST, Quantized, dequantize, quantize, quantized_shape
from pallas_kernels.quantized_matmul import cpu as native
from pallas_kernels.quantized_matmul import gpu, quantized_matmul, reference, tpu
from pallas_kernels.quantized_matmul.api import CANDIDATES, MatmulSpec, choice
from pallas_kernels.quantized_matmul.cases import CASES, SMALL, Case
from pallas_kernels.target import CHIPS, CPU, Target
from tests.pallas_kernels.aot import CHIPS as AOT_CHIPS

TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3}  # |error| of a row over its norm; bfloat16 rounds weights, too
TARGETS = {
    "reference": CPU,
    "reference_gpu": Target("gpu", "h200", (("quantized_matmul", "reference"),)),  # its form for accelerators
    "tpu_v5e": Target("tpu", "v5e", (("quantized_matmul", "tpu"),), interpret=True),
    "tpu_7x": Target("tpu", "tpu7x", (("quantized_matmul", "tpu"),), interpret=True),
    "gpu": Target("gpu", "h200", (("quantized_matmul", "gpu"),), interpret=True),
    "native": Target(implementations=(("quantized_matmul", "cpu"),), native=library().isa),
}
needs_native = pytest.mark.skipif(not library().isa, reason=library().missing)
QUICK_ON_GPU = ("int8", "int8_grouped", "int4_32", "int4_64", "int4_32_offsets_bf16", "e4m3_dynamic", "int8_32")


@dataclass
class Call:
    """A case filled with numbers. The last row of x is NaN where there is more than one row."""

    case: Case
    x: np.ndarray  # float32 [tokens, k], exact in the case's dtype
    w: Quantized

    def expected(self) -> np.ndarray:
        x = self.x.astype(np.float64)
        if self.case.activations != "float":
            block = 32 if self.case.activations == "dynamic_32" else self.case.k
            format = "int8" if self.case.activations == "dynamic_32" else self.case.format
            x = rounded_rows(self.x.reshape(-1, block), format).reshape(x.shape)
        return x @ np.asarray(dequantize(self.w), np.float64)

    def run(self, target: Target, w: Quantized | None = None) -> np.ndarray:
        x = jnp.asarray(self.x, self.case.dtype)
        call = jax.jit(lambda x, w: quantized_matmul(x, w, target=target))
        return np.asarray(call(x, jax.device_put(self.w if w is None else w)), np.float64)


def rounded_rows(x: np.ndarray, format: str) -> np.ndarray:
    """Rows of x after dynamic quantization, computed on their own here."""
    scales = (np.abs(x).max(axis=1, keepdims=True) / np.float32(LARGEST[format])).astype(np.float32)
    numbers = np.clip(x / scales, -LARGEST[format], LARGEST[format])
    numbers = np.rint(numbers) if format == "int8" else numbers.astype(jnp.dtype(format))
    return numbers.astype(np.float64) * scales


def filled(case: Case) -> Call:
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    x = np.array(jnp.asarray(rng.standard_normal((case.tokens, case.k)), case.dtype), np.float32)
    if case.tokens > 1:
        x[-1, case.k // 2] = np.nan
    # Columns and groups of different size, so that a scale in the wrong place shows.
    w = rng.standard_normal((case.k, case.n)) * np.exp2(rng.integers(-3, 4, (1, case.n)))
    if case.group:
        w *= np.repeat(np.exp2(rng.integers(-2, 3, case.k // case.group)), case.group)[:, None]
    kind = (case.format, case.group, case.symmetric, case.activations, jnp.dtype(case.scale_dtype))
    return Call(case, x, quantize(w.astype(np.float32), *kind))


def error(call: Call, out: np.ndarray) -> float:
    """Worst error of a finite row over the root mean square of its expected numbers, columns made equal."""
    rows = call.case.tokens - (call.case.tokens > 1)
    expected, out = call.expected()[:rows], out[:rows]
    columns = np.sqrt(np.mean(np.square(np.asarray(dequantize(call.w), np.float64)), axis=0))
    expected, out = expected / columns, out / columns
    return float((np.abs(out - expected).max(axis=1) / np.linalg.norm(expected, axis=1)).max())


def check(call: Call, out: np.ndarray) -> None:
    assert out.shape == (call.case.tokens, call.case.n)
    assert error(call, out) < TOLERANCE[call.case.dtype]
    if call.case.tokens > 1:
        assert np.isnan(out[-1]).all()


def races_found() -> bool:
    return tpu_interpreter.races is not None and tpu_interpreter.races.races_found


def params() -> list[Any]:
    out: list[Any] = []
    for name in TARGETS:
        for case in SMALL:
            slow = name == "gpu" and case.name not in QUICK_ON_GPU
            slow = slow or (name == "tpu_7x" and case.activations == "float") or case.tokens * case.k > 20000
            marks = [pytest.mark.slow] if slow and name != "native" else []
            marks += [needs_native] if name == "native" else []
            out.append(pytest.param(name, case, id=f"{name}-{case.name}", marks=marks))
    return out


@pytest.mark.parametrize(("implementation", "case"), params())
def test_matches_float64(implementation: str, case: Case) -> None:
    call, target = filled(case), TARGETS[implementation]
    declined = {"gpu": declined_by_gpu, "native": declined_by_native}
    declined |= dict.fromkeys(("tpu_v5e", "tpu_7x"), declined_by_tpu)
    if implementation in declined and (reason := declined[implementation](case)):
        with pytest.raises(KernelDeclined, match=reason):
            call.run(target)
        return
    check(call, call.run(target))
    assert not races_found()


def declined_by_tpu(case: Case) -> str:
    return "every 32" if case.activations == "dynamic_32" else ""


def declined_by_gpu(case: Case) -> str:
    if case.activations == "dynamic_32":
        return "every 32"
    if case.dtype != "bfloat16":
        return case.dtype
    return "groups of 16" if case.group == 16 else ""


def declined_by_native(case: Case) -> str:
    return f"{case.format} weights" if case.format.startswith("float8") else ""


def swapped_nibbles(w: Quantized) -> Quantized:
    values = np.asarray(w.values)
    return replace(w, values=(values >> 4) | (values << 4))


def moved_scales(w: Quantized) -> Quantized:
    return replace(w, scales=np.roll(np.asarray(w.scales), 1, axis=0))


@pytest.mark.parametrize("implementation", ["reference", "tpu_v5e", "gpu", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("spoil", [swapped_nibbles, moved_scales])
def test_the_check_notices(implementation: str, spoil: Any) -> None:
    call = filled(next(case for case in SMALL if case.name == "int4_64"))
    assert error(call, call.run(TARGETS[implementation], spoil(call.w))) > 0.02


ROWS = (1, 2, 3, 4, 5, 33)  # each way in which a weight is read
BFLOAT16_ROWS = (*ROWS, 6, 7, 16, 200)  # tiles of pairs of rows of w, one task and two
PACKINGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "int4": (192, 96, {"format": "int4", "group": 32}),
    "int4, offsets": (576, 160, {"format": "int4", "group": 64, "symmetric": False}),
    "int4, bfloat16": (288, 1056, {"format": "int4", "group": 96, "scale_dtype": jnp.bfloat16}),
    "int4, groups of 2": (32, 32, {"format": "int4", "group": 2, "symmetric": False, "scale_dtype": jnp.bfloat16}),
    "int4, one group": (608, 32, {"format": "int4"}),
    "int8": (544, 96, {"format": "int8", "group": 32}),
    "int8, offsets": (288, 224, {"format": "int8", "group": 9, "symmetric": False}),
    "int8, one group": (96, 64, {"format": "int8", "symmetric": False}),
}
SCALED_SUMS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "int8, a scale a column": (1248, 64, {"format": "int8"})  # in parts, of which the last is short
}


def in_order_of_the_bytes(w: Quantized) -> np.ndarray:
    """Rows of the weight as int4 stores them: two a byte."""
    rows = np.arange(w.shape[0])
    return rows.reshape(-1, 2, w.group // 2).swapaxes(1, 2).reshape(-1) if w.format == "int4" else rows


@needs_native
@pytest.mark.parametrize("kind", PACKINGS)
def test_native_is_the_product_of_the_dequantized_weights_to_the_bit(kind: str) -> None:
    """In every bucket and beside rows of NaN: a row alone and the float32 product, rows of w in the bytes' order.

    Scales have few bits here, as those of checkpoints have, so that a number times its scale is exact.
    """
    k, n, how = PACKINGS[kind]
    rng = np.random.default_rng(k + n)
    w = quantize(rng.standard_normal((k, n)).astype(np.float32), **how)
    w = replace(w, scales=np.asarray(w.scales).astype(jnp.bfloat16).astype(w.scales.dtype))
    x = rng.standard_normal((max(ROWS), k)).astype(np.float32)
    order = in_order_of_the_bytes(w)
    wide = np.asarray(dequantize(w))
    wanted = np.asarray(matmul(jnp.asarray(x[:, order]), jnp.asarray(wide[order]), target=TARGETS["native"]))
    call = jax.jit(lambda x, w: quantized_matmul(x, w, target=TARGETS["native"]))
    assert np.array_equal(call(x, w), wanted)
    if width := native.panel_of(w, TARGETS["native"]):
        w = native.cut(w, width)
        assert np.array_equal(call(x, w), wanted)
    x[1:] = np.nan
    for rows in ROWS:
        found = np.asarray(call(x[:rows], w))
        assert np.array_equal(found[0], wanted[0]) and np.isnan(found[1:]).all(), rows


@partial(jax.jit, static_argnums=2)
def native_product(x: jax.Array, w: Quantized, target: Target = TARGETS["native"]) -> jax.Array:
    return quantized_matmul(x, w, target=target)


def check_bits_of_the_first_row(
    x: np.ndarray, w: Quantized, whole: np.ndarray, target: Target = TARGETS["native"]
) -> None:
    """As in `whole`, the product of all rows: in every bucket, in panels or not, beside rows of NaN."""
    x[1:] = np.nan
    width = native.panel_of(w, target)
    for weight in (w, native.cut(w, width)) if width else (w,):
        for rows in BFLOAT16_ROWS:
            found = np.asarray(native_product(x[:rows], weight, target), np.float64)
            assert np.array_equal(found[0], whole[0]) and np.isnan(found[1:]).all(), rows


@needs_native
@pytest.mark.parametrize("kind", [*PACKINGS, *SCALED_SUMS])
def test_native_in_bfloat16_is_the_product_of_the_dequantized_weights(kind: str) -> None:
    """To the result's own rounding, and a row has its bits in every bucket, in panels or not, beside rows of NaN."""
    k, n, how = (PACKINGS | SCALED_SUMS)[kind]
    rng = np.random.default_rng(k + n)
    w = quantize(rng.standard_normal((k, n)).astype(np.float32), **how)
    x = rng.standard_normal((max(BFLOAT16_ROWS), k)).astype(jnp.bfloat16)
    wanted = np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64)
    whole = np.asarray(native_product(x, w), np.float64)
    assert np.linalg.norm(whole - wanted) / np.linalg.norm(wanted) < 2**-9
    check_bits_of_the_first_row(x, w, whole)


ROUNDED: dict[str, tuple[int, int, dict[str, Any]]] = {
    "int8": (1248, 160, {"format": "int8"}),  # in parts, of which the last is short; half a panel
    "int8, a scale a row": (320, 64, {"format": "int8", "activations": "dynamic"}),
    "int8, groups, a scale a row": (192, 96, {"format": "int8", "group": 64, "activations": "dynamic"}),
    "int8, offsets": (288, 224, {"format": "int8", "group": 96, "symmetric": False}),
    "int8, small groups": (96, 64, {"format": "int8", "group": 16}),
    "int4": (192, 96, {"format": "int4", "group": 32}),
    "int4, offsets": (576, 1120, {"format": "int4", "group": 32, "symmetric": False, "scale_dtype": jnp.bfloat16}),
    "int4, a group of odd parts": (288, 64, {"format": "int4", "group": 96, "symmetric": False}),
    "int4, one group": (608, 32, {"format": "int4"}),
    "int4, too large a group": (2560, 32, {"format": "int4"}),
}


@pytest.mark.parametrize("isa", library().isas)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ROUNDED)
def test_native_of_rounded_rows(kind: str, dtype: str, isa: str) -> None:
    """The product of what both sides are rounded to, in order to float32's precision; a row has its bits in every
    bucket, in panels or not, beside rows of NaN."""
    k, n, how = ROUNDED[kind]
    target = replace(TARGETS["native"], native=isa)
    kinds: dict[str, Any] = {"activations": "dynamic_32"} | how
    rng = np.random.default_rng(k + n)
    w = quantize(rng.standard_normal((k, n)).astype(np.float32), **kinds)
    x = rng.standard_normal((max(BFLOAT16_ROWS), k)).astype(jnp.dtype(dtype))
    x *= np.exp2(rng.integers(-3, 4, (1, k // 32))).repeat(32, axis=1).astype(x.dtype)
    block = k if w.activations == "dynamic" else 32
    rounded = rounded_rows(np.asarray(x, np.float32).reshape(-1, block), "int8").reshape(x.shape)
    wanted = rounded @ np.asarray(dequantize(w), np.float64)
    whole = np.asarray(native_product(x, w, target), np.float64)
    assert np.linalg.norm(whole - wanted) / np.linalg.norm(wanted) < {"float32": 1e-6, "bfloat16": 2**-9}[dtype]
    check_bits_of_the_first_row(x, w, whole, target)


@pytest.mark.parametrize("isa", library().isas)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_native_sums_of_the_largest_numbers_fit(format: Any, isa: str) -> None:
    """Products of four bytes are summed in 16 bits where the processor has none of its own: -128 by 127, 15 by 127."""
    rng = np.random.default_rng(5)
    k, n, target = 256, 32, replace(TARGETS["native"], native=isa)
    w = quantize(rng.standard_normal((k, n)).astype(np.float32), format, 32, False, "dynamic_32")
    values = rng.choice([-128, 127], w.values.shape) if format == "int8" else rng.choice([0, 255], w.values.shape)
    values[:, 0] = values.min()
    values[:, 1] = values.max()
    w = replace(w, values=values.astype(w.values.dtype))
    x = np.stack([np.full(k, 1.0), np.full(k, -1.0), rng.choice([-1.0, 1.0], k)]).astype(np.float32)
    wanted = x.astype(np.float64) @ np.asarray(dequantize(w), np.float64)
    found = np.asarray(native_product(x, w, target), np.float64)
    assert np.abs(found - wanted).max() < 1e-6 * np.abs(np.asarray(dequantize(w))).sum(axis=0).max()


def test_blocks_of_columns_overlap_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CPU_BLOCK", 1)  # 64 columns at a time, the last 64 of 200 overlap
    for kind in ("int8", "int4", "float8_e4m3fn"):
        case = Case(name=kind, tokens=3, k=128, n=200, format=kind, group=32 if kind == "int4" else None)
        call = filled(case)
        check(call, call.run(CPU))


@pytest.mark.parametrize("name", ["int8", "int4_64", "e4m3"])
def test_a_large_weight_is_never_wide_as_a_whole(name: str) -> None:
    """Of the reference on a CPU: temporary memory stays below what a bfloat16 copy of the weight takes."""
    case = next(case for case in SMALL if case.name == name)
    k, n = 512, 16384
    w = quantized_shape((k, n), case.format, case.group)
    x = jax.ShapeDtypeStruct((4, k), jnp.bfloat16)
    compiled = jax.jit(lambda x, w: quantized_matmul(x, w, target=CPU)).lower(x, w).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * k * n


def spec_of(case: Case) -> MatmulSpec:
    how = (case.format, case.group or case.k, not case.symmetric, case.activations, case.scale_dtype)
    return MatmulSpec(case.tokens, case.k, case.n, case.dtype, *how)


@pytest.mark.parametrize("chip", [*AOT_CHIPS["tpu"], *AOT_CHIPS["gpu"]])
def test_computed_blocks_divide_and_fit(chip: str) -> None:
    target = Target(CHIPS[chip].platform, chip)
    for case in CASES:
        w = quantized_shape((case.k, case.n), case.format, case.group, case.symmetric, case.activations)
        if target.platform == "tpu" and tpu.declines(spec_of(case), target) is None:
            b = tpu.computed_blocks(case.tokens, w, target)
            assert case.k % b.bk == 0, case
            assert b.bk == case.k or (b.bk % 128 == 0 and (w.group == case.k or b.bk % (8 * w.group) == 0)), case
            packed = 2 * b.bk * b.bn // (2 if case.format == "int4" else 1)
            assert packed + 4 * b.bm * (case.k if case.tokens <= 64 else b.bk) < CHIPS[chip].scratch_bytes // 2, case
        if target.platform == "gpu" and gpu.declines(spec_of(case), target) is None:
            b = gpu.computed_blocks(case.tokens, w, target)
            assert case.k % (b.bk * b.splits) == 0, case
            assert case.n % b.bn == 0, case
            assert b.bt % 8 == 0, case


@pytest.mark.parametrize(
    ("change", "platform", "chip", "reason"),
    [
        ({}, "tpu", "v9", "'v9'"),
        ({}, "gpu", "h900", "'h900'"),
        ({"k": 96, "group": 96}, "tpu", "v5e", "K 96"),
        ({"k": 96, "group": 48}, "gpu", "h100", "K 96"),
        ({"group": 8}, "tpu", "v5e", "group 8"),
        ({"format": "int4", "group": 16}, "tpu", "v5e", "group 16"),
        ({"group": 16}, "gpu", "h100", "groups of 16"),
        ({"dtype": "float16"}, "tpu", "v5e", "float16"),
        ({"dtype": "float16"}, "gpu", "h100", "float16"),
        ({"scale_dtype": "float16"}, "tpu", "v5e", "float16"),
        ({"scale_dtype": "float16"}, "gpu", "h100", "float16"),
        ({"tokens": 4096}, "gpu", "h100", "4096 tokens"),
        ({"n": 100}, "gpu", "h100", "N 100"),
        ({"k": 65600, "group": 65600}, "tpu", "v5e", "K 65600"),
        ({"k": 40, "group": 40}, "cpu", "cpu", "not multiples of 16"),
        ({"n": 100}, "cpu", "cpu", "not multiples of 16"),
        ({"format": "float8_e5m2"}, "cpu", "cpu", "float8_e5m2 weights"),
        ({"dtype": "float16"}, "cpu", "cpu", "float16 times int8"),
        ({"scale_dtype": "float16"}, "cpu", "cpu", "float16 scales"),
        ({"activations": "dynamic_32"}, "tpu", "v5e", "a scale for every 32"),
        ({"activations": "dynamic_32"}, "gpu", "h100", "a scale for every 32"),
    ],
)
def test_declines_name_the_numbers(change: dict[str, Any], platform: Any, chip: str, reason: str) -> None:
    spec = replace(MatmulSpec(8, 256, 256, "bfloat16", "int8", 256), **change)
    isa = "avx2" if platform == "cpu" else ""
    made = choice(spec, Target(platform, chip, native=isa))
    assert made.implementation.name == "reference"
    assert reason in dict(made.declined)[platform]
    with pytest.raises(KernelDeclined, match="was asked for"):
        choice(spec, Target(platform, chip, (("quantized_matmul", platform),), native=isa))


def test_platforms_get_their_kernel() -> None:
    spec = MatmulSpec(8, 256, 256, "bfloat16", "int8", 256)
    assert dict(choice(spec, CPU).declined) == {
        "tpu": "for tpu",
        "gpu": "for gpu",
        "cpu": "the native library is not there",
    }
    assert choice(spec, Target(native="avx2")).implementation.name == "cpu"
    assert [c.name for c in CANDIDATES] == ["tpu", "gpu", "cpu", "reference"]
    for platform, chips in AOT_CHIPS.items():
        for chip in chips:
            assert choice(spec, Target(platform, chip)).implementation.name == platform  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        ((3, 128), (256, 64), "x has K 128, the weight 256"),
        ((3, 4, 256), (256, 64), r"\(3, 4, 256\)"),
        ((3, 256), (2, 256, 64), r"\(2, 256, 64\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x: tuple[int, ...], w: tuple[int, ...], message: str) -> None:
    packed = quantized_shape(w, "int8")
    with pytest.raises(ValueError, match=message):
        quantized_matmul(jnp.zeros(x), packed, target=CPU)


def test_numbers_that_do_not_fit_are_refused() -> None:
    w = quantize(np.ones((128, 8), np.float32), "int4", 32, symmetric=False)
    x = jnp.zeros((2, 128))
    with pytest.raises(ValueError, match="int32"):
        quantized_matmul(x.astype(jnp.int32), w, target=CPU)
    with pytest.raises(ValueError, match=r"scales \(3, 8\)"):
        quantized_matmul(x, replace(w, scales=w.scales[:3]), target=CPU)
    assert w.offsets is not None
    with pytest.raises(ValueError, match=r"offsets \(2, 8\)"):
        quantized_matmul(x, replace(w, offsets=w.offsets[:2]), target=CPU)
    with pytest.raises(ValueError, match="8-bit"):
        quantized_matmul(x, replace(w, activations="dynamic"), target=CPU)


def test_float16_goes_through_the_reference() -> None:
    call = filled(Case(name="half", tokens=1, k=128, n=64, format="int8"))
    out = quantized_matmul(jnp.asarray(call.x, jnp.float16), jax.device_put(call.w), target=CPU)
    assert out.dtype == jnp.float16
    assert error(call, np.asarray(out, np.float64)) < 2e-3


def test_the_gpu_interpreter_is_there() -> None:
    """Where it is not, `gpu` declines to be interpreted and this suite shows nothing of it."""
    assert hasattr(plgpu, "InterpretGPUParams")
