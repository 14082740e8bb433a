"""Families whose layers, all or some, remember a state of one size: Mamba 2."""

from __future__ import annotations

import math
from typing import Any

from engine.model.config import LayerSpec, ModelConfig, StateSpace
from engine.model.families.common import gate_activation, layer_count
from engine.model.families.keys import Keys

# Nothing in a state-space model has a longest context, and no key names one: what block tables can well hold.
_CONTEXT = 131_072
MAMBA2_DEFAULTS: dict[str, Any] = {
    "num_heads": 128, "head_dim": 64, "hidden_size": 4096, "state_size": 128, "n_groups": 8, "expand": 2,
    "conv_kernel": 4, "num_hidden_layers": 64, "use_conv_bias": True, "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": _CONTEXT,
}  # fmt: skip


def mamba2(keys: Keys) -> ModelConfig:
    # Of training, and the block that transformers computes in; a residual in float32 is only that.
    for key in ("time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual",
                "chunk_size", "residual_in_fp32"):  # fmt: skip
        keys.value(key)
    hidden = keys.count("hidden_size")
    space = StateSpace(
        num_heads=keys.count("num_heads"),
        head_dim=keys.count("head_dim"),
        state_dim=keys.count("state_size"),
        groups=keys.count("n_groups"),
        conv_width=keys.count("conv_kernel"),
        conv_bias=keys.flag("use_conv_bias"),
        bias=keys.flag("use_bias"),
        **step_limits(keys),
    )
    check_inner(keys, space, "expand", hidden)
    return ModelConfig(
        family="mamba2",
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=space.inner_dim,
        num_q_heads=space.num_heads,
        num_kv_heads=space.num_heads,
        head_dim=space.head_dim,
        layers=(LayerSpec(None, mixer="mamba2", ffn="none"),) * layer_count(keys),
        max_position=keys.max_position,
        activation=gate_activation(keys),
        norm_eps=keys.positive("layer_norm_epsilon"),
        tie_embeddings=keys.flag("tie_word_embeddings"),
        state_space=space,
    )


def check_inner(keys: Keys, space: StateSpace, expand: str, hidden: int) -> None:
    """The heads' width is told twice."""
    if keys.positive(expand) * hidden != space.inner_dim:
        raise keys.wrong(expand, f"times {hidden} is not {space.num_heads} heads of {space.head_dim}")


def step_limits(keys: Keys) -> dict[str, float]:
    """Bounds of a time step; infinity is a bare word of JSON or, from transformers 5, {"__float__": "Infinity"}."""
    value = keys.value("time_step_limit")
    if value is None:
        return {}
    words = value if isinstance(value, list) else []
    limits = [math.inf if word == {"__float__": "Infinity"} else word for word in words]
    if [type(limit) in (int, float) for limit in limits] != [True, True] or not 0 <= limits[0] <= limits[1]:
        raise keys.wrong("time_step_limit", "must be two ascending numbers")
    return {"least_step": float(limits[0]), "most_step": float(limits[1])}
