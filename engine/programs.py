"""Which programs serve a model: every point of the lattice bound to its step function."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from engine import steps
from engine.batch import StepKey, configure_layout, lattice, step_layout
from engine.config import EngineConfig
from engine.executables import Program
from engine.model.config import ModelConfig
from engine.model.params import param_specs
from engine.model.quantization import packed_shape, packing_of
from engine.recur import LayerStates, states_shape
from engine.slots import Slots, slots_shape
from engine.steps import Compute
from pallas_kernels.kv_layout import kv_layout

Shapes = jax.ShapeDtypeStruct


def param_shapes(model: ModelConfig, config: EngineConfig) -> dict[str, Any]:
    """Abstract parameters as they are on the device."""
    specs, stored = param_specs(model, jnp.dtype(config.dtype)), dict(config.stored)
    return {
        name: packed_shape(spec, stored.get(name) or packing_of(spec, config.quantization))
        for name, spec in specs.items()
    }


def compute_of(model: ModelConfig, config: EngineConfig) -> Compute:
    """What the programs are traced from."""
    dtype, platform = config.kv_cache_dtype, config.target.platform
    if model.latent is None:
        layout = kv_layout(model.num_kv_heads, model.head_dim, dtype, platform)
    else:
        layout = kv_layout(1, model.latent.row_dim, dtype, platform, value_dim=model.latent.kv_rank)
    return Compute(model, layout, config.page_size, config.target)


def kv_shapes(model: ModelConfig, config: EngineConfig) -> tuple[Shapes | LayerStates, ...]:
    """What each layer keeps, abstract: pages [pages, page_size, layout.width], or recurrent states."""
    layout = compute_of(model, config).kv
    pages = Shapes((config.num_pages, config.page_size, layout.width), jnp.dtype(layout.dtype))
    states = None if model.recurrence is None else states_shape(model, config.num_states, config.dtype)
    return tuple(states if layer.recurrent and states else pages for layer in model.layers)


def page_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes of one page in all layers; 0 where no layer attends."""
    num_paged = model.num_layers - model.num_recurrent_layers
    return config.page_size * compute_of(model, config).kv.token_bytes * num_paged


def state_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes of all recurrent states in all layers."""
    return config.num_states * model.state_bytes(jnp.dtype(config.dtype).itemsize)


def serving_programs(model: ModelConfig, config: EngineConfig) -> list[Program]:
    """The closed set: nothing else runs on the device while serving."""
    return [*(step_program(model, config, key) for key in lattice(config)), configure_program(model, config)]


def step_program(model: ModelConfig, config: EngineConfig, key: StepKey) -> Program:
    layout = step_layout(config, key)
    if key.tokens:
        function = partial(steps.prefill_step, compute_of(model, config), layout)
        output = steps.empty_output_shape(key.rows + config.max_prefill_rows, 1, key.tokens)
    else:
        function = partial(steps.decode_step, compute_of(model, config), layout, config.decode_steps)
        output = steps.empty_output_shape(key.rows, config.decode_steps, 0)
    state = (param_shapes(model, config), kv_shapes(model, config), slots_of(model, config))
    vector = Shapes((layout.size,), jnp.int32)
    return Program(key.name, function, (*state, vector), donated=(1, 2), outputs=(state[1], state[2], output))


def logits_program(model: ModelConfig, config: EngineConfig, tokens: int) -> Program:
    """Logits of every token of a chunk: for research, outside the serving set."""
    layout = step_layout(config, StepKey(tokens, 0))
    state = (param_shapes(model, config), kv_shapes(model, config), slots_of(model, config))
    logits = Shapes((tokens, model.vocab_size), jnp.float32)
    return Program(
        f"logits_{tokens}",
        partial(steps.token_logits, compute_of(model, config), layout),
        (*state, Shapes((layout.size,), jnp.int32)),
        donated=(1, 2),
        outputs=(state[1], state[2], logits),
    )


def configure_program(model: ModelConfig, config: EngineConfig) -> Program:
    layout = configure_layout(config, model.vocab_size)
    slots = slots_of(model, config)
    inputs = (slots, Shapes((layout.size,), jnp.int32))
    return Program("configure", partial(steps.configure, layout), inputs, donated=(0,), outputs=(slots,))


def slots_of(model: ModelConfig, config: EngineConfig) -> Slots:
    return slots_shape(config.max_num_seqs, config.max_pages_per_seq, model.vocab_size)
