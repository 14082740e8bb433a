"""Attention over parts of pages, each on a device of its own: together they are attention over whole pages."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.api import choice
from pallas_kernels.paged_attention.cases import CASES
from pallas_kernels.paged_attention.part import Part
from pallas_kernels.target import Target
from tests.pallas_kernels.attention_calls import TOLERANCE, by_parts, fill

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["decode_window", "decode_latent_int8", "prefill_sinks", "prefill_window"])
def test_parts_of_pages_are_the_whole(name: str) -> None:
    """Four devices have a quarter of every page's tokens each; where none of a row's keys is, nothing counts."""
    call = fill(BY_NAME[name])
    assert by_parts(call, 4) < TOLERANCE[call.case.dtype]
    assert not by_parts(call, 4, turn=1) < 0.01, "another device's keys are at other positions"


def test_kernels_say_why_they_do_not_serve_parts() -> None:
    found = choice(replace(BY_NAME["decode_gqa_3"].spec("gpu"), parts=2), Target("gpu", "h200"))
    assert found.implementation.name == "reference"
    assert ("gpu", "reads whole pages and returns no log-sum-exp") in found.declined


def test_keys_are_numbered_by_position() -> None:
    """Pages of 12 tokens, 4 of each on the second of three devices."""
    part, size = Part(jnp.int32(1), 3), 4
    here = [position for position in range(40) if position % 12 // size == 1]
    np.testing.assert_array_equal(part.position_of(jnp.arange(len(here)), size), here)
    before = [sum(key < position for key in here) for position in range(41)]
    np.testing.assert_array_equal(part.keys_before(jnp.arange(41), size), before)
    np.testing.assert_array_equal(part.is_here(jnp.arange(12), size), [i in here for i in range(12)])
