"""Where each of our parameters comes from in a Hugging Face checkpoint: one table, few rows a family.

Knows tensor names and layouts, not files. A `Piece` is one stored tensor and the views of our
array, with axes in the stored order, that its rows fill one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from engine.model.config import ModelConfig

View = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Piece:
    """One stored tensor of a parameter. `offset` is added (Gemma stores norm weights minus one)."""

    name: str
    views: tuple[View, ...]
    offset: float = 0.0

    def stored_shape(self, array: np.ndarray) -> tuple[int, ...]:
        """The shape the file must have for a parameter of `array`'s shape (no data is read)."""
        views = [view(array) for view in self.views]
        if self.name.endswith(("norm.weight", ".bias")):
            return (sum(v.size for v in views),)
        return (sum(math.prod(v.shape[:-1]) for v in views), views[0].shape[-1])

    def fill(self, array: np.ndarray, stored: np.ndarray) -> None:
        """Write the stored tensor into its places in `array`, converted to array's dtype."""
        start = 0
        for view in self.views:
            target = view(array)
            rows = math.prod(target.shape[: target.ndim - stored.ndim + 1])
            _assign(target, stored[start : start + rows].reshape(target.shape), self.offset)
            start += rows


def _assign(target: np.ndarray, values: np.ndarray, offset: float) -> None:
    if offset:
        target[...] = values.astype(np.float32) + np.float32(offset)
    elif target.dtype == values.dtype and target.itemsize == 2:
        target.view(np.uint16)[...] = values.view(np.uint16)  # numpy moves integers much faster than bfloat16
    elif values.dtype == np.float16 and target.itemsize == 2:
        target[...] = values.astype(np.float32)
    else:
        target[...] = values


def _whole(array: np.ndarray) -> np.ndarray:
    return array


def _transposed(array: np.ndarray) -> np.ndarray:  # our [in, out]
    return array.T


def _out(array: np.ndarray) -> np.ndarray:  # our [kv, group, head_dim, embed]; stored [embed, heads * head_dim]
    return array.reshape(-1, array.shape[-1]).T


# qkv [embed, kv, group + 2, head_dim]; its bias has no embed axis.
def _q(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array[:, :, :-2], 0, -1) if array.ndim == 4 else array[:, :-2]


def _k(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array[:, :, -2], 0, -1) if array.ndim == 4 else array[:, -2]


def _v(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array[:, :, -1], 0, -1) if array.ndim == 4 else array[:, -1]


# gate_up [embed, blocks, 2, block]; its bias has no embed axis.
def _gate(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array[:, :, 0], 0, -1) if array.ndim == 4 else array[:, 0]


def _up(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array[:, :, 1], 0, -1) if array.ndim == 4 else array[:, 1]


Row = tuple[tuple[str, tuple[View, ...]], ...]

# Our name within a layer -> stored names within "layers.{i}." and the views that they fill.
_SPLIT: dict[str, Row] = {
    "attn_norm": (("input_layernorm.weight", (_whole,)),),
    "qkv": (("self_attn.q_proj.weight", (_q,)), ("self_attn.k_proj.weight", (_k,)), ("self_attn.v_proj.weight", (_v,))),
    "qkv_bias": (("self_attn.q_proj.bias", (_q,)), ("self_attn.k_proj.bias", (_k,)), ("self_attn.v_proj.bias", (_v,))),
    "q_norm": (("self_attn.q_norm.weight", (_whole,)),),
    "k_norm": (("self_attn.k_norm.weight", (_whole,)),),
    "o": (("self_attn.o_proj.weight", (_out,)),),
    "o_bias": (("self_attn.o_proj.bias", (_whole,)),),
    "mlp_norm": (("post_attention_layernorm.weight", (_whole,)),),
    "gate_up": (("mlp.gate_proj.weight", (_gate,)), ("mlp.up_proj.weight", (_up,))),
    "gate_up_bias": (("mlp.gate_proj.bias", (_gate,)), ("mlp.up_proj.bias", (_up,))),
    "down": (("mlp.down_proj.weight", (_transposed,)),),
    "down_bias": (("mlp.down_proj.bias", (_whole,)),),
}
_POST_NORMS: dict[str, Row] = {
    "attn_post_norm": (("post_attention_layernorm.weight", (_whole,)),),
    "mlp_post_norm": (("post_feedforward_layernorm.weight", (_whole,)),),
}
_SANDWICH: dict[str, Row] = {**_POST_NORMS, "mlp_norm": (("pre_feedforward_layernorm.weight", (_whole,)),)}
_FUSED: dict[str, Row] = {
    "qkv": (("self_attn.qkv_proj.weight", (_q, _k, _v)),),
    "gate_up": (("mlp.gate_up_proj.weight", (_gate, _up)),),
}

# An expert's tensors, and how Mixtral calls what the others call mlp, gate_proj, up_proj and down_proj.
_EXPERT_NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
_OF_EXPERTS = ("mlp", "gate_proj", "up_proj", "down_proj")


def _expert_row(config: ModelConfig, name: str) -> Row | None:
    """Where the parts of a mixture of experts come from; None for other parameters."""
    block, gate, up, down = _EXPERT_NAMES.get(config.family, _OF_EXPERTS)
    if name == "router":
        return ((f"{block}.gate.weight", (_transposed,)),)
    if name == "shared_gate":
        return ((f"{block}.shared_expert_gate.weight", (_transposed,)),)
    if name.startswith("shared_"):
        where = f"{block}.shared_expert."
        rows: dict[str, Row] = {
            "shared_gate_up": ((f"{where}{gate}.weight", (_gate,)), (f"{where}{up}.weight", (_up,))),
            "shared_down": ((f"{where}{down}.weight", (_transposed,)),),
        }
        return rows[name]
    if not name.startswith("experts_") or config.experts is None:
        return None
    parts: tuple[tuple[str, View], ...] = (
        ((gate, _gate), (up, _up)) if name == "experts_gate_up" else ((down, _transposed),)
    )
    return tuple(
        (f"{block}.experts.{expert}.{stored}.weight", (_of(expert, view),))
        for expert in range(config.experts.num_experts)
        for stored, view in parts
    )


def _of(expert: int, view: View) -> View:
    return lambda array: view(array[expert])


# What a family's layers spell differently from `_SPLIT`.
LAYER_ROWS: dict[str, Mapping[str, Row]] = {
    "phi3": _FUSED,
    "gemma2": _SANDWICH,
    "gemma3": _SANDWICH,
    "olmo2": _POST_NORMS,
}
NORM_OFFSET = {"gemma2": 1.0, "gemma3": 1.0}

# Where the decoder may sit in the file: alone, without a head, inside a multimodal model (old, new).
PREFIXES = ("model.", "", "language_model.model.", "model.language_model.")
# Tensors that are no parameters of the decoder: buffers, and the other towers of a multimodal Gemma 3.
IGNORED_ENDINGS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
IGNORED_STARTS = {
    "gemma3": ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
}
HEADS = ("lm_head.weight", "language_model.lm_head.weight")


def pieces(config: ModelConfig, param: str, prefix: str, head: str) -> Iterator[Piece]:
    """The stored tensors that make up `param` (a key of `param_specs`), in order."""
    if param == "embed":
        yield Piece(f"{prefix}embed_tokens.weight", (_whole,))
    elif param == "lm_head":
        yield Piece(head, (_whole,))
    elif param == "final_norm":
        yield Piece(f"{prefix}norm.weight", (_whole,), NORM_OFFSET.get(config.family, 0.0))
    else:
        layer, name = param.removeprefix("layers.").split(".", 1)
        row = LAYER_ROWS.get(config.family, {}).get(name) or _expert_row(config, name) or _SPLIT[name]
        offset = NORM_OFFSET.get(config.family, 0.0) if name.endswith("norm") else 0.0
        for stored, views in row:
            yield Piece(f"{prefix}layers.{layer}.{stored}", views, offset)


def ignored(config: ModelConfig, name: str) -> bool:
    """True for a stored tensor that the decoder has no use for."""
    if config.tie_embeddings and name in HEADS:
        return True
    return name.endswith(IGNORED_ENDINGS) or name.startswith(IGNORED_STARTS.get(config.family, ()))
