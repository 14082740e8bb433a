"""The likeliest token: the public function, its checks, and the choice of implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.choice import Choice, Implementation, choose, never
from pallas_kernels.greedy import cpu, reference
from pallas_kernels.greedy.spec import GreedySpec
from pallas_kernels.target import Target

CANDIDATES: tuple[Implementation[GreedySpec], ...] = (
    Implementation("cpu", cpu.declines, cpu.run),
    Implementation("reference", never, reference.run),
)


def choice(spec: GreedySpec, target: Target) -> Choice[GreedySpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    return choose("greedy", CANDIDATES, spec, target)


def greedy(logits: Array, *, target: Target, num_devices: int = 1) -> tuple[Array, Array]:
    """(int32 [rows], the first of a row's highest; bool [rows], whether one is not finite) of float32 [rows, vocab].

    A row where one is not has some token. num_devices: that share the model.
    """
    if logits.ndim != 2 or logits.dtype != jnp.float32:
        raise ValueError(f"logits are {logits.dtype} {logits.shape}; float32 [rows, vocab] are wanted")
    return choice(GreedySpec(num_devices), target).implementation.run(logits, target)
