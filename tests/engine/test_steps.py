"""Forms of one computation that only some chips take, against the usual one."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np

from engine.config import EngineOptions
from engine.programs import compute_of
from engine.resolve import DeviceFacts, resolve
from engine.steps import prompt_logprobs
from pallas_kernels.target import Target
from tests.model.models import checkpoint, params

TPU7X = Target("tpu", "tpu7x")


def test_prompt_logprobs_without_a_loop() -> None:
    """Over 300 positions: blocks of 256 one after the other, and a last one that is padded."""
    model = checkpoint("llama").config
    compute = compute_of(model, resolve(EngineOptions(), model, "float32", DeviceFacts("cpu", 1 << 30, False)))
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((300, model.hidden_size)).astype(np.float32)
    following = rng.integers(0, model.vocab_size, 300).astype(np.int32)
    found = [
        jax.jit(prompt_logprobs, static_argnums=0)(replace(compute, target=target), params("llama"), hidden, following)
        for target in (compute.target, TPU7X)
    ]
    for looped, unrolled in zip(*found, strict=True):
        assert looped.shape[0] == 300
        np.testing.assert_allclose(unrolled, looped, rtol=1e-5, atol=1e-5)


def test_one_step_a_call_where_loops_copy() -> None:
    model = checkpoint("llama").config
    chips = {chip: DeviceFacts("tpu", 1 << 36, True, chip) for chip in ("v6e", "tpu7x")}
    steps = {chip: resolve(EngineOptions(), model, "bfloat16", facts).decode_steps for chip, facts in chips.items()}
    assert steps["tpu7x"] == 1 and steps["v6e"] > 1
