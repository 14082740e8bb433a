"""How the tokens of a step walk through recurrent states: a pool beside the pages, one row a sequence.

Rows of the pool: one a slot, the idle slot's (nobody's: research reads logits through it), then those of the
checkpoints that prefix reuse starts from (`engine.checkpoints`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import LayerSpec, ModelConfig
from engine.model.mixers import RECURRENCES, RecurrentInput
from pallas_kernels.gated_delta import gated_delta
from pallas_kernels.short_conv import short_conv
from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.api import SSDInput
from pallas_kernels.states import DecodeStates, PrefillStates, rows_of_their_own
from pallas_kernels.target import Target


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerStates:
    """What a recurrent layer remembers, one row a state."""

    windows: Array  # [states, (conv_width - 1) * conv_channels], inputs of the last tokens' convolution
    states: Array  # float32 [states, *state_shape]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tried:
    """States before tokens that a verifying step only tries, and what those brought: enough to take some of them."""

    before: LayerStates
    brought: RecurrentInput


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StatesView:
    """Whose states the step's tokens continue, the same for every layer."""

    decode: DecodeStates
    prefill: PrefillStates | None

    @property
    def only_tries(self) -> bool:
        """Whether the states stay as they are."""
        return self.prefill is not None and self.prefill.target is None


def states_shape(model: ModelConfig, num_states: int, dtype: str) -> LayerStates:
    """Abstract `LayerStates` of one layer."""
    recurrence = model.recurrence
    if recurrence is None:
        raise ValueError(f"{model.family} has no recurrent layers")
    window = (recurrence.conv_width - 1) * recurrence.conv_channels
    shape = (num_states, *recurrence.state_shape)
    return jax.eval_shape(lambda: LayerStates(jnp.zeros((num_states, window), dtype), jnp.zeros(shape, jnp.float32)))


def recur(
    config: ModelConfig, layer: LayerSpec, view: StatesView, cache: LayerStates, brought: RecurrentInput, target: Target
) -> tuple[Array, LayerStates]:
    """Convolve, then recur: (values [tokens, heads, head_dim], the layer's states)."""
    rows = (view.decode, view.prefill)
    convolved, windows = short_conv(brought.mixed, cache.windows, brought.weight, brought.bias, *rows, target=target)
    inputs = RECURRENCES[layer.mixer](config, convolved, *brought.beside)
    if isinstance(inputs, SSDInput):
        out, states = ssd(inputs, cache.states, *rows, target=target)
    else:
        out, states = gated_delta(inputs, cache.states, *rows, target=target)
    return out, LayerStates(windows, states)


def tried_rows(q_start: Array, q_len: Array, slot: Array, count: int) -> PrefillStates:
    """Chunks of `count` tokens behind each slot's state, which stays as it is. See `take`."""
    return replace(rows_of_their_own(q_start, q_len, slot, count), target=None)


def take(config: ModelConfig, layer: LayerSpec, tried: Tried, rows: PrefillStates, target: Target) -> LayerStates:
    """The layer's states after the first q_len of each row's tokens that were tried."""
    none = jnp.zeros((0,), jnp.int32)
    view = StatesView(DecodeStates(none, none != 0), rows)
    return recur(config, layer, view, tried.before, tried.brought, target)[1]
