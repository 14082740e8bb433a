"""Which programs serve a pooling model: every point of its lattice bound to the step function."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from engine.executables import Program
from engine.model.config import ModelConfig
from engine.model.encoder import encoder_specs
from engine.model.encoder_config import EncoderConfig
from engine.model.params import param_specs
from engine.model.quantization import packed_shape, packing_of
from engine.pooling.batch import BatchKey, batch_layout, lattice
from engine.pooling.config import PoolingConfig
from engine.pooling.steps import Compute, pool_step
from sharding.params import ParamSpec

PoolingModel = EncoderConfig | ModelConfig


def specs_of(model: PoolingModel, dtype: str) -> dict[str, ParamSpec]:
    """All parameters that pooling reads. A decoder has no head here (`tie_embeddings`)."""
    if isinstance(model, EncoderConfig):
        return encoder_specs(model, jnp.dtype(dtype))
    return param_specs(model, jnp.dtype(dtype))


def param_shapes(model: PoolingModel, config: PoolingConfig) -> dict[str, Any]:
    """Abstract parameters as they are on the device."""
    specs = specs_of(model, config.dtype)
    return {
        name: packed_shape(spec, packing_of(spec, config.quantization), config.target) for name, spec in specs.items()
    }


def pooling_programs(model: PoolingModel, config: PoolingConfig) -> list[Program]:
    """The closed set: nothing else runs on the device while serving."""
    return [pooling_program(model, config, key) for key in lattice(config)]


def pooling_program(model: PoolingModel, config: PoolingConfig, key: BatchKey) -> Program:
    layout = batch_layout(key)
    compute = Compute(model, config.pooling, config.target)
    labels = model.num_labels if isinstance(model, EncoderConfig) else 0
    output = jax.ShapeDtypeStruct((key.rows, labels or model.hidden_size), jnp.float32)
    inputs = (param_shapes(model, config), jax.ShapeDtypeStruct((layout.size,), jnp.int32))
    return Program(key.name, partial(pool_step, compute, layout, key), inputs, donated=(), outputs=(output,))
