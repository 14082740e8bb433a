"""The Hopper kernels in the Mosaic GPU interpreter: every case of the op, races looked for.

The interpreter raises on a race, a read out of bounds, and a barrier whose arrivals nobody waited for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import gpu
from pallas_kernels.paged_attention.cases import CASES, REAL, Case
from pallas_kernels.target import Target
from tests.pallas_kernels.attention_calls import TOLERANCE, Call, fill, shift_pages, swap_keys_with_values

H100 = Target("gpu", "h100", (("decode_attention", "gpu"), ("prefill_attention", "gpu")), interpret=True)
# Unseen keys are NaN on purpose; numpy, which multiplies for the interpreter, says so.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
needs_interpreter = pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="this JAX has none")
# Each reaches something that no other of them does; the others run among the slow tests.
SHORT = {
    "decode_idle_rows",
    "decode_head_256_bfloat16",
    "decode_e4m3_window",
    "decode_latent",
    "prefill_all_idle",
    "prefill_latent_verify",
    "prefill_window",
    "prefill_int8",
}


def in_bfloat16(case: Case) -> Case:
    return replace(case, dtype="bfloat16")


LATENT: dict[str, Any] = {"q_heads": 16, "kv_heads": 1, "head_dim": 576, "value_dim": 512}
SERVED = [case for case in map(in_bfloat16, CASES) if gpu.declines(case.spec("gpu"), H100) is None]


def served(name: str) -> Call:
    return fill(next(case for case in SERVED if case.name == name), H100)


@needs_interpreter
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if c.name in SHORT else pytest.mark.slow) for c in SERVED]
)
def test_equals_dense_attention(case: Case) -> None:
    assert fill(case, H100).error() < TOLERANCE["bfloat16"]


@needs_interpreter
@pytest.mark.parametrize("name", ["decode_idle_rows", pytest.param("prefill_idle_rows", marks=pytest.mark.slow)])
def test_tokens_of_nobody_come_back_finite(name: str) -> None:
    call = served(name)
    call.q = jnp.nan_to_num(call.q)  # as in a step, where padding is the hidden state of token 0
    assert np.isfinite(call.run()).all()


@needs_interpreter
@pytest.mark.parametrize(
    "name",
    [
        "decode_gqa_3",
        "decode_latent",
        "prefill_latent_verify",
        pytest.param("prefill_continues", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("broken", ["swapped", "shifted"])
def test_the_check_notices_broken_input(name: str, broken: str) -> None:
    call = served(name)
    swap_keys_with_values(call) if broken == "swapped" else shift_pages(call, 1)
    assert not call.error() < 5 * TOLERANCE["bfloat16"]


@needs_interpreter
@pytest.mark.slow
def test_a_rows_result_does_not_depend_on_the_others() -> None:
    """Bit for bit, though rows are sorted by length and dealt to blocks."""
    case = Case(name="neighbours", lengths=(20, 300, 0, 77), window=50, dtype="bfloat16")
    call = fill(case, H100)
    together = call.run()
    for row in (0, 3):
        lengths = tuple(n if i == row else 0 for i, n in enumerate(case.lengths))
        alone = replace(call, case=replace(case, lengths=lengths)).run()
        assert alone[row].tobytes() == together[row].tobytes()


@needs_interpreter
@pytest.mark.slow
def test_more_heads_a_group_than_a_tile_has_rows() -> None:
    """Falcon-7B's 71 query heads on one KV head: two head groups in decode; 130 in prefill."""
    decode = Case(name="wide_decode", lengths=(70, 9), q_heads=71, kv_heads=1, dtype="bfloat16", sinks=True)
    prefill = replace(decode, name="wide_prefill", q_heads=130, queries=(5, 9), padding=2)
    assert fill(decode, H100).error() < TOLERANCE["bfloat16"]
    assert fill(prefill, H100).error() < TOLERANCE["bfloat16"]


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("queries", [None, (3, 9, 0)], ids=["decode", "prefill"])
@pytest.mark.parametrize("q_heads", [12, 70, 128])
def test_latents_of_many_heads_and_of_several_splits(q_heads: int, queries: tuple[int, ...] | None) -> None:
    """One head group whose five tokens leave 4 rows empty; two, of 35 rows or 64, that both consumers share; a long
    row that is cut; a window, sinks.
    """
    latent = Case(name="wide_latent", lengths=(700, 9, 0), q_heads=q_heads, kv_heads=1, head_dim=192, value_dim=128,
                  dtype="bfloat16", sinks=True, queries=queries)  # fmt: skip
    assert fill(latent, H100).error() < TOLERANCE["bfloat16"]
    assert fill(replace(latent, name="wide_latent_window", window=90, page_size=64), H100).error() < 8e-3


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "queries", "q_heads"),
    [((70, 130), None, 16), ((300, 70, 5, 0), (5, 3, 5, 0), 16), ((200, 3), (2, 3), 128)],
    ids=["decode", "prefill-16", "prefill-128"],
)
def test_latents_of_deepseek(lengths: tuple[int, ...], queries: tuple[int, ...] | None, q_heads: int) -> None:
    sizes: dict[str, Any] = LATENT | {"q_heads": q_heads}
    case = Case(name="deepseek", lengths=lengths, queries=queries, dtype="bfloat16", page_size=32, **sizes)
    assert fill(case, H100).error() < TOLERANCE["bfloat16"]


@pytest.mark.parametrize(
    "case", [case for case in REAL if not (case.value_dim and case.kv_dtype)], ids=lambda case: case.name
)
@pytest.mark.parametrize("chip", ["h100", "h200"])
def test_real_shapes_are_served_within_shared_memory(case: Case, chip: str) -> None:
    target = Target("gpu", chip)
    assert gpu.declines(case.spec("gpu"), target) is None
    assert gpu.scratch_bytes(case.spec("gpu"), target) <= 232448


@pytest.mark.parametrize(
    ("change", "target", "reason"),
    [
        ({}, Target("tpu", "v6e"), "for gpu"),
        ({}, Target("gpu", "a100"), "chip 'a100' is not in"),
        ({"dtype": "float32"}, Target("gpu", "h100"), "q is float32"),
        ({"page_size": 1}, Target("gpu", "h100"), "page_size 1 is not"),
        ({"page_size": 48}, Target("gpu", "h100"), "page_size 48 is not"),
        ({"head_dim": 512}, Target("gpu", "h100"), "head_width 512 is not"),
        (LATENT | {"kv_dtype": "int8", "page_size": 32}, Target("gpu", "h100"), "head_dim 576, int8: only bfloat16"),
        (LATENT | {"value_dim": 64}, Target("gpu", "h100"), "latents of 576 lanes, 64 the value"),
        (LATENT | {"head_dim": 640}, Target("gpu", "h100"), "needs 246784 bytes of shared memory"),
    ],
)
def test_what_is_not_served_says_why(change: dict[str, Any], target: Target, reason: str) -> None:
    case = replace(Case(name="declined", lengths=(9,), dtype="bfloat16"), **change)
    assert reason in (gpu.declines(case.spec(target.platform), target) or "served")
