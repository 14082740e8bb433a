"""DeepSeek-V2 and V3: latent attention, dense first layers, experts behind group-limited routing."""

from __future__ import annotations

import math
from typing import Any

from engine.model.config import Experts, Latent, LayerSpec, ModelConfig
from engine.model.families.common import dims_of, gate_activation, layer_count
from engine.model.families.keys import Keys

_DEFAULTS: dict[str, Any] = {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "moe_layer_freq": 1,
}  # fmt: skip
DEEPSEEK_V2_DEFAULTS = _DEFAULTS | {
    "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0, "topk_method": "greedy", "scoring_func": "softmax", "max_position_embeddings": 2048,
}  # fmt: skip
DEEPSEEK_V3_DEFAULTS = _DEFAULTS | {
    "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048, "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 8, "topk_group": 4,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "rope_interleave": True, "max_position_embeddings": 4096,
}  # fmt: skip


def deepseek_v2(keys: Keys) -> ModelConfig:
    """Softmax scores; of a group counts its best expert. transformers never normalizes them, so True is refused."""
    keys.neutral("norm_topk_prob", False)
    method = keys.choice("topk_method", {"greedy": "", "group_limited_greedy": "groups"}, "greedy")
    keys.choice("scoring_func", {"softmax": ""}, "softmax")
    groups = _groups(keys, best=1) if method else {}
    for key in ("n_group", "topk_group"):
        keys.value(key)
    return _deepseek("deepseek_v2", keys, interleaved=True, normalize=False, **groups)


def deepseek_v3(keys: Keys) -> ModelConfig:
    """Sigmoid scores with a correction for the choice; of a group count its two best experts."""
    keys.choice("topk_method", {"noaux_tc": ""}, "noaux_tc")
    keys.choice("scoring_func", {"sigmoid": ""}, "sigmoid")
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):  # a layer for speculation, which is not read
        keys.value(key)
    return _deepseek(
        "deepseek_v3",
        keys,
        interleaved=keys.flag("rope_interleave"),
        normalize=keys.flag("norm_topk_prob"),
        scoring="sigmoid",
        correction=True,
        **_groups(keys, best=2),
    )


def _groups(keys: Keys, best: int) -> dict[str, int]:
    return {"groups": keys.count("n_group"), "groups_kept": keys.count("topk_group"), "group_best": best}


def _deepseek(family: str, keys: Keys, *, interleaved: bool, **routing: Any) -> ModelConfig:
    for key in ("router_aux_loss_coef", "output_router_logits", "aux_loss_alpha", "seq_aux", "ep_size", "head_dim",
                "qk_head_dim"):  # fmt: skip
        keys.value(key)
    for key in ("attention_bias", "mlp_bias"):
        keys.neutral(key, False)
    keys.neutral("moe_layer_freq", 1)
    latent = Latent(
        kv_rank=keys.count("kv_lora_rank"),
        nope_dim=keys.count("qk_nope_head_dim"),
        rope_dim=keys.count("qk_rope_head_dim"),
        value_dim=keys.count("v_head_dim"),
        q_rank=keys.optional_count("q_lora_rank"),
        interleaved=interleaved,
    )
    size = keys.count("moe_intermediate_size")
    experts = Experts(
        num_experts=keys.count(keys.spelling("n_routed_experts", "num_local_experts")),
        per_token=keys.count("num_experts_per_tok"),
        intermediate_size=size,
        scale=keys.number("routed_scaling_factor"),
        shared_size=size * keys.count("n_shared_experts"),
        **routing,
    )
    head_dim, num_layers = latent.nope_dim + latent.rope_dim, layer_count(keys)
    dense = keys.value("first_k_dense_replace")
    if isinstance(dense, bool) or not isinstance(dense, int) or dense < 0:
        raise keys.wrong("first_k_dense_replace", "must be an integer >= 0")
    rope = keys.rope(latent.rope_dim)
    dims = dims_of(keys)
    return ModelConfig(
        family=family,
        layers=tuple(
            LayerSpec(rope, mixer="latent", ffn="gated" if i < dense else "experts") for i in range(num_layers)
        ),
        activation=gate_activation(keys),
        experts=experts,
        latent=latent,
        **dims
        | {
            "num_kv_heads": dims["num_q_heads"],
            "head_dim": head_dim,
            "attention_scale": head_dim**-0.5 * _yarn_scale(keys) ** 2,
        },
    )


def _yarn_scale(keys: Keys) -> float:
    """What YaRN with mscale_all_dim multiplies queries and keys by, beside what it does to cos and sin."""
    fields, where = keys.rope_fields()
    rope_type = fields.get("rope_type", fields.get("type", "default"))
    mscale, factor = fields.get("mscale_all_dim"), fields.get("factor")
    if rope_type == "default" or not mscale:
        return 1.0
    if isinstance(mscale, bool) or not isinstance(mscale, int | float) or not isinstance(factor, int | float):
        raise keys.wrong(where.removeprefix("config.json: "), "needs numbers for factor and mscale_all_dim")
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
