"""Every weight of the decoder, declared once.

The tree is a flat dict: path -> ParamSpec. Layer weights are "layers.{i}.{name}".
Norm weights are float32 and are stored as what multiplies (Gemma's 1 + w is folded at load).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from engine.model.config import LayerSpec, ModelConfig
from sharding.params import ParamSpec

LANES = 128  # of a TPU's vector registers


def param_specs(config: ModelConfig, dtype: np.dtype, packed_head: bool = False) -> dict[str, ParamSpec]:
    """All parameters of `config`, in the order of computation.

    qkv is grouped by KV head so that it is cut along kv_heads alone:
    [embed, kv_heads, q_per_kv + 2, head_dim] holds, per KV head, its query heads, key, value.
    Query head h belongs to KV head h // q_per_kv. gate_up is [embed, mlp_blocks, 2, block]: gate
    and up in turns of a lane tile, so that it is cut along mlp alone.
    embed and lm_head are [vocab, embed]; lm_head exists only when not tied. packed_head is the same [embed, vocab],
    made while loading from whichever of the two it is, to be packed.
    """
    dtype = jnp.dtype(dtype)
    hidden, vocab = config.hidden_size, config.vocab_size
    specs = {"embed": ParamSpec((vocab, hidden), dtype, ("vocab", "embed"), fan_in=hidden, by_rows=True)}
    for i in range(config.num_layers):
        for name, spec in _layer_specs(config, config.layers[i], dtype).items():
            specs[f"layers.{i}.{name}"] = spec
    specs["final_norm"] = _norm(hidden)
    if packed_head:
        specs["packed_head"] = ParamSpec(
            (hidden, vocab), dtype, ("embed", "vocab"), fan_in=hidden, packable=True, fewest_bits=8
        )
    elif not config.tie_embeddings:
        specs["lm_head"] = specs["embed"]
    return specs


def param_axes(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Of each parameter, its logical axes with their sizes."""
    specs = param_specs(config, jnp.dtype(jnp.float32))
    return {name: {a: size for a, size in zip(spec.axes, spec.shape, strict=True) if a} for name, spec in specs.items()}


def axis_sizes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of each logical axis, the sizes that it has in the weights: what a cut must divide."""
    found: dict[str, set[int]] = {}
    for axes in param_axes(config).values():
        for name, size in axes.items():
            found.setdefault(name, set()).add(size)
    return {name: tuple(sorted(sizes)) for name, sizes in found.items()}


def mlp_block(size: int) -> int:
    """Columns of gate that stand together in gate_up, before as many of up; size: of the MLP."""
    return math.gcd(size, LANES)


def _norm(*shape: int, axes: tuple[str | None, ...] = ("embed",)) -> ParamSpec:
    return ParamSpec(shape, jnp.dtype(jnp.float32), axes, init="ones")


def _layer_specs(config: ModelConfig, layer: LayerSpec, dtype: np.dtype) -> dict[str, ParamSpec]:
    hidden = config.hidden_size
    specs: dict[str, ParamSpec] = {}
    if config.norm_place in ("pre", "sandwich"):
        specs["attn_norm"] = _norm(hidden)
    specs |= _MIXERS[layer.mixer](config, dtype)
    if config.norm_place in ("post", "sandwich"):
        specs["attn_post_norm"] = _norm(hidden)
    if layer.ffn == "none":
        return specs
    if config.norm_place in ("pre", "sandwich"):
        specs["mlp_norm"] = _norm(hidden)
    specs |= _experts(config, dtype) if layer.ffn == "experts" else _mlp(config, dtype)
    if config.norm_place in ("post", "sandwich"):
        specs["mlp_post_norm"] = _norm(hidden)
    return specs


def _attention(config: ModelConfig, dtype: np.dtype) -> dict[str, ParamSpec]:
    hidden, head = config.hidden_size, config.head_dim
    kv, group = config.num_kv_heads, config.q_per_kv
    specs: dict[str, ParamSpec] = {}
    specs["qkv"] = ParamSpec(
        (hidden, kv, group + 2, head),
        dtype,
        ("embed", "kv_heads", None, "head_dim"),
        fan_in=hidden,
        rows=1,
        packable=True,
    )
    if config.qkv_bias:
        specs["qkv_bias"] = ParamSpec((kv, group + 2, head), dtype, ("kv_heads", None, "head_dim"), init="zeros")
    if config.qk_norm == "head":
        specs["q_norm"] = _norm(head, axes=("head_dim",))
        specs["k_norm"] = _norm(head, axes=("head_dim",))
    elif config.qk_norm == "full":
        specs["q_norm"] = _norm(kv, group, head, axes=("kv_heads", None, "head_dim"))
        specs["k_norm"] = _norm(kv, head, axes=("kv_heads", "head_dim"))
    specs["o"] = ParamSpec(
        (kv, group, head, hidden),
        dtype,
        ("kv_heads", None, "head_dim", "embed"),
        fan_in=kv * group * head,
        rows=3,
        packable=True,
    )
    if config.attention_gate:
        specs["attn_gate"] = ParamSpec(
            (hidden, kv, group, head),
            dtype,
            ("embed", "kv_heads", None, "head_dim"),
            fan_in=hidden,
            rows=1,
            packable=True,
        )
    if config.output_bias:
        specs["o_bias"] = ParamSpec((hidden,), dtype, ("embed",), init="zeros")
    if config.attention_sinks:
        specs["sinks"] = ParamSpec((kv, group), jnp.dtype(jnp.float32), ("kv_heads", None), init="zeros")
    return specs


def _latent(config: ModelConfig, dtype: np.dtype) -> dict[str, ParamSpec]:
    """Of multi-head latent attention. k_up and v_up are apart: the absorbed form reads one before, one after."""
    latent, hidden, heads = config.latent, config.hidden_size, config.num_q_heads
    if latent is None:
        raise ValueError("the config has no latent")
    specs: dict[str, ParamSpec] = {}
    q_from = hidden
    if latent.q_rank is not None:
        q_from = latent.q_rank
        specs["q_a"] = ParamSpec((hidden, q_from), dtype, ("embed", None), fan_in=hidden, packable=True)
        specs["q_a_norm"] = _norm(q_from, axes=(None,))
    head = latent.nope_dim + latent.rope_dim
    specs["q"] = ParamSpec(
        (q_from, heads, head), dtype, (None, "q_heads", "head_dim"), fan_in=q_from, rows=1, packable=True
    )
    specs["kv_a"] = ParamSpec((hidden, latent.row_dim), dtype, ("embed", None), fan_in=hidden, packable=True)
    specs["kv_a_norm"] = _norm(latent.kv_rank, axes=(None,))
    for name, dim in (("k_up", latent.nope_dim), ("v_up", latent.value_dim)):
        specs[name] = ParamSpec((heads, latent.kv_rank, dim), dtype, ("q_heads", None, None), fan_in=latent.kv_rank)
    specs["o"] = ParamSpec(
        (heads, latent.value_dim, hidden),
        dtype,
        ("q_heads", "head_dim", "embed"),
        fan_in=heads * latent.value_dim,
        rows=2,
        packable=True,
    )
    return specs


def _mamba2(config: ModelConfig, dtype: np.dtype) -> dict[str, ParamSpec]:
    """ssm_in is [embed, gate | what is convolved (values, b, c) | time steps]."""
    ssm, hidden, wide = config.state_space, config.hidden_size, jnp.dtype(jnp.float32)
    if ssm is None:
        raise ValueError("the config has no state space")
    heads, inner, channels = ssm.num_heads, ssm.inner_dim, ssm.conv_channels
    wide_in = inner + channels + heads
    specs = {"ssm_in": ParamSpec((hidden, wide_in), dtype, ("embed", None), fan_in=hidden, packable=True)}
    if ssm.bias:
        specs["ssm_in_bias"] = ParamSpec((wide_in,), dtype, (None,), init="zeros")
    specs["conv"] = ParamSpec((ssm.conv_width, channels), dtype, (None, None), fan_in=ssm.conv_width)
    if ssm.conv_bias:
        specs["conv_bias"] = ParamSpec((channels,), dtype, (None,), init="zeros")
    specs["dt_bias"] = specs["a_log"] = ParamSpec((heads,), wide, (None,), init="zeros")
    specs["skip"] = ParamSpec((heads,), wide, (None,), init="ones")
    specs["ssm_norm"] = _norm(inner, axes=(None,))
    specs["ssm_out"] = ParamSpec((inner, hidden), dtype, (None, "embed"), fan_in=inner, packable=True)
    if ssm.bias:
        specs["ssm_out_bias"] = ParamSpec((hidden,), dtype, ("embed",), init="zeros")
    return specs


def _gated_delta(config: ModelConfig, dtype: np.dtype) -> dict[str, ParamSpec]:
    """delta_in is [embed, queries | keys | values | gate], delta_steps [embed, strengths | time steps]."""
    rule, hidden, wide = config.delta_rule, config.hidden_size, jnp.dtype(jnp.float32)
    if rule is None:
        raise ValueError("the config has no delta rule")
    heads, channels = rule.value_heads, rule.conv_channels
    values = heads * rule.value_dim
    vector = ParamSpec((heads,), wide, (None,), init="zeros")
    return {
        "delta_in": ParamSpec((hidden, channels + values), dtype, ("embed", None), fan_in=hidden, packable=True),
        "delta_steps": ParamSpec((hidden, 2 * heads), dtype, ("embed", None), fan_in=hidden),
        "conv": ParamSpec((rule.conv_width, channels), dtype, (None, None), fan_in=rule.conv_width),
        "dt_bias": vector,
        "a_log": vector,
        "delta_norm": _norm(rule.value_dim, axes=(None,)),
        "delta_out": ParamSpec((values, hidden), dtype, (None, "embed"), fan_in=values, packable=True),
    }


_MIXERS = {"attention": _attention, "latent": _latent, "mamba2": _mamba2, "gated_delta": _gated_delta}


def _mlp(config: ModelConfig, dtype: np.dtype) -> dict[str, ParamSpec]:
    hidden, mlp = config.hidden_size, config.intermediate_size
    specs = _gated(hidden, mlp, dtype)
    if config.mlp_bias:
        blocks, block = mlp // mlp_block(mlp), mlp_block(mlp)
        specs["gate_up_bias"] = ParamSpec((blocks, 2, block), dtype, ("mlp", None, None), init="zeros")
        specs["down_bias"] = ParamSpec((hidden,), dtype, ("embed",), init="zeros")
    return specs


def _gated(hidden: int, mlp: int, dtype: np.dtype, experts: int = 0) -> dict[str, ParamSpec]:
    """gate_up and down of one MLP, or of each of so many experts."""
    count, axis, lead = ((experts,), ("experts",), 1) if experts else ((), (), 0)
    kind = "expert_mlp" if experts else "mlp"
    blocks, block = mlp // mlp_block(mlp), mlp_block(mlp)
    gate_up, down = (*count, hidden, blocks, 2, block), (*count, mlp, hidden)
    return {
        "gate_up": ParamSpec(
            gate_up, dtype, (*axis, "embed", kind, None, None), fan_in=hidden, rows=1, lead=lead, packable=True
        ),
        "down": ParamSpec(
            down, dtype, (*axis, kind, "embed"), fan_in=mlp, rows=1, lead=lead, packable=True, by_rows=experts > 0
        ),
    }


def _experts(config: ModelConfig, dtype: np.dtype) -> dict[str, ParamSpec]:
    """router [embed, experts], gate_up and down of each expert, and of the one that every token sees."""
    experts, hidden = config.experts, config.hidden_size
    if experts is None:
        raise ValueError("the config has no experts")
    count, size, wide = experts.num_experts, experts.intermediate_size, jnp.dtype(jnp.float32)
    specs = {"router": ParamSpec((hidden, count), dtype, ("embed", None), fan_in=hidden)}
    if experts.router_bias:
        specs["router_bias"] = ParamSpec((count,), wide, (None,), init="zeros")
    if experts.correction:
        specs["router_correction"] = ParamSpec((count,), wide, (None,), init="zeros")
    each = _gated(hidden, size, dtype, count)
    specs |= {f"experts_{name}": spec for name, spec in each.items()}
    if experts.biases:
        blocks, block = size // mlp_block(size), mlp_block(size)
        bias = ParamSpec((count, blocks, 2, block), dtype, ("experts", "expert_mlp", None, None), init="zeros")
        specs["experts_gate_up_bias"] = bias
        specs["experts_down_bias"] = ParamSpec((count, hidden), dtype, ("experts", "embed"), init="zeros")
    if experts.shared_size:
        shared = _gated(hidden, experts.shared_size, dtype)
        specs |= {f"shared_{name}": spec for name, spec in shared.items()}
    if experts.shared_gate:
        specs["shared_gate"] = ParamSpec((hidden, 1), dtype, ("embed", None), fan_in=hidden)
    return specs
