"""One decoder for every family, driven by `ModelConfig` and its per-layer `LayerSpec`s.

Works on a flat token axis and knows nothing about sequences, pages or batches: `attend`
is handed in, and decides what each token sees and what is kept for later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import LayerSpec, ModelConfig
from engine.model.layers import Params, add_rms_norm, gated_mlp, linear, rms_norm, rope_cos_sin, softcap
from engine.model.mixers import MIXERS, Attend, Rotation
from engine.model.moe import expert_mlps
from engine.model.params import mlp_block
from engine.model.place import ALONE, Place
from pallas_kernels.matmul import matmul
from pallas_kernels.quantized_matmul import quantized_matmul


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    caches: Sequence[Any],
    view: Any,
    attend: Attend,
    place: Place,
) -> tuple[Array, tuple[Any, ...], tuple[Array, ...]]:
    """Last hidden states [tokens, embed] before the final norm, the layers' new caches, and the experts that each
    token chose in every layer that has some, int32 [tokens, per_token].

    tokens, positions: int32 [tokens]. params: see `engine.model.params`. caches: one a layer.
    config, params and caches are one device's share of them, see `local_model`.
    """
    x = embedded(config, params, tokens, place)
    return through_layers(config, params, x, positions, caches, view, attend, place)


def embedded(config: ModelConfig, params: Params, tokens: Array, place: Place) -> Array:
    """[tokens, embed], what enters the first layer."""
    x = _embed(place.at("embed"), params["embed"], tokens, config.hidden_size)
    return x * jnp.asarray(config.embedding_multiplier, x.dtype)


def through_layers(
    config: ModelConfig,
    params: Params,
    x: Array,
    positions: Array,
    caches: Sequence[Any],
    view: Any,
    attend: Attend,
    place: Place,
) -> tuple[Array, tuple[Any, ...], tuple[Array, ...]]:
    """As `hidden_states`, from what enters the first layer."""
    ropes = {spec.rope: rope_cos_sin(spec.rope, positions) for spec in config.layers if spec.rope}
    added, new, chosen = None, [], []
    for i, spec in enumerate(config.layers):
        rope = ropes[spec.rope] if spec.rope else None
        here, weights = place.at(f"layers.{i}"), layer_params(params, i)
        x, added, cache, experts = _layer(config, spec, attend, here, weights, x, added, rope, view, caches[i])
        new.append(cache)
        chosen += experts
    return x if added is None else x + added, tuple(new), tuple(chosen)


# Equal layers are traced and lowered once: a program of 80 layers is built as fast as one of two.
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _layer(
    config: ModelConfig,
    spec: LayerSpec,
    attend: Attend,
    place: Place,
    weights: Params,
    x: Array,
    added: Array | None,
    rope: Rotation,
    view: Any,
    cache: Any,
) -> tuple[Array, Array, Any, list[Array]]:
    """What enters is x + `added`; what leaves is the sum of the first two results, which the next layer adds with its
    norm."""
    x, hidden = _normed(config, place, x, added, weights.get("attn_norm"))
    see = partial(attend, config, spec, view, cache)
    hidden, cache = MIXERS[spec.mixer](config, place, hidden, weights, rope, see)
    added = _residual(config, place, hidden, weights.get("attn_post_norm"))
    if spec.ffn == "none":
        return x, added, cache, []
    x, hidden = _normed(config, place, x, added, weights.get("mlp_norm"))
    hidden, chosen = FFNS[spec.ffn](config, place, hidden, weights)
    return x, _residual(config, place, hidden, weights.get("mlp_post_norm")), cache, chosen


def _embed(place: Place, table: Array, tokens: Array, width: int) -> Array:
    """[tokens, width], which are the first columns; of a table that is cut, each device has some tokens' rows."""
    if not place.shards.axes("vocab"):
        return table[tokens][:, :width]
    mine = tokens - place.index("vocab") * table.shape[0]
    has = (mine >= 0) & (mine < table.shape[0])
    return place.sum(jnp.where(has[:, None], table[jnp.where(has, mine, 0)][:, :width], 0), "vocab")


def logits(config: ModelConfig, params: Params, hidden: Array, place: Place = ALONE) -> Array:
    """float32 [rows, vocab] from hidden states [rows, embed]."""
    hidden = rms_norm(hidden, params["final_norm"], config.norm_eps, place)
    if "packed_head" in params:
        name = "packed_head"
        out = quantized_matmul(hidden, params[name], target=place.target, dtype=jnp.float32)
    else:
        name = "embed" if config.tie_embeddings else "lm_head"
        hidden = jnp.pad(hidden, ((0, 0), (0, params[name].shape[1] - hidden.shape[1])))  # see `ParamSpec.by_rows`
        out = matmul(hidden, params[name], target=place.target, transposed=True)
    out = place.at(name).gather(out, "vocab")
    return softcap(out * config.logits_multiplier, config.final_softcap)


def layer_params(params: Params, layer: int) -> Params:
    """The weights of one layer under their short names."""
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): array for name, array in params.items() if name.startswith(prefix)}


def _normed(
    config: ModelConfig, place: Place, x: Array, added: Array | None, weight: Array | None
) -> tuple[Array, Array]:
    """x + `added`, and what of it enters a mixer or MLP: its norm, or without a weight itself."""
    if weight is None:
        x = x if added is None else x + added
        return x, x
    if added is None:
        return x, rms_norm(x, weight, config.norm_eps, place)
    return add_rms_norm(x, added, weight, config.norm_eps, place)


def _residual(config: ModelConfig, place: Place, hidden: Array, post_norm: Array | None) -> Array:
    """What a mixer's or MLP's result adds to x."""
    if post_norm is not None:
        hidden = rms_norm(hidden, post_norm, config.norm_eps, place)
    return hidden * jnp.asarray(config.residual_multiplier, hidden.dtype)


def _gated(config: ModelConfig, place: Place, x: Array, weights: Params) -> tuple[Array, list[Array]]:
    return gated_mlp(x, weights, config.activation, mlp_block(config.intermediate_size), place), []


def _experts(config: ModelConfig, place: Place, x: Array, weights: Params) -> tuple[Array, list[Array]]:
    """The token's experts, and the shared one if there is one; which they were."""
    if config.experts is None:
        raise ValueError("the config has no experts")
    out, chosen = expert_mlps(config.experts, config.activation, x, weights, place)
    if not config.experts.shared_size:
        return out, [chosen]
    shared = {"gate_up": weights["shared_gate_up"], "down": weights["shared_down"]}
    every = gated_mlp(x, shared, config.activation, mlp_block(config.experts.shared_size), place)
    if config.experts.shared_gate:
        gate = jax.nn.sigmoid(linear(x, weights["shared_gate"], place.target).astype(jnp.float32))
        every = (every.astype(jnp.float32) * gate).astype(x.dtype)
    return out + every, [chosen]


FFNS = {"gated": _gated, "experts": _experts}
