"""Where each of our parameters comes from in a GGUF file: Hugging Face's table by other names, and what differs.

llama.cpp's converter renames tensors, puts experts' matrices into one tensor, splits some and squeezes vectors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np

from engine.model.config import Experts, ModelConfig
from engine.model.weights.names import Piece, Pieces, View, of_experts, pieces

# Hugging Face's name within a layer -> GGUF's. Families with norms after the blocks differ, below.
_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.in_proj_qkvz": "ssm_in",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "in_proj": "ssm_in",
    "out_proj": "ssm_out",
    "conv1d": "ssm_conv1d",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "norm": "attn_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_POST_NORM_NAMES = {**_LAYER_NAMES, "post_attention_layernorm": "post_attention_norm"}
_NORM_AFTER_ATTENTION = frozenset({"gpt_oss", "qwen3_next"})  # by its name; it stands before the MLP as ever
_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.embeddings.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(config: ModelConfig, name: str) -> str:
    """GGUF's name of the tensor that Hugging Face calls `name` ("model.layers.0.mlp.up_proj.weight")."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    if name.startswith("blk."):
        return name
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    stem, kind = rest.rsplit(".", 1)
    after = config.norm_place != "pre" or config.family in _NORM_AFTER_ATTENTION
    table = _POST_NORM_NAMES if after else _LAYER_NAMES
    return f"blk.{layer}.{table[stem.removeprefix('mixer.').removeprefix('mamba.')]}.{kind}"


def gguf_pieces(config: ModelConfig, param: str, stored: Collection[str]) -> Iterator[Piece]:
    """The stored tensors of `param`: under GGUF's names where it keeps them otherwise, else under Hugging Face's.

    stored: the names of the file's tensors, of which some have been kept in two ways.
    """
    layer, _, name = param.removeprefix("layers.").partition(".")
    within = {tensor.removeprefix(f"blk.{layer}.") for tensor in stored if tensor.startswith(f"blk.{layer}.")}
    own = _own_pieces(config, name, within) if param.startswith("layers.") else None
    if own is None:
        yield from pieces(config, param, "model.", "lm_head.weight")
        return
    for piece in own:
        yield replace(piece, name=f"blk.{layer}.{piece.name}")


def _own_pieces(config: ModelConfig, name: str, within: Collection[str]) -> Pieces | None:
    """Names within "blk.{i}."; None: the tensor is Hugging Face's."""
    if config.experts is not None and of_experts(name):
        return _expert_pieces(config.experts, config.hidden_size, name, within)
    if name == "sinks":
        return (Piece("attn_sinks.weight", (_whole,), shape=(config.num_q_heads,)),)
    if config.latent is not None and "attn_k_b.weight" in within:
        heads, rank = config.num_q_heads, config.latent.kv_rank
        if name == "k_up":
            return (Piece("attn_k_b.weight", (_whole,), shape=(heads, rank, config.latent.nope_dim)),)
        if name == "v_up":
            return (Piece("attn_v_b.weight", (_swapped,), shape=(heads, config.latent.value_dim, rank)),)
    if name == "delta_in" and "attn_qkv.weight" in within and config.delta_rule is not None:
        cut = config.delta_rule.conv_channels
        return Piece("attn_qkv.weight", (lambda a: a[:, :cut].T,)), Piece("attn_gate.weight", (lambda a: a[:, cut:].T,))
    if config.family == "granitemoehybrid" and name in ("gate_up", "down"):
        return _gated_pieces(name, "", (config.intermediate_size, config.hidden_size))
    return _recurrent_vectors(config, name)


def _expert_pieces(experts: Experts, hidden: int, name: str, within: Collection[str]) -> Pieces:
    """One tensor for all experts' matrices of a kind, or even for gate and up of all."""
    count, size = experts.num_experts, experts.intermediate_size
    if name.startswith("shared_") and name != "shared_gate":
        return _gated_pieces(name.removeprefix("shared_"), "_shexp", (experts.shared_size, hidden))
    if name == "experts_gate_up" and "ffn_gate_up_exps.weight" in within:
        # [experts, embed, blocks, 2, block] seen as [experts, 2, blocks, block, embed]
        view: View = lambda a: a.transpose(0, 3, 2, 4, 1)  # noqa: E731
        return (Piece("ffn_gate_up_exps.weight", (view,), shape=(count, 2 * size, hidden)),)
    if name in ("experts_gate_up", "experts_down"):
        return _gated_pieces(name.removeprefix("experts_"), "_exps", (count, size, hidden))
    pieces: dict[str, Pieces] = {
        "router": (Piece("ffn_gate_inp.weight", (_swapped,)),),
        "router_bias": (Piece("ffn_gate_inp.bias", (_whole,)),),
        "router_correction": (Piece("exp_probs_b.bias", (_whole,)),),
        "shared_gate": (Piece("ffn_gate_inp_shexp.weight", (_swapped,)),),
        "experts_gate_up_bias": (
            Piece("ffn_gate_exps.bias", (lambda a: a[:, :, 0],), shape=(count, size)),
            Piece("ffn_up_exps.bias", (lambda a: a[:, :, 1],), shape=(count, size)),
        ),
        "experts_down_bias": (Piece("ffn_down_exps.bias", (_whole,), shape=(count, hidden)),),
    }
    return pieces[name]


def _gated_pieces(name: str, ending: str, shape: tuple[int, ...]) -> Pieces:
    """gate_up or down of an MLP, or of each expert; shape: [..., mlp, embed], as gate is stored."""

    def half(index: int) -> View:  # [..., embed, blocks, 2, block] seen as [..., blocks, block, embed]
        return lambda array: np.moveaxis(array[..., index, :], -3, -1)

    if name == "down":
        return (Piece(f"ffn_down{ending}.weight", (_swapped,), shape=(*shape[:-2], shape[-1], shape[-2])),)
    return tuple(Piece(f"ffn_{part}{ending}.weight", (half(i),), shape=shape) for i, part in enumerate(("gate", "up")))


def _recurrent_vectors(config: ModelConfig, name: str) -> Pieces | None:
    """What the file keeps in other shapes; of decay rates the file has -exp(a_log)."""
    ssm, rule = config.state_space, config.delta_rule
    if config.recurrence is None:
        return None
    rates = (ssm.num_heads, 1) if ssm is not None else (rule.value_heads,) if rule is not None else ()
    inner = (ssm.groups, ssm.inner_dim // ssm.groups) if ssm is not None else ()
    pieces = {
        "conv": Piece("ssm_conv1d.weight", (_swapped,)),
        "dt_bias": Piece("ssm_dt.bias", (_whole,)),
        "a_log": Piece("ssm_a", (_whole,), shape=rates, select=lambda rates: np.log(-rates)),
        "skip": Piece("ssm_d", (_whole,), shape=rates),
        "ssm_norm": Piece("ssm_norm.weight", (_whole,), shape=inner),
    }
    return (pieces[name],) if name in pieces else None


def _whole(array: np.ndarray) -> np.ndarray:
    return array


def _swapped(array: np.ndarray) -> np.ndarray:  # our [..., in, out]
    return np.swapaxes(array, -1, -2)
