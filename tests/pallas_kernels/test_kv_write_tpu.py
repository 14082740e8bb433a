"""The Mosaic kernel of kv_write in the TPU interpreter: bytes, neighbours of what is written, races."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.kv_layout import KVDtype, kv_layout
from pallas_kernels.kv_write import tpu, write_kv
from pallas_kernels.kv_write.api import CANDIDATES, WriteSpec, choice
from pallas_kernels.target import CPU, Target

TPU = Target("tpu", "v6e", interpret=True)
PAGES, PAGE_SIZE = 9, 64
DTYPES: tuple[KVDtype, ...] = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
Places = list[tuple[int, int]]  # (page, offset) of each token


def run(page: int, first: int, count: int) -> Places:
    return [(page, first + i) for i in range(count)]


CASES: dict[str, Places] = {
    "one_token": [(3, 17)],
    "decode_rows": [(5, 0), (1, 63), (7, 8), (2, 31), (8, 32)],
    "decode_with_idle_rows": [(0, 0), (4, 7), (0, 0), (0, 5), (6, 9), (0, 0)],
    "all_idle": [(0, i) for i in range(5)],
    "chunk": run(4, 3, 61) + run(2, 0, 64) + run(6, 0, 7),
    "chunks_and_padding": run(1, 60, 4) + run(7, 0, 33) + run(3, 5, 1) + run(8, 31, 2) + [(0, 0)] * 9,
    "short_chunks_and_padding": run(7, 0, 33) + run(8, 31, 2) + [(0, 0)] * 3,
    "blocks_that_split_a_tile": run(5, 1, 63) + run(3, 0, 64) + run(1, 0, 20) + [(2, 2)],
    "one_tile_from_several_places": [(5, 0), (5, 3), (1, 1), (5, 2), (1, 0), (5, 40), (5, 4)],
    "more_runs_than_tiles_in_flight": [(1 + i % 8, 63 - i // 8 * 17) for i in range(20)],
}


def pages_before(width: int, dtype: KVDtype) -> np.ndarray:
    """Random bytes, NaN patterns among them: what is not written must keep them."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    raw = np.random.default_rng(0).integers(0, 256, (PAGES, PAGE_SIZE, width * kind.itemsize), np.uint8)
    return raw.view(kind)


def written(places: Places, dtype: KVDtype, width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Pages as the kernel leaves them, and as a loop over tokens would."""
    before = pages_before(width, dtype)
    rows = np.random.default_rng(1).integers(0, 256, (len(places), width * before.itemsize), np.uint8)
    rows = rows.view(before.dtype)
    expected = before.copy()
    for token, (page, offset) in enumerate(places):
        expected[page, offset] = rows[token]
    ids, offsets = (jnp.asarray([p[i] for p in places], jnp.int32) for i in range(2))
    got = jax.jit(partial(tpu.write_rows, target=TPU))(jnp.asarray(before), jnp.asarray(rows), ids, offsets)
    return np.asarray(got), expected


def same_bytes(got: np.ndarray, expected: np.ndarray) -> bool:
    """Of every page but the trash page."""
    return got[1:].tobytes() == expected[1:].tobytes()


@pytest.mark.parametrize("name", CASES)
def test_writes_each_token_and_nothing_else(name: str) -> None:
    assert same_bytes(*written(CASES[name], "bfloat16"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_bytes_of_every_dtype(dtype: KVDtype) -> None:
    """Exponents at the end of a float8 row may look like any NaN."""
    assert same_bytes(*written(CASES["short_chunks_and_padding"], dtype, width=256))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_every_dtype(name: str, dtype: KVDtype) -> None:
    assert same_bytes(*written(CASES[name], dtype))


def test_the_check_notices_a_row_in_the_wrong_place() -> None:
    places = CASES["short_chunks_and_padding"]
    got, _ = written(places, "bfloat16")
    _, moved = written([(6, 40), *places[1:]], "bfloat16")
    assert not same_bytes(got, moved)


def test_small_blocks_and_few_tiles_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that a block's border splits, a ring of copies that goes round."""
    monkeypatch.setattr(tpu, "shape_for", lambda tokens, width, dtype: tpu.Shape(32, width, jnp.dtype(dtype), 2))
    for name in ("blocks_that_split_a_tile", "more_runs_than_tiles_in_flight"):
        assert same_bytes(*written(CASES[name], "bfloat16")), name


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e5m2"])
def test_equals_the_reference_through_the_api(dtype: KVDtype) -> None:
    """Quantization included, from keys and values to bytes."""
    layout = kv_layout(2, 80, dtype, "tpu")
    rng = np.random.default_rng(2)
    k, v = (jnp.asarray(rng.normal(size=(40, 2, 80)), jnp.bfloat16) for _ in range(2))
    before = jnp.zeros((PAGES, PAGE_SIZE, layout.width), dtype)
    places = [*run(3, 20, 35), (0, 1), (1, 1), (2, 63), (7, 30), (0, 0)]
    ids, offsets = (jnp.asarray([p[i] for p in places], jnp.int32) for i in range(2))
    kernel, reference = (
        np.asarray(jax.jit(partial(write_kv, layout=layout, target=target))(before, k, v, ids, offsets))
        for target in (TPU, CPU)
    )
    assert same_bytes(kernel, reference)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_latents_equal_the_reference_through_the_api(dtype: KVDtype) -> None:
    layout = kv_layout(1, 192, dtype, "tpu", value_dim=128)
    latents = jnp.asarray(np.random.default_rng(2).normal(size=(12, 1, 192)), jnp.bfloat16)
    before = jnp.zeros((PAGES, PAGE_SIZE, layout.width), dtype)
    places = [*run(3, 60, 4), *run(5, 0, 4), (1, 1), (2, 63), (7, 30), (0, 0)]
    ids, offsets = (jnp.asarray([p[i] for p in places], jnp.int32) for i in range(2))
    kernel, reference = (
        np.asarray(jax.jit(partial(write_kv, layout=layout, target=target))(before, latents, None, ids, offsets))
        for target in (TPU, CPU)
    )
    assert same_bytes(kernel, reference) and np.any(kernel[1:].astype(np.float32))


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (WriteSpec(8, 16, kv_layout(2, 64, "int8", "tpu")), "page_size 16 is not a multiple of 32"),
        (WriteSpec(8, 4, kv_layout(2, 64, "float32", "tpu")), "page_size 4 is not a multiple of 8"),
        (WriteSpec(8, 32, kv_layout(3, 5, "float32", "cpu")), "rows of 30 are not a multiple of 128 lanes"),
        (WriteSpec(1 << 15, 32, kv_layout(2, 64, "bfloat16", "tpu")), "32768 tokens take 655360 bytes of SMEM"),
    ],
)
def test_declines_name_the_numbers(spec: WriteSpec, why: str) -> None:
    assert why in (tpu.declines(spec, TPU) or "")


def test_serves_tpus_and_no_others() -> None:
    spec = WriteSpec(8, 32, kv_layout(2, 64, "bfloat16", "tpu"))
    assert "tpu" in {candidate.name for candidate in CANDIDATES}
    assert choice(spec, TPU).implementation.name == "tpu"
    assert choice(spec, CPU).implementation.name == "reference"
    assert choice(spec, Target("tpu", "v2")).implementation.name == "reference"
