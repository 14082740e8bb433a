"""How the tokens of a step walk through recurrent states: a pool beside the pages, one row a sequence.

Rows of the pool: one a slot, the idle slot's (nobody's: research reads logits through it), then those of the
checkpoints that prefix reuse starts from (`engine.checkpoints`).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import ModelConfig
from engine.model.mixers import RecurrentInput
from pallas_kernels.gated_delta import gated_delta
from pallas_kernels.short_conv import short_conv
from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.api import SSDInput
from pallas_kernels.states import DecodeStates, PrefillStates
from pallas_kernels.target import Target


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerStates:
    """What a recurrent layer remembers, one row a state."""

    windows: Array  # [states, (conv_width - 1) * conv_channels], inputs of the last tokens' convolution
    states: Array  # float32 [states, *state_shape]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StatesView:
    """Whose states the step's tokens continue, the same for every layer."""

    decode: DecodeStates
    prefill: PrefillStates | None


def states_shape(model: ModelConfig, num_states: int, dtype: str) -> LayerStates:
    """Abstract `LayerStates` of one layer."""
    recurrence = model.recurrence
    if recurrence is None:
        raise ValueError(f"{model.family} has no recurrent layers")
    window = (recurrence.conv_width - 1) * recurrence.conv_channels
    shape = (num_states, *recurrence.state_shape)
    return jax.eval_shape(lambda: LayerStates(jnp.zeros((num_states, window), dtype), jnp.zeros(shape, jnp.float32)))


def recur(view: StatesView, cache: LayerStates, brought: RecurrentInput, target: Target) -> tuple[Array, LayerStates]:
    """Convolve, then recur: (values [tokens, heads, head_dim], the layer's states)."""
    rows = (view.decode, view.prefill)
    convolved, windows = short_conv(brought.mixed, cache.windows, brought.weight, brought.bias, *rows, target=target)
    inputs = brought.inputs(convolved)
    if isinstance(inputs, SSDInput):
        out, states = ssd(inputs, cache.states, *rows, target=target)
    else:
        out, states = gated_delta(inputs, cache.states, *rows, target=target)
    return out, LayerStates(windows, states)
