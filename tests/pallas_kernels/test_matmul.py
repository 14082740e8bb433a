"""Products by the compiled CPU kernels: against float64, bit for bit the same in every bucket, rows kept apart."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.choice import KernelDeclined
from pallas_kernels.matmul import api, cpu, matmul
from pallas_kernels.matmul.spec import MatmulSpec
from pallas_kernels.native import build, library
from pallas_kernels.native.build import LANES, up_to_date
from pallas_kernels.native.library import library as loaded
from pallas_kernels.panels import in_panels, whole
from pallas_kernels.quantized import quantize
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.quantized_matmul.cpu import panel_of as packed_panel_of
from pallas_kernels.target import CPU, Target

NATIVE = Target(native=library().isa)
needs_native = pytest.mark.skipif(not NATIVE.native, reason=library().missing)
ROWS = (1, 2, 3, 4, 5, 7, 8, 12, 14, 33, 197)  # every tile and every remainder, one task and two
SHAPES = ((32, 32), (64, 96), (576, 160), (288, 1056))  # (k, n): remainders of blocks, of tasks, of depths
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-6}  # of the norm: products are exact, sums are float32


def operands(rows: int, k: int, n: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(k + n)
    x, w = rng.standard_normal((max(ROWS), k)), rng.standard_normal((k, n)) / k**0.5
    return jnp.asarray(x[:rows], dtype), jnp.asarray(w, dtype)


def error(got: jax.Array, x: jax.Array, w: jax.Array) -> float:
    wanted = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    return float(np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted))


@needs_native
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_float64(dtype: str, transposed: bool) -> None:
    for k, n in SHAPES:
        for rows in ROWS:
            x, w = operands(rows, k, n, dtype)
            assert api.choice(api.spec_of(x, w), NATIVE).implementation.name == "cpu"
            got = matmul(x, w.T if transposed else w, target=NATIVE, transposed=transposed)
            assert got.dtype == jnp.float32 and error(got, x, w) < TOLERANCE[dtype], (k, n, rows)


@needs_native
def test_the_check_fails_when_rows_of_the_weight_are_swapped() -> None:
    x, w = operands(5, 64, 96, "bfloat16")
    got = matmul(x, w.at[jnp.array([0, 1])].set(w[jnp.array([1, 0])]), target=NATIVE)
    assert error(got, x, w) > 100 * TOLERANCE["bfloat16"]


@needs_native
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_whatever_is_beside_it(dtype: str, transposed: bool) -> None:
    """One row alone, among few (streamed) and among many (widened once), next to rows of NaN."""
    for k, n in SHAPES:
        x, w = operands(max(ROWS), k, n, dtype)
        w = w.T if transposed else w
        alone = np.asarray(matmul(x[:1], w, target=NATIVE, transposed=transposed))
        beside = np.array(x)
        beside[1:] = np.nan
        for rows in ROWS[1:]:
            found = np.asarray(matmul(jnp.asarray(beside[:rows]), w, target=NATIVE, transposed=transposed))
            assert np.array_equal(found[:1], alone), (k, n, rows)
            assert np.isnan(found[1:]).all()


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_panels_give_the_bits_of_the_whole_matrix(dtype: str) -> None:
    width = cpu.PANEL * LANES[NATIVE.native]
    for k, n in ((32, 64), (288, 1024), (576, 192)):
        for rows in ROWS:
            x, w = operands(rows, k, n, dtype)
            cut = in_panels(np.asarray(w), width)
            assert cut.shape == w.shape and np.array_equal(whole(cut), w)
            assert np.array_equal(matmul(x, cut, target=NATIVE), matmul(x, w, target=NATIVE)), (k, n, rows)
            plain = matmul(x, cut, target=CPU)
            assert error(plain, x, w) < TOLERANCE[dtype]


@needs_native
def test_a_panel_out_of_place_is_noticed() -> None:
    x, w = operands(3, 64, 192, "float32")
    cut = in_panels(np.asarray(w)[:, np.roll(np.arange(192), 32)], cpu.PANEL * LANES[NATIVE.native])
    assert error(matmul(x, cut, target=NATIVE), x, w) > 0.1


def test_where_weights_are_cut_into_panels() -> None:
    assert cpu.panel_of(64, 96, "bfloat16", Target(native="avx2")) == 32
    assert cpu.panel_of(64, 128, "float32", Target(native="avx512", bfloat16_products=True)) == 64
    assert cpu.panel_of(64, 128, "bfloat16", Target(native="avx512", bfloat16_products=True)) == 0
    assert cpu.panel_of(64, 128, "bfloat16", Target(native="avx512bf16", bfloat16_products=True)) == 64
    assert cpu.panel_of(64, 80, "bfloat16", Target(native="avx2")) == 0, "no whole panels"
    assert cpu.panel_of(64, 96, "bfloat16", CPU) == 0 == cpu.panel_of(64, 96, "bfloat16", Target("tpu", "v6e"))
    with pytest.raises(ValueError, match="80 columns do not divide into panels of 32"):
        in_panels(np.zeros((4, 80)), 32)


@needs_native
@pytest.mark.parametrize("rows", [1, 4, 13])
def test_int8_weights(rows: int) -> None:
    """One scale a column: as good as the reference, which multiplies the same numbers."""
    x, w = operands(rows, 288, 1088, "float32")
    packed = quantize(np.asarray(w), "int8")
    got, wanted = (quantized_matmul(x, packed, target=target) for target in (NATIVE, CPU))
    assert error(got, x, w) > 1e-4, "the weights are rounded"
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 1e-6
    values: Any = in_panels(np.asarray(packed.values), packed_panel_of(packed, NATIVE))
    assert np.array_equal(quantized_matmul(x, replace(packed, values=values), target=NATIVE), got)


@needs_native
def test_inside_a_program_with_many_calls() -> None:
    """Threads of the pool come late, or while the next call runs already."""
    x, w = operands(4, 576, 576, "float32")

    @jax.jit
    def chain(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 200, lambda _, x: jnp.tanh(matmul(x, w, target=NATIVE)), x)

    results = [np.asarray(chain(x)) for _ in range(5)]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_declines() -> None:
    native = Target(native="avx2")
    spec = MatmulSpec(4, 64, 64, "bfloat16", "bfloat16")

    def why(spec: MatmulSpec, target: Target) -> str:
        return dict(api.choice(spec, target).declined).get("cpu", "")

    assert why(spec, native) == ""
    assert why(spec, CPU) == "the native library is not there"
    assert why(spec, Target("tpu", "v6e")) == "for cpu"
    assert "not multiples of 16" in why(MatmulSpec(4, 40, 64, "float32", "float32"), native)
    assert why(MatmulSpec(4, 64, 64, "float16", "float16"), native) == "float16 times float16"
    own = Target(native="avx512", bfloat16_products=True)
    assert why(spec, own) == "" and why(MatmulSpec(5, 64, 64, "float32", "float32"), own) == ""
    assert "multiplies bfloat16 itself" in why(MatmulSpec(5, 64, 64, "bfloat16", "bfloat16"), own)
    assert why(MatmulSpec(5, 64, 64, "bfloat16", "bfloat16"), replace(own, native="avx512bf16")) == ""
    assert why(MatmulSpec(4, 64, 64, "bfloat16", "float32"), native) == "bfloat16 times float32"
    with pytest.raises(KernelDeclined, match="the native library is not there"):
        api.choice(spec, Target(implementations=(("matmul", "cpu"),)))


def test_shapes_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match=r"x \(2, 3\) and transposed w \(4, 5\)"):
        matmul(jnp.zeros((2, 3)), jnp.zeros((4, 5)), target=CPU, transposed=True)
    with pytest.raises(ValueError, match="x is float32, w is bfloat16"):
        matmul(jnp.zeros((2, 3)), jnp.zeros((3, 5), jnp.bfloat16), target=CPU)


@needs_native
def test_a_program_for_another_instruction_set_says_so() -> None:
    x, w = operands(1, 32, 32, "float32")
    with pytest.raises(jax.errors.JaxRuntimeError, match="no native kernels for sparc"):
        LANES["sparc"] = 8
        try:
            matmul(x, w, target=Target(native="sparc")).block_until_ready()
        finally:
            del LANES["sparc"]


def test_without_a_library_the_reason_is_said(tmp_path: Path) -> None:
    assert "needs a C++ compiler" in loaded(tmp_path / "libnative.so").missing
    (tmp_path / "damaged.so").write_bytes(b"no library")
    assert "damaged.so cannot be used" in loaded(tmp_path / "damaged.so").missing


def test_a_library_older_than_a_source_is_built_again(tmp_path: Path) -> None:
    library = tmp_path / "libnative.so"
    assert not up_to_date(library)
    library.touch()
    assert up_to_date(library)
    built_s = (build.SOURCE / "matmul.cc").stat().st_mtime - 1
    os.utime(library, (built_s, built_s))
    assert not up_to_date(library)
