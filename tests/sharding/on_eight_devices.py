"""Sharding files on four of eight CPU devices against the same model on one. test_sharded.py runs it.

float32: logits to 1e-5 relative, and under the equality net the engine's tokens are a naive forward's.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from engine.batch import StepKey
from engine.config import EngineConfig
from engine.executables import NoProgramCache, compile_all, compile_one
from engine.load import placer
from engine.logits import TokenLogits
from engine.model.config import Experts, Latent, LayerSpec, ModelConfig
from engine.model.params import axis_sizes, param_specs
from engine.model.quantization import pack
from engine.programs import serving_programs, step_program
from engine.runner import Runner
from engine.stats import Counters
from sharding.mesh import mesh_of
from sharding.params import init_array
from sharding.rules import load_strategy
from tests.engine.test_equality import run_schedule
from tests.engine.world import CONFIG, MODEL, ROPE, World
from tests.oracle import naive_logits

DEVICES = 4
DENSE = replace(
    MODEL, vocab_size=100, hidden_size=32, intermediate_size=512, num_q_heads=8, num_kv_heads=4, qk_norm="full",
    layers=(LayerSpec(ROPE), LayerSpec(ROPE, window=24)),
)  # fmt: skip
EXPERTS = replace(
    DENSE, qk_norm="head", layers=(LayerSpec(ROPE, ffn="experts"), LayerSpec(ROPE, window=24)), tie_embeddings=False,
    attention_sinks=True, output_bias=True, qkv_bias=True,
    experts=Experts(
        num_experts=8, per_token=2, intermediate_size=512, shared_size=512, shared_gate=True, biases=True, clamp=7.0,
        router_bias=True,
    ),
)  # fmt: skip
LATENT = replace(
    EXPERTS, num_q_heads=4, num_kv_heads=4, head_dim=24, qk_norm="none", attention_softcap=None, attention_sinks=False,
    layers=(LayerSpec(ROPE, mixer="latent"), LayerSpec(ROPE, mixer="latent", ffn="experts")), qkv_bias=False,
    output_bias=False,
    latent=Latent(kv_rank=16, nope_dim=8, rope_dim=16, value_dim=12, q_rank=20),
)  # fmt: skip
GROUPED = replace(DENSE, num_kv_heads=2, qkv_bias=True, attention_sinks=True, attention_gate=True)
slow = pytest.mark.slow
# Two sums a layer and one for the embedding; the logits are gathered. The dense model norms over all heads, q and k
# at once, which takes one more.
TWO_A_LAYER = {"all-reduce": 1 + 2 * 2, "all-gather": 1}
COLLECTIVES = [
    pytest.param("dense", "tp", {"all-reduce": 1 + 2 * 3, "all-gather": 1}),
    pytest.param("experts", "tp", TWO_A_LAYER, marks=slow),
    pytest.param("experts", "ep", TWO_A_LAYER),
    pytest.param("latent", "tp", TWO_A_LAYER, marks=slow),
    pytest.param("grouped", "tp-replicated", {"all-reduce": 1 + 2 * 3, "all-gather": 1}, marks=slow),
]
MODELS = {"dense": DENSE, "experts": EXPERTS, "latent": LATENT, "grouped": GROUPED}
CASES = [
    pytest.param("dense", "tp", marks=slow),
    pytest.param("grouped", "tp-replicated"),
    pytest.param("experts", "tp-ep", marks=slow),
    *(pytest.param(kind, name, marks=slow) for kind in ("experts", "latent") for name in ("tp", "ep")),
]
SMALL = replace(CONFIG, token_buckets=(48,), decode_buckets=(6,), prefill_decode_buckets=(6,))


def config_of(model: ModelConfig, strategy: str, **changes: Any) -> EngineConfig:
    return replace(SMALL, shards=load_strategy(strategy).shards(axis_sizes(model), DEVICES), **changes)


@cache
def host_params(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    specs = param_specs(MODELS[kind], jnp.dtype(jnp.float32)).items()
    # Biases are zeros by declaration; here they must be seen.
    found = {
        name: rng.standard_normal(spec.shape).astype(np.float32) * 0.1
        if spec.init == "zeros"
        else init_array(spec, rng)
        for name, spec in specs
    }
    found["embed"] *= 4.0
    return found


def flat(kind: str) -> dict[str, Any]:
    """On one device, as a model that is not cut has them."""
    specs = param_specs(MODELS[kind], jnp.dtype(jnp.float32))
    return {name: jnp.asarray(pack(specs[name], array, None)) for name, array in host_params(kind).items()}


def world_of(kind: str, config: EngineConfig) -> World:
    model, put = MODELS[kind], placer(MODELS[kind], config)
    params = {name: put(name, array) for name, array in host_params(kind).items()}
    programs, counters = serving_programs(model, config, mesh_of(config.shards)), Counters()
    executables = compile_all(programs, NoProgramCache(), lambda phase, progress: None)
    runner = Runner(model, config, params, executables, counters)
    runner.warm_up()
    return World(model, config, flat(kind), runner, counters)


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_logits_and_tokens_are_those_of_one_device(kind: str, strategy: str) -> None:
    model, config = MODELS[kind], config_of(MODELS[kind], strategy)
    assert config.shards.num_devices == DEVICES
    world = world_of(kind, config)
    tokens = np.random.default_rng(5).integers(0, 97, 100).tolist()
    engine = world.engine().start()
    found, wanted = TokenLogits(engine)(tokens), naive_logits(model, world.params, tokens)
    engine.stop()
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-5
    for seed in (0, 1):
        run_schedule(world, seed, overlap=seed == 1)


@pytest.mark.parametrize(("kind", "strategy", "expected"), COLLECTIVES)
def test_collectives_of_a_decode_step(kind: str, strategy: str, expected: dict[str, int]) -> None:
    """Golden counts: a change that adds one fails here."""
    model, config = MODELS[kind], config_of(MODELS[kind], strategy)
    program = step_program(model, config, StepKey(0, 6), mesh_of(config.shards))
    text = compile_one(program, NoProgramCache()).compiled.as_text() or ""
    found = {
        name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in ("all-reduce", "all-gather", "all-to-all")
    }
    assert {name: count for name, count in found.items() if count} == expected
