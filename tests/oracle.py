"""The plainest forward there is: dense attention over the whole sequence, recurrences token by token, no batching.

What the engine's tokens and logits are compared with. Shares only the decoder with the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.model.config import LayerSpec, ModelConfig
from engine.model.decoder import hidden_states, logits
from engine.model.mixers import RECURRENCES, AttentionInput, RecurrentInput
from engine.model.place import ALONE
from pallas_kernels.gated_delta.api import DeltaInput
from pallas_kernels.kv_layout import KVLayout, pack_rows, unpack_rows
from pallas_kernels.ssd.api import SSDInput

SHORTEST = 256  # tokens of a forward; padding costs less than compiling another


def naive_logits(config: ModelConfig, params: dict, token_ids: Sequence[int], kv: KVLayout | None = None) -> np.ndarray:
    """float32 [tokens, vocab]: logits after every token. One program up to SHORTEST, then one a power of two.

    kv: keys and values are seen as a quantized cache of that layout keeps them.
    """
    length = len(token_ids)
    tokens = np.zeros(max(SHORTEST, 1 << (length - 1).bit_length()), np.int32)
    tokens[:length] = token_ids
    return np.asarray(_forward(config, kv, params, tokens)[0])[:length]


def naive_expert_load(config: ModelConfig, params: dict, token_ids: Sequence[int]) -> np.ndarray:
    """int [layers with experts, experts]: how many of the tokens chose each."""
    chosen = _forward(config, None, params, np.asarray(token_ids, np.int32))[1]
    count = config.experts.num_experts if config.experts else 0
    return np.stack([np.bincount(np.asarray(layer).reshape(-1), minlength=count) for layer in chosen])


def naive_greedy(config: ModelConfig, params: dict, token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """The next `num_tokens` tokens, each the argmax of a fresh forward."""
    tokens = list(token_ids)
    for _ in range(num_tokens):
        tokens.append(int(naive_logits(config, params, tokens)[-1].argmax()))
    return tokens[len(token_ids) :]


@partial(jax.jit, static_argnums=(0, 1))
def _forward(config: ModelConfig, kv: KVLayout | None, params: dict, tokens: Array) -> tuple[Array, tuple[Array, ...]]:
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    no_caches = (None,) * config.num_layers
    hidden, _, chosen = hidden_states(config, params, tokens, positions, no_caches, None, DenseAttention(kv), ALONE)
    return logits(config, params, hidden), chosen


@dataclass(frozen=True)
class DenseAttention:
    """Causal, windowed, soft-capped attention over all tokens at once."""

    kv: KVLayout | None

    def __call__(
        self, config: ModelConfig, layer: LayerSpec, view: None, cache: None, brought: AttentionInput | RecurrentInput
    ) -> tuple[Array, None]:
        """Values [tokens, q_heads, head_dim], or value_dim of latent attention, whose keys are expanded here."""
        if isinstance(brought, RecurrentInput):
            return _recur(config, layer, brought), None
        k, v = brought.k, brought.v
        if self.kv is not None:
            rows = unpack_rows(pack_rows(k, v, self.kv), self.kv)
            k, v = rows[:, :, 0], None if v is None else rows[:, :, 1]
        if v is None:
            k, v = _expanded(config, brought, k[:, 0])
        return _attend(config, layer, brought.q, k, v, brought.sinks), None


def _recur(config: ModelConfig, layer: LayerSpec, brought: RecurrentInput) -> Array:
    """The convolution over all tokens, then one token after the other through the recurrence, from zeros."""
    x, width = brought.mixed.astype(jnp.float32), brought.weight.shape[0]
    padded = jnp.pad(x, ((width - 1, 0), (0, 0)))
    convolved = sum(padded[i : i + len(x)] * brought.weight[i][None].astype(jnp.float32) for i in range(width))
    if brought.bias is not None:
        convolved = convolved + brought.bias[None].astype(jnp.float32)
    inputs = RECURRENCES[layer.mixer](config, jnp.asarray(convolved, brought.mixed.dtype), *brought.beside)
    return _state_space(inputs) if isinstance(inputs, SSDInput) else _delta_rule(inputs)


def _state_space(inputs: SSDInput) -> Array:
    heads, groups = inputs.x.shape[1], inputs.b.shape[1]

    def one(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x, b, c, dt = token
        b, c = (jnp.repeat(a, heads // groups, axis=0)[:, None, :] for a in (b, c))
        state = state * jnp.exp(dt * inputs.a)[:, None, None] + (x * dt[:, None])[:, :, None] * b
        return state, jnp.sum(state * c, axis=-1) + inputs.skip[:, None] * x

    state = jnp.zeros((*inputs.x.shape[1:], inputs.b.shape[2]))
    per_token = tuple(a.astype(jnp.float32) for a in (inputs.x, inputs.b, inputs.c, inputs.dt))
    return jax.lax.scan(one, state, per_token)[1].astype(inputs.x.dtype)


def _delta_rule(inputs: DeltaInput) -> Array:
    group = inputs.v.shape[1] // inputs.k.shape[1]

    def one(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, log_decay, beta = token
        q, k = (jnp.repeat(a, group, axis=0) for a in (q, k))
        state = state * jnp.exp(log_decay)[:, None, None]
        wrong = v - jnp.sum(state * k[:, :, None], axis=1)
        state = state + k[:, :, None] * (wrong * beta[:, None])[:, None, :]
        return state, jnp.sum(state * q[:, :, None], axis=1)

    state = jnp.zeros((inputs.v.shape[1], inputs.k.shape[2], inputs.v.shape[2]))
    tokens = (inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.beta)
    per_token = tuple(a.astype(jnp.float32) for a in tokens)
    return jax.lax.scan(one, state, per_token)[1].astype(inputs.v.dtype)


def _expanded(config: ModelConfig, brought: AttentionInput, row: Array) -> tuple[Array, Array]:
    """Each head's keys and values [tokens, q_heads, ...] from what the cache keeps, [tokens, row_dim]."""
    assert config.latent is not None and brought.up is not None
    latent, rotary = row[:, : config.latent.kv_rank], row[:, config.latent.kv_rank :]
    with jax.default_matmul_precision("highest"):
        k = jnp.einsum("tr,hrn->thn", latent, brought.up[0])
        v = jnp.einsum("tr,hrv->thv", latent, brought.up[1])
    rotary = jnp.broadcast_to(rotary[:, None], (*k.shape[:2], rotary.shape[1]))
    return jnp.concatenate([k, rotary], axis=-1), v


def _attend(config: ModelConfig, layer: LayerSpec, q: Array, k: Array, v: Array, sinks: Array | None) -> Array:
    k, v = (jnp.repeat(a, config.q_per_kv, axis=1).astype(jnp.float32) for a in (k, v))
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("qhd,khd->hqk", q.astype(jnp.float32), k) * config.attention_scale
        if config.attention_softcap is not None:
            scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
        position = jnp.arange(q.shape[0])
        distance = position[:, None] - position[None, :]
        window = layer.window
        seen = (distance >= 0) & (distance < (window or q.shape[0]))
        scores = jnp.where(seen[None], scores, -jnp.inf)
        if sinks is not None:
            beside = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
            scores = jnp.concatenate([scores, beside], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[:, :, : k.shape[0]]
        return jnp.einsum("hqk,khd->qhd", weights, v).astype(q.dtype)
