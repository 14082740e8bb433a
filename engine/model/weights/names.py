"""Where each of our parameters comes from in a Hugging Face checkpoint: one table, few rows a family.

Knows tensor names and layouts, not files. A `Piece` is one stored tensor and the views of our
array, with axes in the stored order, that its rows fill one after the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from engine.model.config import ModelConfig

View = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Piece:
    """One stored tensor of a parameter.

    `offset` is added (Gemma stores norm weights minus one). `shape` is the stored shape where it does not
    follow from the views. `select` takes this parameter's rows, in our order, out of a tensor of that shape.
    """

    name: str
    views: tuple[View, ...]
    offset: float = 0.0
    shape: tuple[int, ...] | None = None
    select: View | None = None

    def stored_shape(self, array: np.ndarray) -> tuple[int, ...]:
        """The shape the file must have for a parameter of `array`'s shape (no data is read)."""
        if self.shape is not None:
            return self.shape
        views = [view(array) for view in self.views]
        if self.name.endswith(("norm.weight", ".bias")):
            return (sum(v.size for v in views),)
        return (sum(math.prod(v.shape[:-1]) for v in views), views[0].shape[-1])

    def fill(self, array: np.ndarray, stored: np.ndarray) -> None:
        """Write the stored tensor into its places in `array`, converted to array's dtype."""
        if self.shape is not None:
            (view,) = self.views
            target = view(array)
            stored = stored if self.select is None else self.select(stored)
            _assign(target, stored.reshape(target.shape), self.offset)
            return
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
Pieces = tuple[Piece, ...]  # of a parameter of a layer, names still within "layers.{i}."

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

# Where a family keeps its experts: the block, the three matrices of one, and the expert that every token sees.
_MATRICES = ("gate_proj", "up_proj", "down_proj")
_OF_EXPERTS = ("mlp", *_MATRICES, "shared_expert")
_EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2", ""),
    "deepseek_v2": ("mlp", *_MATRICES, "shared_experts"),
    "deepseek_v3": ("mlp", *_MATRICES, "shared_experts"),
}


def _expert_pieces(config: ModelConfig, name: str) -> Pieces:
    """Of one tensor for each expert and matrix."""
    experts = config.experts
    if experts is None:
        raise ValueError("the config has no experts")
    block, gate, up, down, shared = _EXPERT_NAMES.get(config.family, _OF_EXPERTS)
    halves: dict[str, Row] = {"gate_up": ((gate, (_gate,)), (up, (_up,))), "down": ((down, (_transposed,)),)}
    if name == "router":
        return (Piece(f"{block}.gate.weight", (_transposed,)),)
    if name == "router_correction":
        return (Piece(f"{block}.gate.e_score_correction_bias", (_whole,), shape=(experts.num_experts,)),)
    if name == "shared_gate":
        return (Piece(f"{block}.shared_expert_gate.weight", (_transposed,)),)
    if name.startswith("shared_"):
        return tuple(
            Piece(f"{block}.{shared}.{stored}.weight", views) for stored, views in halves[name.removeprefix("shared_")]
        )
    return tuple(
        Piece(f"{block}.experts.{expert}.{stored}.weight", (_of(expert, view),))
        for expert in range(experts.num_experts)
        for stored, (view,) in halves[name.removeprefix("experts_")]
    )


def _of(expert: int, view: View) -> View:
    return lambda array: view(array[expert])


def _granite_expert_pieces(config: ModelConfig, name: str) -> Pieces:
    """One tensor for all experts, [experts, out, in], gate before up; the shared one stands beside them."""
    experts, hidden = config.experts, config.hidden_size
    if experts is None:
        raise ValueError("the config has no experts")
    count, size = experts.num_experts, experts.intermediate_size
    where = "block_sparse_moe."
    pieces = {
        "router": Piece(f"{where}router.layer.weight", (_transposed,)),
        # [experts, embed, blocks, 2, block] seen as [experts, 2, blocks, block, embed]
        "experts_gate_up": Piece(
            f"{where}input_linear.weight", (lambda a: a.transpose(0, 3, 2, 4, 1),), shape=(count, 2 * size, hidden)
        ),
        "experts_down": Piece(
            f"{where}output_linear.weight", (lambda a: a.transpose(0, 2, 1),), shape=(count, hidden, size)
        ),
        "shared_gate_up": Piece("shared_mlp.input_linear.weight", (_gate, _up)),
        "shared_down": Piece("shared_mlp.output_linear.weight", (_transposed,)),
    }
    return (pieces[name],)


def _gpt_oss_expert_pieces(config: ModelConfig, name: str, by_rows: bool) -> Pieces:
    """One tensor for all experts, [experts, in, out], gate and up in turns of one column.

    by_rows: quantized, where matrices are [experts, out, in].
    """
    experts, hidden = config.experts, config.hidden_size
    if experts is None:
        raise ValueError("the config has no experts")
    count, size = experts.num_experts, experts.intermediate_size
    in_turns = (lambda a: np.swapaxes(a, -1, -2),)  # [..., blocks, 2, block] seen as [..., blocks, block, 2]
    where = "mlp.experts."
    pieces = {
        "router": Piece("mlp.router.weight", (_transposed,)),
        "router_bias": Piece("mlp.router.bias", (_whole,)),
        "experts_gate_up": Piece(f"{where}gate_up_proj", in_turns, shape=(count, hidden, 2 * size)),
        "experts_gate_up_bias": Piece(f"{where}gate_up_proj_bias", in_turns, shape=(count, 2 * size)),
        "experts_down": Piece(f"{where}down_proj", (_whole,), shape=(count, size, hidden)),
        "experts_down_bias": Piece(f"{where}down_proj_bias", (_whole,), shape=(count, hidden)),
    }
    rows = {
        # [experts, embed, blocks, 2, block] seen as [experts, blocks, block, 2, embed]
        "experts_gate_up": Piece(
            f"{where}gate_up_proj.weight", (lambda a: a.transpose(0, 2, 4, 3, 1),), shape=(count, 2 * size, hidden)
        ),
        "experts_down": Piece(
            f"{where}down_proj.weight", (lambda a: a.transpose(0, 2, 1),), shape=(count, hidden, size)
        ),
    }
    return (rows[name] if by_rows and name in rows else pieces[name],)


def _latent_pieces(config: ModelConfig, name: str) -> Pieces:
    """DeepSeek's projections. Rotary rows that stand in pairs are put in halves, of queries and keys alike."""
    latent, heads = config.latent, config.num_q_heads
    if latent is None:
        raise ValueError("the config has no latent")
    q_from, q_name = (config.hidden_size, "q_proj") if latent.q_rank is None else (latent.q_rank, "q_b_proj")
    head, up = latent.nope_dim + latent.rope_dim, latent.nope_dim + latent.value_dim
    kv_b = "self_attn.kv_b_proj.weight"

    def piece(stored: str, views: View, shape: tuple[int, int], select: View | None = None) -> Pieces:
        return (Piece(stored, (views,), shape=shape, select=select),)

    def heads_of(array: np.ndarray) -> np.ndarray:
        return array.reshape(heads, -1, array.shape[-1])

    swapped = functools.partial(np.swapaxes, axis1=1, axis2=2)
    rotary = functools.partial(_halves, latent.rope_dim, latent.interleaved)
    rows: dict[str, Callable[[], Pieces]] = {
        "q_a": lambda: piece("self_attn.q_a_proj.weight", _transposed, (q_from, config.hidden_size)),
        "q_a_norm": lambda: (Piece("self_attn.q_a_layernorm.weight", (_whole,), shape=(q_from,)),),
        "q": lambda: piece(
            f"self_attn.{q_name}.weight",
            lambda a: np.moveaxis(a, 0, -1),
            (heads * head, q_from),
            lambda stored: rotary(heads_of(stored)),
        ),
        "kv_a": lambda: piece(
            "self_attn.kv_a_proj_with_mqa.weight",
            _transposed,
            (latent.row_dim, config.hidden_size),
            lambda stored: rotary(stored[None])[0],
        ),
        "kv_a_norm": lambda: (Piece("self_attn.kv_a_layernorm.weight", (_whole,), shape=(latent.kv_rank,)),),
        "k_up": lambda: piece(
            kv_b, swapped, (heads * up, latent.kv_rank), lambda stored: heads_of(stored)[:, : latent.nope_dim]
        ),
        "v_up": lambda: piece(
            kv_b, swapped, (heads * up, latent.kv_rank), lambda stored: heads_of(stored)[:, latent.nope_dim :]
        ),
        "o": lambda: (Piece("self_attn.o_proj.weight", (_out,)),),
    }
    return rows[name]()


def _halves(rope_dim: int, interleaved: bool, rows: np.ndarray) -> np.ndarray:
    """[heads, rows, in] with the last rope_dim rows of each head, (0, 1), (2, 3), ..., as 0, 2, ..., 1, 3, ..."""
    if not interleaved:
        return rows
    rotary = rows[:, -rope_dim:]
    return np.concatenate([rows[:, :-rope_dim], rotary[:, ::2], rotary[:, 1::2]], axis=1)


def _mamba_pieces(config: ModelConfig, name: str) -> Pieces:
    """Mamba 2's mixer, whose layout is the same wherever it stands."""
    ssm = config.state_space
    if ssm is None:
        raise ValueError("the config has no state space")
    vector = (ssm.num_heads,)
    pieces = {
        "ssm_in": Piece("in_proj.weight", (_transposed,)),
        "ssm_in_bias": Piece("in_proj.bias", (_whole,)),
        "conv": Piece("conv1d.weight", (_transposed,), shape=(ssm.conv_channels, 1, ssm.conv_width)),
        "conv_bias": Piece("conv1d.bias", (_whole,)),
        "dt_bias": Piece("dt_bias", (_whole,), shape=vector),
        "a_log": Piece("A_log", (_whole,), shape=vector),
        "skip": Piece("D", (_whole,), shape=vector),
        "ssm_norm": Piece("norm.weight", (_whole,)),
        "ssm_out": Piece("out_proj.weight", (_transposed,)),
        "ssm_out_bias": Piece("out_proj.bias", (_whole,)),
    }
    block = "mixer" if config.family == "mamba2" else "mamba"
    return (replace(pieces[name], name=f"{block}.{pieces[name].name}"),)


def _delta_pieces(config: ModelConfig, name: str) -> Pieces:
    """Qwen3-Next's gated delta net. A key head's queries, keys, values and gates stand together in the file."""
    rule, hidden = config.delta_rule, config.hidden_size
    if rule is None:
        raise ValueError("the config has no delta rule")
    group = rule.value_heads // rule.key_heads
    wide = group * rule.value_dim
    per_key = np.cumsum([rule.key_dim, rule.key_dim, wide])

    def by_kind(cuts: np.ndarray | list[int], stored: np.ndarray) -> np.ndarray:
        row = stored.shape[1]  # numbers, or their packed words or scales
        parts = np.split(stored.reshape(rule.key_heads, -1, row), cuts, axis=1)
        return np.concatenate([part.reshape(-1, row) for part in parts])

    def matrix(stored: str, rows: int, cuts: np.ndarray | list[int]) -> Piece:
        return Piece(stored, (_transposed,), shape=(rows, hidden), select=functools.partial(by_kind, cuts))

    heads = (rule.value_heads,)
    rows = rule.conv_channels + rule.value_heads * rule.value_dim
    pieces = {
        "delta_in": lambda: matrix("in_proj_qkvz.weight", rows, per_key),
        "delta_steps": lambda: matrix("in_proj_ba.weight", 2 * rule.value_heads, [group]),
        "conv": lambda: Piece("conv1d.weight", (_transposed,), shape=(rule.conv_channels, 1, rule.conv_width)),
        "dt_bias": lambda: Piece("dt_bias", (_whole,), shape=heads),
        "a_log": lambda: Piece("A_log", (_whole,), shape=heads),
        "delta_norm": lambda: Piece("norm.weight", (_whole,)),
        "delta_out": lambda: Piece("out_proj.weight", (_transposed,)),
    }
    piece = pieces[name]()
    return (replace(piece, name=f"linear_attn.{piece.name}"),)


def _gated_query_pieces(config: ModelConfig, name: str) -> Pieces:
    """A head's query and, behind it, the gate of what it attends to."""
    heads, head = config.num_q_heads, config.head_dim

    def rows(which: int, view: View) -> Piece:
        def select(stored: np.ndarray) -> np.ndarray:
            return stored.reshape(heads, 2, head, -1)[:, which]

        return Piece("self_attn.q_proj.weight", (view,), shape=(2 * heads * head, config.hidden_size), select=select)

    if name == "attn_gate":
        return (rows(1, lambda a: np.moveaxis(a, 0, -1)),)
    return (rows(0, _q), *(Piece(f"self_attn.{part}_proj.weight", (view,)) for part, view in (("k", _k), ("v", _v))))


_OF_RECURRENT = frozenset({"conv", "conv_bias", "dt_bias", "a_log", "skip"})
_OF_LATENT = frozenset({"q_a", "q_a_norm", "q", "kv_a", "kv_a_norm", "k_up", "v_up", "o"})


# What a family's layers spell differently from `_SPLIT`.
LAYER_ROWS: dict[str, Mapping[str, Row]] = {
    "phi3": _FUSED,
    "gemma2": _SANDWICH,
    "gemma3": _SANDWICH,
    "olmo2": _POST_NORMS,
    "mamba2": {"attn_norm": (("norm.weight", (_whole,)),)},
    "granitemoehybrid": {
        "gate_up": (("shared_mlp.input_linear.weight", (_gate, _up)),),
        "down": (("shared_mlp.output_linear.weight", (_transposed,)),),
    },
}
# Where a family's embedding and last norm are, if not in embed_tokens and norm.
_ENDS = {"mamba2": ("embeddings.weight", "norm_f.weight")}
NORM_OFFSET = {"gemma2": 1.0, "gemma3": 1.0, "qwen3_next": 1.0}

# Where the decoder may sit in the file: alone, without a head, inside a multimodal model (old, new).
PREFIXES = ("model.", "", "language_model.model.", "model.language_model.", "backbone.")
# Tensors that are no parameters of the decoder: buffers, and the other towers of a multimodal Gemma 3.
IGNORED_ENDINGS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
IGNORED_STARTS = {
    "gemma3": ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    "qwen3_next": ("mtp.",),  # what predicts further tokens, for speculation
}
HEADS = ("lm_head.weight", "language_model.lm_head.weight")


def pieces(config: ModelConfig, param: str, prefix: str, head: str, by_rows: bool = False) -> Iterator[Piece]:
    """The stored tensors that make up `param` (a key of `param_specs`), in order.

    by_rows: of a quantized checkpoint whose merged experts stand [experts, out, in].
    """
    embedding, norm = end_names(config)
    if param == "embed":
        yield Piece(f"{prefix}{embedding}", (_whole,))
    elif param == "lm_head":
        yield Piece(head, (_whole,))
    elif param == "final_norm":
        yield Piece(f"{prefix}{norm}", (_whole,), NORM_OFFSET.get(config.family, 0.0), shape=(config.hidden_size,))
    else:
        layer, name = param.removeprefix("layers.").split(".", 1)
        for piece in _layer_pieces(config, name, by_rows):
            yield replace(piece, name=f"{prefix}layers.{layer}.{piece.name}")


def end_names(config: ModelConfig) -> tuple[str, str]:
    """Of the embedding and the last norm, behind the prefix."""
    return _ENDS.get(config.family, ("embed_tokens.weight", "norm.weight"))


def of_experts(name: str) -> bool:
    """Whether a layer's parameter belongs to its mixture of experts."""
    return name.startswith(("experts_", "shared_", "router"))


def _layer_pieces(config: ModelConfig, name: str, by_rows: bool) -> Pieces:
    """Names within "layers.{i}."."""
    if of_experts(name):
        if config.family == "gpt_oss":
            return _gpt_oss_expert_pieces(config, name, by_rows)
        merged = config.family in ("granitemoe", "granitemoehybrid")
        return (_granite_expert_pieces if merged else _expert_pieces)(config, name)
    if name.startswith(("ssm_", "delta_")) or name in _OF_RECURRENT:
        return (_mamba_pieces if config.delta_rule is None else _delta_pieces)(config, name)
    if config.attention_gate and name in ("qkv", "attn_gate"):
        return _gated_query_pieces(config, name)
    if config.latent is not None and name in _OF_LATENT:
        return _latent_pieces(config, name)
    if name == "sinks":
        return (Piece("self_attn.sinks", (_whole,), shape=(config.num_q_heads,)),)
    row = LAYER_ROWS.get(config.family, {}).get(name) or _SPLIT[name]
    offset = NORM_OFFSET.get(config.family, 0.0) if name.endswith("norm") else 0.0
    return tuple(Piece(stored, views, offset) for stored, views in row)


def ignored(config: ModelConfig, name: str) -> bool:
    """True for a stored tensor that the decoder has no use for."""
    if config.tie_embeddings and name in HEADS:
        return True
    if config.family == "deepseek_v3" and name.startswith(f"model.layers.{config.num_layers}."):
        return True  # the layer that predicts a second token, for speculation
    return name.endswith(IGNORED_ENDINGS) or name.startswith(IGNORED_STARTS.get(config.family, ()))
