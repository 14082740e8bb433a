"""The real step programs, compiled for chips that are not here.

Proves that they compile, and from the compiler's account that the KV pool and the weights
exist once: donated state is aliased and temporaries stay a small part of the pool.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from engine.batch import StepKey
from engine.config import EngineConfig, EngineOptions
from engine.executables import Executable, Memory, Program
from engine.model.config import LayerSpec, ModelConfig, Rope
from engine.programs import page_bytes, step_program
from engine.resolve import DeviceFacts, resolve
from sharding.topology import topology_devices

SMOLLM2 = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_q_heads=9,
    num_kv_heads=3,
    head_dim=64,
    layers=(LayerSpec(Rope(tuple(100000.0 ** (-i / 32) for i in range(32)))),) * 30,
    max_position=8192,
    attention_scale=0.125,
    tie_embeddings=True,
)
LLAMA_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    layers=(LayerSpec(Rope(tuple(500000.0 ** (-i / 64) for i in range(64)))),) * 32,
    max_position=131072,
    attention_scale=128**-0.5,
)
CHIPS = {
    "v6e:2x2": DeviceFacts("tpu", 32 << 30, True, "v6e"),
    "h200:1": DeviceFacts("gpu", 141 << 30, True, "h200"),
}
KEYS = {"decode": StepKey(0, 64), "prefill": StepKey(1024, 0), "mixed": StepKey(256, 256)}


def compile_for(chip: str, program: Program) -> Memory:
    """Compile with every argument on the chip's first device; the compiler's account of it."""
    device = topology_devices(chip)[0]
    place = SingleDeviceSharding(device)
    inputs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), program.inputs)
    program = replace(program, inputs=inputs)
    return Executable(program, program.lower().compile()).memory()


def config_for(model: ModelConfig, chip: str) -> EngineConfig:
    config = resolve(EngineOptions(max_model_len=8192), model, "bfloat16", CHIPS[chip])
    return replace(config, num_pages=8 * 8192 // config.page_size)


@pytest.mark.aot
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        pytest.param(SMOLLM2, "decode", id="smollm2-decode"),
        pytest.param(SMOLLM2, "prefill", id="smollm2-prefill"),
        pytest.param(SMOLLM2, "mixed", id="smollm2-mixed", marks=pytest.mark.slow),
        pytest.param(LLAMA_8B, "decode", id="llama8b-decode"),
        pytest.param(LLAMA_8B, "prefill", id="llama8b-prefill"),
        pytest.param(LLAMA_8B, "mixed", id="llama8b-mixed", marks=pytest.mark.slow),
    ],
)
def test_step_compiles_without_a_second_pool(model: ModelConfig, kind: str, chip: str) -> None:
    config = config_for(model, chip)
    memory = compile_for(chip, step_program(model, config, KEYS[kind]))
    pool = config.num_pages * page_bytes(model, config)
    assert memory.aliased >= pool, "the donated pool must be updated in place"
    assert memory.temporary < pool / 4, f"{memory.temporary:,} bytes of temporaries beside a pool of {pool:,}"


@pytest.mark.aot
def test_the_check_sees_a_second_pool() -> None:
    """Without donation the same program must hold the pool twice."""
    config = config_for(SMOLLM2, "v6e:2x2")
    program = replace(step_program(SMOLLM2, config, KEYS["decode"]), donated=())
    memory = compile_for("v6e:2x2", program)
    pool = config.num_pages * page_bytes(SMOLLM2, config)
    assert memory.aliased < pool and memory.outputs >= pool


def test_matrices_are_not_padded_to_tiles() -> None:
    """Every big weight's last two dimensions fill TPU tiles of 8 x 128 (they once cost four times their size)."""
    config = config_for(LLAMA_8B, "v6e:2x2")
    for name, shape in step_program(LLAMA_8B, config, KEYS["decode"]).inputs[0].items():
        if len(shape.shape) > 1:
            assert shape.shape[-1] % 128 == 0 and shape.shape[-2] % 8 == 0, (name, shape.shape)
        assert shape.dtype in (jnp.bfloat16, jnp.float32)
