"""GGUF metadata of families whose layers, all or some, remember a state of one size, in Hugging Face's words."""

from __future__ import annotations

from typing import Any

from engine.model.families.recurrent import CONTEXT
from engine.model.weights.gguf_metadata import Metadata


def mamba2(meta: Metadata) -> dict[str, Any]:
    """The context that files name is arbitrary, so it is not read."""
    embedding = meta.file.tensors.get("token_embd.weight")
    if embedding is None:
        raise meta.file.fail("tensor 'token_embd.weight' is missing")
    heads, inner, hidden = _inner(meta)
    meta.value("context_length")
    for key in ("feed_forward_length", "attention.head_count"):
        if meta.number(key, 0):
            raise meta.file.fail(f"{meta.arch}.{key} must be 0")
    return {
        "model_type": "mamba2",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": meta.num_layers,
        "num_heads": heads,
        "head_dim": inner // heads,
        "state_size": meta.number("ssm.state_size"),
        "n_groups": meta.number("ssm.group_count"),
        "conv_kernel": meta.number("ssm.conv_kernel"),
        "expand": inner / hidden,
        "use_conv_bias": meta.has("blk.0.ssm_conv1d.bias"),
        "use_bias": meta.has("blk.0.ssm_in.bias"),
        "layer_norm_epsilon": meta.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not meta.has("output.weight"),
    }


def granite_hybrid(meta: Metadata) -> dict[str, Any]:
    """Beside what every Granite has; a layer recurs that has no keys and values."""
    kv_heads, layers = meta.value("attention.head_count_kv"), range(meta.num_layers)
    recurs = [kv_heads[i] == 0 for i in layers] if isinstance(kv_heads, list) else [kv_heads == 0 for i in layers]
    heads, inner, hidden = _inner(meta)
    experts, shared = meta.number("expert_count", 0), meta.value("expert_shared_feed_forward_length")
    return {
        "model_type": "granitemoehybrid",
        "layers_block_type": ["mamba" if recurs[i] else "attention" for i in layers],
        "max_position_embeddings": min(meta.number("context_length"), CONTEXT),
        "position_embedding_type": "rope" if meta.value("rope.scaling.finetuned", True) else "nope",
        "num_local_experts": experts,
        "num_experts_per_tok": meta.number("expert_used_count", 0),
        "shared_intermediate_size": shared if experts else meta.number("feed_forward_length"),
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_d_state": meta.number("ssm.state_size"),
        "mamba_n_groups": meta.number("ssm.group_count"),
        "mamba_d_conv": meta.number("ssm.conv_kernel"),
        "mamba_expand": inner / hidden,
        "mamba_conv_bias": any(meta.has(f"blk.{i}.ssm_conv1d.bias") for i in layers),
        "mamba_proj_bias": any(meta.has(f"blk.{i}.ssm_in.bias") for i in layers),
    }


def qwen3_next(meta: Metadata) -> dict[str, Any]:
    """Beside what Qwen's experts have."""
    recurs, interval = meta.value("attention.recurrent_layers"), meta.number("full_attention_interval", 4)
    if recurs is None:
        recurs = [(i + 1) % interval != 0 for i in range(meta.num_layers)]
    if not isinstance(recurs, list) or len(recurs) < meta.num_layers:
        raise meta.file.fail(f"{meta.arch}.attention.recurrent_layers must have an entry for each layer")
    heads, inner, _ = _inner(meta)
    return {
        "model_type": "qwen3_next",
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": meta.number("expert_shared_feed_forward_length"),
        "layer_types": ["linear_attention" if recurs[i] else "full_attention" for i in range(meta.num_layers)],
        "linear_num_key_heads": meta.number("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": meta.number("ssm.state_size"),
        "linear_value_head_dim": inner // heads,
        "linear_conv_kernel_dim": meta.number("ssm.conv_kernel"),
    }


def _inner(meta: Metadata) -> tuple[int, int, int]:
    """Heads of the recurrence, their width together, and the hidden size."""
    heads, inner, hidden = (meta.number(k) for k in ("ssm.time_step_rank", "ssm.inner_size", "embedding_length"))
    if min(heads, inner, hidden) < 1 or inner % heads:
        raise meta.file.fail(
            f"{meta.arch}.ssm.inner_size {inner} does not divide into ssm.time_step_rank {heads} heads"
        )
    return heads, inner, hidden
