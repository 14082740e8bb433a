"""Families whose layers, all or some, remember a state of one size: Mamba 2, Granite 4 hybrids, Qwen3-Next."""

from __future__ import annotations

import math
from typing import Any

from engine.model.config import DeltaRule, Experts, LayerSpec, ModelConfig, StateSpace
from engine.model.families.common import attention_bias, dims_of, gate_activation, granite_multipliers, layer_count
from engine.model.families.keys import Keys
from engine.model.families.moe import GRANITE_DEFAULTS, QWEN3_DEFAULTS, shared_expert, skip_losses, with_experts

# Nothing in a state-space model has a longest context, and no key names one: what block tables can well hold.
CONTEXT = 131_072
MAMBA2_DEFAULTS: dict[str, Any] = {
    "num_heads": 128, "head_dim": 64, "hidden_size": 4096, "state_size": 128, "n_groups": 8, "expand": 2,
    "conv_kernel": 4, "num_hidden_layers": 64, "use_conv_bias": True, "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
GRANITE_HYBRID_DEFAULTS: dict[str, Any] = GRANITE_DEFAULTS | {
    "shared_intermediate_size": 1024, "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True,
}  # fmt: skip
QWEN3_NEXT_DEFAULTS: dict[str, Any] = QWEN3_DEFAULTS | {
    "head_dim": 256, "num_key_value_heads": 2, "num_experts": 512, "num_experts_per_tok": 10,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "norm_topk_prob": True,
    "partial_rotary_factor": 0.25, "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
_RECURRENT, _ATTENTION = ("linear_attention", "mamba"), ("full_attention", "attention")  # new and old names


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


def granite_hybrid(keys: Keys) -> ModelConfig:
    dims = dims_of(keys) | granite_multipliers(keys)
    skip_losses(keys)
    for key in ("mamba_chunk_size", "init_method"):
        keys.value(key)
    keys.choice("normalization_function", {"rmsnorm": "rmsnorm"}, "rmsnorm")
    shared, hidden = keys.count("shared_intermediate_size"), dims["hidden_size"]
    experts = None
    if keys.value("num_local_experts") == 0:
        keys.value("num_experts_per_tok")
        dims["intermediate_size"] = shared
    else:
        experts = Experts(
            num_experts=keys.count("num_local_experts"),
            per_token=keys.count("num_experts_per_tok"),
            intermediate_size=dims["intermediate_size"],
            shared_size=shared,
        )
    heads = keys.count("mamba_n_heads")
    width = keys.value("mamba_d_head")
    space = StateSpace(
        num_heads=heads,
        head_dim=keys.count("mamba_expand") * hidden // heads
        if width in (None, "auto")
        else keys.count("mamba_d_head"),
        state_dim=keys.count("mamba_d_state"),
        groups=keys.count("mamba_n_groups"),
        conv_width=keys.count("mamba_d_conv"),
        conv_bias=keys.flag("mamba_conv_bias"),
        bias=keys.flag("mamba_proj_bias"),
        **step_limits(keys),
    )
    check_inner(keys, space, "mamba_expand", hidden)
    rope = keys.rope(dims["head_dim"])
    if keys.choice("position_embedding_type", {"rope": "rope", "nope": "nope"}, "nope") == "nope":
        rope = None
    ffn = "gated" if experts is None else "experts"
    attention, recurrent = LayerSpec(rope, ffn=ffn), LayerSpec(None, mixer="mamba2", ffn=ffn)
    kinds = _kinds(keys, keys.spelling("layer_types", "layers_block_type")) or [True] * layer_count(keys)
    return ModelConfig(
        family="granitemoehybrid",
        layers=tuple(recurrent if recurs else attention for recurs in kinds),
        activation=gate_activation(keys),
        experts=experts,
        state_space=space if any(kinds) else None,
        **attention_bias(keys),
        **dims,
    )


def qwen3_next(keys: Keys) -> ModelConfig:
    """Qwen3-Next: gated delta nets, and in every fourth layer attention with a gate and a rope of a quarter."""
    dims, num_layers = dims_of(keys), layer_count(keys)
    rule = DeltaRule(
        key_heads=keys.count("linear_num_key_heads"),
        value_heads=keys.count("linear_num_value_heads"),
        key_dim=keys.count("linear_key_head_dim"),
        value_dim=keys.count("linear_value_head_dim"),
        conv_width=keys.count("linear_conv_kernel_dim"),
    )
    keys.neutral("attention_bias", False)
    for key in ("use_sliding_window", "sliding_window", "max_window_layers"):
        keys.neutral(key, QWEN3_NEXT_DEFAULTS.get(key, False))
    attention = LayerSpec(keys.rope(dims["head_dim"], partial=True))
    interval = keys.count("full_attention_interval")
    kinds = _kinds(keys, "layer_types") or [(i + 1) % interval != 0 for i in range(num_layers)]
    recurrent = LayerSpec(None, mixer="gated_delta")
    return ModelConfig(
        family="qwen3_next",
        activation=gate_activation(keys),
        qk_norm="head",
        attention_gate=True,
        delta_rule=rule if any(kinds) else None,
        **with_experts(keys, tuple(recurrent if recurs else attention for recurs in kinds), shared_expert(keys)),
        **dims,
    )


def _kinds(keys: Keys, key: str) -> list[bool] | None:
    """Whether each layer is recurrent; None when the config does not say."""
    kinds = keys.per_layer(key, layer_count(keys), (*_RECURRENT, *_ATTENTION))
    return None if kinds is None else [kind in _RECURRENT for kind in kinds]


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
