"""Attention over parts of pages, each on a device of its own: together they are attention over whole pages."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import decode_part, prefill_part
from pallas_kernels.paged_attention.api import choice
from pallas_kernels.paged_attention.cases import CASES
from pallas_kernels.paged_attention.part import MASKED, Part
from pallas_kernels.target import Target
from tests.pallas_kernels.attention_calls import TOLERANCE, Call, fill, jitted

BY_NAME = {case.name: case for case in CASES}


def by_parts(call: Call, count: int, turn: int = 0) -> float:
    """The error of what devices with a part of every page each come to together; turn: they mistake whose is whose."""
    size, lens = call.case.page_size // count, np.asarray(call.case.lengths, np.int32)
    rows = [jnp.asarray(lens)]
    if call.case.queries is not None:
        counts = np.asarray(call.case.queries, np.int32)
        rows = [jnp.asarray(a) for a in (call.starts, counts, lens - counts)]
    attention = decode_part if call.case.queries is None else prefill_part
    how = (call.case.layout("cpu"), call.target, call.scale, call.case.softcap, call.case.window)
    run, found = jitted(attention, *how), []
    for i in range(count):
        part, sinks = Part(jnp.int32((i + turn) % count), count), None
        if call.sinks is not None:
            sinks = jnp.asarray(call.sinks) if i == 0 else jnp.full(call.sinks.shape, MASKED)
        pages = call.pages[:, i * size : (i + 1) * size]
        found.append(run(call.q, pages, jnp.asarray(call.tables), *rows, part, sinks=sinks))
    values, lse = (np.stack(arrays).astype(np.float64) for arrays in zip(*found, strict=True))
    weight = np.exp(lse - lse.max(axis=0))[..., None]
    return call.error_of(np.sum(values * weight, axis=0) / np.sum(weight, axis=0))


@pytest.mark.parametrize("name", ["decode_window", "decode_latent_int8", "prefill_sinks", "prefill_window"])
def test_parts_of_pages_are_the_whole(name: str) -> None:
    """Four devices have a quarter of every page's tokens each; where none of a row's keys is, nothing counts."""
    call = fill(BY_NAME[name])
    assert by_parts(call, 4) < TOLERANCE[call.case.dtype]
    assert not by_parts(call, 4, turn=1) < 0.01, "another device's keys are at other positions"


@pytest.mark.parametrize("target", [Target("tpu", "v6e"), Target("gpu", "h200")], ids=lambda target: target.platform)
def test_kernels_say_why_they_do_not_serve_parts(target: Target) -> None:
    found = choice(replace(BY_NAME["decode_gqa_3"].spec(target.platform), parts=2), target)
    assert found.implementation.name == "reference"
    assert (target.platform, "reads whole pages and returns no log-sum-exp") in found.declined


def test_keys_are_numbered_by_position() -> None:
    """Pages of 12 tokens, 4 of each on the second of three devices."""
    part, size = Part(jnp.int32(1), 3), 4
    here = [position for position in range(40) if position % 12 // size == 1]
    np.testing.assert_array_equal(part.position_of(jnp.arange(len(here)), size), here)
    before = [sum(key < position for key in here) for position in range(41)]
    np.testing.assert_array_equal(part.keys_before(jnp.arange(41), size), before)
    np.testing.assert_array_equal(part.is_here(jnp.arange(12), size), [i in here for i in range(12)])
