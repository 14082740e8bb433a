"""Rotary position embedding (arXiv 2104.09864): the public function, its checks, and the choice of implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.choice import Choice, Implementation, choose, never
from pallas_kernels.rope import cpu, reference
from pallas_kernels.rope.spec import RopeSpec
from pallas_kernels.target import Target

CANDIDATES: tuple[Implementation[RopeSpec], ...] = (
    Implementation("cpu", cpu.declines, cpu.run),
    Implementation("reference", never, reference.run),
)


def choice(spec: RopeSpec, target: Target) -> Choice[RopeSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    return choose("rope", CANDIDATES, spec, target)


def split_rotated(
    qkv: Array, cos: Array, sin: Array, *, target: Target, num_devices: int = 1
) -> tuple[Array, Array, Array]:
    """(q [tokens, kv_heads * group, head_dim], k, v [tokens, kv_heads, head_dim]), q and k rotated.

    qkv: [tokens, kv_heads, group + 2, head_dim], of each KV head its queries, its key and its value. cos, sin: float32
    [tokens, rotated], each half the same; head_dim's numbers behind `rotated` stay. Computed in float32, rounded once.
    num_devices: that share the model.
    """
    if qkv.ndim != 4 or qkv.shape[2] < 3:
        raise ValueError(f"qkv {qkv.shape} is not [tokens, kv_heads, group + 2, head_dim]")
    rotated = cos.shape[-1]
    if cos.shape != (qkv.shape[0], rotated) or sin.shape != cos.shape or rotated % 2 or rotated > qkv.shape[3]:
        raise ValueError(f"cos {cos.shape} and sin {sin.shape} do not fit qkv {qkv.shape}")
    if cos.dtype != jnp.float32 or sin.dtype != jnp.float32:
        raise ValueError(f"cos is {cos.dtype}, sin {sin.dtype}; float32 is wanted")
    spec = RopeSpec(qkv.shape[3], rotated, str(qkv.dtype), num_devices)
    return choice(spec, target).implementation.run(qkv, cos, sin, target)
