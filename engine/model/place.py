"""Where a step program runs, static: the chip that its ops are compiled for, and what is cut over which devices."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.errors import InvalidParam
from engine.model.config import LayerSpec, ModelConfig
from pallas_kernels.paged_attention.part import Part
from pallas_kernels.quantized import Quantized
from pallas_kernels.target import CPU, Target
from sharding.params import ParamSpec
from sharding.shards import WHOLE, Shards


@dataclass(frozen=True)
class Place:
    """Model code names logical axes; where nothing is cut, all of this is the identity."""

    target: Target
    shards: Shards = WHOLE

    def at(self, scope: str) -> Place:
        """As it is for the parameters of a scope (see `sharding.shards.scope_of`)."""
        return replace(self, shards=self.shards.at(scope))

    def count(self, logical: str) -> int:
        """Parts that the logical axis is in."""
        return self.shards.count(logical)

    def index(self, logical: str) -> Array | int:
        """Which part this device has, int32."""
        axes = self.shards.axes(logical)
        return jax.lax.axis_index(axes) if axes else 0

    def sum(self, x: Array, *logical: str) -> Array:
        """Over all parts: each device multiplied by its own rows of a weight that is cut there.

        Where the parts are those of several groups of requests (`all_tokens`), each gets its own tokens back.
        """
        groups, axes = self.shards.group_axes(*logical), self.shards.other_axes(*logical)
        x = jax.lax.psum(x, axes) if axes else x
        return jax.lax.psum_scatter(x, groups, scatter_dimension=0, tiled=True) if groups else x

    def all_tokens(self, x: Array, *logical: str) -> Array:
        """Those of all groups of requests [tokens, ...] where a weight is cut over them."""
        groups = self.shards.group_axes(*logical)
        return jax.lax.all_gather(x, groups, axis=0, tiled=True) if groups else x

    def own_tokens(self, x: Array, *logical: str) -> Array:
        """This group's part of what was computed of `all_tokens`, everywhere alike."""
        groups = self.shards.group_axes(*logical)
        if not groups:
            return x
        size = x.shape[0] // self.shards.parts(groups)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(groups) * size, size)

    @property
    def part(self) -> Part | None:
        """What this device has of every page; None: all of it."""
        count = self.count("sequence")
        return Part(jnp.int32(self.index("sequence")), count) if count > 1 else None

    def merged(self, values: Array, lse: Array) -> Array:
        """float32 attention over all keys, from that over each device's part of the pages.

        values [..., dim], and the log-sum-exp of their scores [...] (arXiv 2205.14135, section 3.1; 2310.01889):
        the parts' numerators and denominators are added up on the scale of the highest.
        """
        axes = self.shards.axes("sequence")
        weight = jnp.exp(lse - jax.lax.pmax(lse, axes))
        values, weight = jax.lax.psum((values * weight[..., None], weight), axes)
        return values / weight[..., None]

    def total(self, x: Array) -> Array:
        """Over all groups of requests."""
        groups = self.shards.axes("requests")
        return jax.lax.psum(x, groups) if groups else x

    def any(self, x: Array) -> Array:
        """Whether it holds anywhere in any group: those that compute together must go on together."""
        return self.total(jnp.any(x).astype(jnp.int32)) > 0

    def gather(self, x: Array, logical: str) -> Array:
        """The whole last dimension, of which each device has a part."""
        axes = self.shards.axes(logical)
        return jax.lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True) if axes else x


ALONE = Place(CPU)


_COPIED = ("qkv", "qkv_bias", "k_norm")  # what holds something of a key or a value


def replicated(model: ModelConfig, shards: Shards) -> ModelConfig:
    """The model with as many KV heads as there are parts of them: copies share the query heads of the one they copy.

    Raises InvalidParam where those do not divide.
    """
    copies = shards.num_copies("kv_heads")
    if model.q_per_kv % copies:
        raise InvalidParam(
            "sharding", f"a KV head has {model.q_per_kv} query heads, which do not divide over its {copies} copies"
        )
    return replace(model, num_kv_heads=model.num_kv_heads * copies)


def with_copies(name: str, spec: ParamSpec, array: np.ndarray | Quantized, copies: int) -> Any:
    """A host array of `spec` as the `replicated` model has it; all that is not a key's or a value's stays in order."""
    short = name.split(".")[-1]
    if copies == 1 or short not in _COPIED or "kv_heads" not in spec.axes:
        return array
    at = spec.axes.index("kv_heads")

    def copied(leaf: np.ndarray) -> np.ndarray:
        if short == "k_norm":
            return np.repeat(leaf, copies, axis=at)
        *lead, kv_heads, group, head_dim = leaf.shape
        queries = leaf[..., :-2, :].reshape(*lead, kv_heads * copies, (group - 2) // copies, head_dim)
        return np.concatenate([queries, np.repeat(leaf[..., -2:, :], copies, axis=at)], axis=-2)

    return jax.tree.map(copied, array)


def without_copies(name: str, spec: ParamSpec, served: ParamSpec, array: Any, copies: int) -> Any:
    """The inverse of `with_copies`: host arrays as the devices hold `served`, as those of `spec`."""
    if name.split(".")[-1] not in _COPIED:
        return array
    if copies == 1:
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *spec.shape[1:]), array)
    at = spec.axes.index("kv_heads")

    def once(leaf: np.ndarray) -> np.ndarray:
        leaf = leaf.reshape(-1, *served.shape[1:]) if at else leaf.reshape(served.shape)
        firsts = leaf.take(range(0, served.shape[at], copies), axis=at)
        if name.endswith("k_norm"):
            return firsts
        queries = leaf[..., :-2, :].reshape(*firsts.shape[:-2], spec.shape[-2] - 2, spec.shape[-1])
        return np.concatenate([queries, firsts[..., -2:, :]], axis=-2)

    return jax.tree.map(once, array)


def stage_of(name: str, model: ModelConfig, shards: Shards) -> tuple[int, str]:
    """The stage that a parameter of the model belongs to, and its name there; 0 and its own outside of the layers."""
    if not name.startswith("layers."):
        return 0, name
    _, layer, short = name.split(".", 2)
    stage, layer = divmod(int(layer), model.num_layers // shards.count("layers"))
    return stage, f"layers.{layer}.{short}"


def one_stage(model: ModelConfig, shards: Shards) -> ModelConfig:
    """The model with the layers of one stage: all are alike. Raises InvalidParam where they are not."""
    stages, layers = shards.count("layers"), model.layers
    if stages == 1:
        return model
    size, rest = divmod(len(layers), stages)
    if rest:
        raise InvalidParam("sharding", f"{len(layers)} layers do not divide into {stages} stages")
    other = next((i for i, layer in enumerate(layers) if layer != layers[i % size]), None)
    if other is not None:
        raise InvalidParam("sharding", f"stages of {size} layers must be alike, but layer {other} is not as layer "
                           f"{other % size}: {_difference(layers[other], layers[other % size])}")  # fmt: skip
    return replace(model, layers=layers[:size])


def _difference(one: LayerSpec, other: LayerSpec) -> str:
    return ", ".join(f"{f.name} {getattr(one, f.name)} and {getattr(other, f.name)}"[:80] for f in fields(one)
                     if getattr(one, f.name) != getattr(other, f.name))  # fmt: skip


def served_model(model: ModelConfig, shards: Shards) -> ModelConfig:
    """The model as the devices of a stage hold it together: its layers, a KV head as often as it is asked for."""
    return one_stage(replicated(model, shards), shards)


def local_model(model: ModelConfig, shards: Shards) -> ModelConfig:
    """The model as one device sees it: its stage's layers, its share of the heads and of the MLPs. Experts are counted
    by all."""
    model = served_model(model, shards)
    kind = "kv_heads" if model.latent is None else "q_heads"
    heads, mlp = shards.count(kind), shards.count("mlp")
    experts = model.experts and replace(
        model.experts,
        intermediate_size=model.experts.intermediate_size // shards.count("expert_mlp"),
        shared_size=model.experts.shared_size // mlp,
    )
    return replace(
        model,
        num_q_heads=model.num_q_heads // heads,
        num_kv_heads=model.num_kv_heads // heads,
        intermediate_size=model.intermediate_size // mlp,
        experts=experts,
    )
