"""The likeliest token by the compiled CPU kernels: numpy's argmax to the index, and rows that are not finite told."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.greedy import greedy
from pallas_kernels.greedy.api import choice
from pallas_kernels.greedy.spec import GreedySpec
from pallas_kernels.native import library
from pallas_kernels.target import CPU, Target

NATIVE = Target(native=library().isa)
both_ways = pytest.mark.parametrize(
    "target", [CPU, pytest.param(NATIVE, marks=pytest.mark.skipif(not NATIVE.native, reason=library().missing))]
)


def found(logits: np.ndarray, target: Target) -> tuple[list[int], list[bool]]:
    token, faulty = greedy(jnp.asarray(logits), target=target)
    assert (token.dtype, faulty.dtype) == (jnp.int32, jnp.bool_)
    return token.tolist(), faulty.tolist()


@both_ways
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 49152), (5, 1000), (16, 4099), (70, 64), (3, 200_000)])
def test_equals_numpy(rows: int, vocab: int, target: Target) -> None:
    rng = np.random.default_rng(vocab)
    # Few different numbers, so that the highest is there several times.
    logits = rng.integers(-9, 9, (rows, vocab)).astype(np.float32)
    assert found(logits, target) == (logits.argmax(axis=1).tolist(), [False] * rows)
    logits = rng.standard_normal((rows, vocab)).astype(np.float32)
    assert found(logits, target) == (logits.argmax(axis=1).tolist(), [False] * rows)


@both_ways
def test_the_highest_is_seen_wherever_it_is(target: Target) -> None:
    vocab = 203
    logits = np.full((vocab, vocab), -3e38, np.float32)
    np.fill_diagonal(logits, -2e38)
    assert found(logits, target)[0] == list(range(vocab))


@both_ways
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told_wherever_it_is_and_spoils_no_other_row(value: float, target: Target) -> None:
    vocab = 203
    clean = np.random.default_rng(0).standard_normal((2 * vocab, vocab)).astype(np.float32)
    spoilt = clean.copy()
    spoilt[2 * np.arange(vocab), np.arange(vocab)] = value
    token, faulty = found(spoilt, target)
    assert faulty == [True, False] * vocab
    assert token[1::2] == clean[1::2].argmax(axis=1).tolist()
    assert all(0 <= one < vocab for one in token)


@both_ways
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_row_without_a_number_has_some_token(value: float, target: Target) -> None:
    token, faulty = found(np.full((2, 96), value, np.float32), target)
    assert faulty == [True, True] and all(0 <= one < 96 for one in token)


@pytest.mark.parametrize(
    ("spec", "target", "reason"),
    [
        (GreedySpec(), Target("tpu", "v6e"), "for cpu"),
        (GreedySpec(), CPU, "the native library is not there"),
        (GreedySpec(num_devices=4), Target(native="avx512"), "for one device, not 4"),
    ],
)
def test_what_the_compiled_kernel_declines(spec: GreedySpec, target: Target, reason: str) -> None:
    assert ("cpu", reason) in choice(spec, target).declined


def test_logits_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"logits are bfloat16 \(2, 8\); float32 \[rows, vocab\] are wanted"):
        greedy(jnp.zeros((2, 8), jnp.bfloat16), target=CPU)
