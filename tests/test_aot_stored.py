"""Step programs over weights that stay as a checkpoint has them packed, compiled for chips that are not here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from engine.kernels import kernel_choices
from engine.model.packing import Packing, Packings
from engine.model.params import param_specs
from engine.programs import page_bytes, param_shapes, step_program
from tests.test_aot import KEYS, LLAMA_8B, compile_for, config_for, first_layers

MODEL = first_layers(LLAMA_8B, 2)
Q4_K, Q6_K = Packing("int4", 32, symmetric=False), Packing("int8", 16)
GPTQ = Packing("int4", 128)
# What a Q4_K_M file becomes, layer by layer, and what GPTQ does.
MIXED = {"0.down": Q6_K, "0.qkv": Packing("int8", 16, symmetric=False)}


def stored(default: Packing, others: dict[str, Packing]) -> Packings:
    specs = param_specs(MODEL, jnp.dtype(jnp.bfloat16))
    names = [name for name, spec in specs.items() if spec.packable]
    return tuple((name, others.get(name.removeprefix("layers."), default)) for name in names)


def cases() -> list[Any]:
    slow = pytest.mark.slow
    return [
        pytest.param("v6e:2x2", "decode", stored(Q4_K, MIXED), id="v6e-decode-q4_k_m", marks=slow),
        pytest.param("v6e:2x2", "prefill", stored(Q4_K, MIXED), id="v6e-prefill-q4_k_m", marks=slow),
        pytest.param("h200:1", "decode", stored(GPTQ, {}), id="h200-decode-gptq", marks=slow),
    ]


@pytest.mark.aot
@pytest.mark.parametrize(("chip", "kind", "packings"), cases())
def test_weights_stay_packed(chip: str, kind: str, packings: Packings) -> None:
    """Through kernels, and with no wide copy of the weights of a layer beside the pool's in-place update."""
    config = replace(config_for(MODEL, chip), stored=packings)
    lines = [line for line in kernel_choices(MODEL, config) if line.startswith("quantized_matmul")]
    assert lines
    if chip.startswith("v6e"):
        assert not any("quantized_matmul: reference" in line for line in lines), lines
    memory = compile_for(chip, step_program(MODEL, config, KEYS[kind]))
    assert memory.aliased >= config.num_pages * page_bytes(MODEL, config)
    layers = {name: shape for name, shape in param_shapes(MODEL, config).items() if name.startswith("layers.")}
    packed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    wide = 2 * sum(
        spec.num_bytes for name, spec in param_specs(MODEL, jnp.dtype(jnp.bfloat16)).items() if name in layers
    )
    assert packed < wide / 3
    if kind == "decode":
        assert memory.temporary < packed
