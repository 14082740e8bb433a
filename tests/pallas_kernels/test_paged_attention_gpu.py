"""The Hopper kernels in the Mosaic GPU interpreter: every case of the op, races looked for.

The interpreter raises on a race, a read out of bounds, and a barrier whose arrivals nobody waited for.
"""

from __future__ import annotations

from dataclasses import replace

import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest

from pallas_kernels.paged_attention import gpu
from pallas_kernels.paged_attention.cases import CASES, Case
from pallas_kernels.target import Target
from tests.pallas_kernels.attention_calls import TOLERANCE, Call, fill

H100 = Target("gpu", "h100", (("decode_attention", "gpu"), ("prefill_attention", "gpu")), interpret=True)
# Unseen keys are NaN on purpose; numpy, which multiplies for the interpreter, says so.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
needs_interpreter = pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="new in JAX 0.12")
# Each reaches something that no other of them does; the others run among the slow tests.
SHORT = {
    "decode_gqa_3",
    "decode_idle_rows",
    "decode_head_256_bfloat16",
    "decode_sinks",
    "decode_window",
    "prefill_all_idle",
    "prefill_continues",
    "prefill_sinks",
    "prefill_window",
}


def in_bfloat16(case: Case) -> Case:
    return replace(case, dtype="bfloat16")


SERVED = [case for case in map(in_bfloat16, CASES) if gpu.declines(case.spec("gpu"), H100) is None]


def served(name: str) -> Call:
    return fill(next(case for case in SERVED if case.name == name), H100)


@needs_interpreter
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if c.name in SHORT else pytest.mark.slow) for c in SERVED]
)
def test_equals_dense_attention(case: Case) -> None:
    assert fill(case, H100).error() < TOLERANCE["bfloat16"]
