"""KV heads that several devices hold: what each gets, from float and from packed weights."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.config import EngineOptions
from engine.errors import InvalidParam
from engine.model.known import known_config
from engine.model.params import axis_sizes, param_specs
from engine.model.place import local_model, replicated, with_copies
from engine.programs import page_bytes
from engine.resolve import DeviceFacts, resolve
from pallas_kernels.quantized import Quantized, quantize
from sharding.rules import load_strategy
from sharding.shards import Shards
from tests.engine.world import MODEL

WIDE = replace(MODEL, num_q_heads=8, num_kv_heads=2, intermediate_size=512, qk_norm="full", qkv_bias=True)
SPECS = param_specs(WIDE, jnp.dtype(jnp.float32))
FACTS = DeviceFacts("tpu", 32 << 30, True, "v6e", 16)


def test_each_copy_has_its_own_queries_and_the_same_key_and_value() -> None:
    spec = SPECS["layers.0.qkv"]
    array = np.arange(np.prod(spec.shape), dtype=np.float32).reshape(spec.shape)
    found = with_copies("layers.0.qkv", spec, array, 2)
    assert found.shape == param_specs(replicated(WIDE, shards(4)), jnp.dtype(jnp.float32))["layers.0.qkv"].shape
    for head in range(4):
        of, first = head // 2, 2 * (head % 2)
        np.testing.assert_array_equal(found[:, head, :2], array[:, of, first : first + 2])
        np.testing.assert_array_equal(found[:, head, 2:], array[:, of, 4:])


def test_packed_weights_are_copied_with_their_scales() -> None:
    spec = SPECS["layers.0.qkv"]
    array = np.random.default_rng(0).standard_normal(spec.shape).astype(np.float32)

    def packed(weight: np.ndarray) -> Quantized:
        found = quantize(weight.reshape(weight.shape[0], -1), "int8")
        return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], *weight.shape[1:]), found)

    found = with_copies("layers.0.qkv", spec, packed(array), 2)
    wanted = packed(with_copies("layers.0.qkv", spec, array, 2))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def shards(devices: int) -> Shards:
    return load_strategy("tp-replicated").shards(axis_sizes(WIDE), devices)


def test_llama_over_sixteen() -> None:
    """8 KV heads over 16 devices: one on each, with half of its eight query heads."""
    model = known_config("llama-3.1-70b")
    config = resolve(EngineOptions(sharding="tp-replicated"), model, "bfloat16", FACTS)
    local = local_model(model, config.shards)
    assert (config.shards.num_copies("kv_heads"), local.num_kv_heads, local.num_q_heads) == (2, 1, 4)
    assert page_bytes(model, config) == config.page_size * 80 * 2 * 128 * 2


def test_query_heads_must_divide_over_the_copies() -> None:
    model = replace(known_config("llama-3.1-70b"), num_q_heads=24, intermediate_size=16384)
    with pytest.raises(InvalidParam, match="a KV head has 3 query heads, which do not divide over its 2 copies"):
        resolve(EngineOptions(sharding="tp-replicated"), model, "bfloat16", FACTS)
