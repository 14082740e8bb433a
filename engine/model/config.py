"""What a model computes, free of any checkpoint's spelling.

A field names a variant of the mathematics at one point. Per-layer variety is data
(`LayerSpec`). Names of Hugging Face keys live in `families.py`, GGUF's in `weights/gguf.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary embedding as data: rotates the first `2 * len(inv_freq)` of head_dim, halves layout.

    All scaling methods (linear, llama3, yarn, longrope) reduce to these two fields:
    angle = position * inv_freq; cos and sin are multiplied by `scale`.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of a layer's MLP (arXiv 1701.06538, 2101.03961).

    A token goes to the `per_token` experts with the highest scores and adds up what they return,
    times their scores. Variants: `correction` and the groups choose, but do not weigh (DeepSeek-V3,
    arXiv 2412.19437); `clamp` is gpt-oss's gate, min(gate, c) * sigmoid(1.702 gate) * (clip(up, -c, c) + 1).
    """

    num_experts: int
    per_token: int
    intermediate_size: int  # of one expert
    scoring: Literal["softmax", "sigmoid"] = "softmax"  # of the router's logits over all experts
    router_bias: bool = False
    correction: bool = False  # a bias on the scores that only the choice sees
    groups: int = 1  # experts stand in so many groups, of which only the best `groups_kept` are open
    groups_kept: int = 1
    group_best: int = 1  # a group's score is the sum of its so many best experts'
    normalize: bool = True  # the chosen experts' weights add up to one
    scale: float = 1.0  # and are then multiplied by this
    biases: bool = False  # of each expert's matrices
    clamp: float | None = None
    shared_size: int = 0  # width of the expert that every token sees; 0: there is none
    shared_gate: bool = False  # the shared expert's output is times sigmoid(gate . x) (Qwen2-MoE)

    def __post_init__(self) -> None:
        if not 0 < self.per_token <= self.num_experts:
            raise ValueError(f"{self.per_token} experts a token of {self.num_experts}")
        if self.groups < 1 or self.num_experts % self.groups:
            raise ValueError(f"{self.num_experts} experts do not divide into {self.groups} groups")
        size = self.num_experts // self.groups
        if not 0 < self.groups_kept <= self.groups or not 0 < self.group_best <= size:
            raise ValueError(f"{self.groups_kept} of {self.groups} groups, by the {self.group_best} best of {size}")
        if self.per_token > self.groups_kept * size:
            raise ValueError(f"{self.per_token} experts a token of {self.groups_kept} groups of {size}")


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): what the cache keeps of a token is one
    vector of kv_rank, from which every head's key and value are projected, and one rotary key for all heads.
    """

    kv_rank: int
    nope_dim: int  # of a head's query and key, without position
    rope_dim: int  # behind it, rotated
    value_dim: int  # of a head
    q_rank: int | None  # queries too come from a smaller vector; None: from the hidden state
    interleaved: bool = True  # the checkpoint has rotary pairs side by side; loading puts them in halves

    @property
    def row_dim(self) -> int:
        """Numbers a token and layer in the cache."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class StateSpace:
    """Mamba 2's mixer (arXiv 2405.21060): a short convolution, then a state of head_dim x state_dim a head."""

    num_heads: int
    head_dim: int
    state_dim: int
    groups: int  # of heads that share what reads and writes the state; the output's norm is over each
    conv_width: int  # tokens that the convolution sees, the newest included
    conv_bias: bool = True
    bias: bool = False  # of the projections in and out
    least_step: float = 0.0  # bounds of a token's time step
    most_step: float = math.inf

    @property
    def inner_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        return self.inner_dim + 2 * self.groups * self.state_dim

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.num_heads, self.head_dim, self.state_dim


@dataclass(frozen=True)
class DeltaRule:
    """Gated delta net (arXiv 2412.06464): a short convolution, then linear attention whose state of
    key_dim x value_dim a head is corrected with every token.
    """

    key_heads: int
    value_heads: int  # as many of them as there are for a key head share its queries and keys
    key_dim: int
    value_dim: int
    conv_width: int

    @property
    def conv_channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.value_heads, self.key_dim, self.value_dim


@dataclass(frozen=True)
class LayerSpec:
    """What differs between layers. Query i sees key j when i - window < j <= i."""

    rope: Rope | None  # None: no position encoding (NoPE)
    window: int | None = None  # tokens; None sees everything before it
    mixer: Literal["attention", "latent", "mamba2", "gated_delta"] = "attention"
    ffn: Literal["gated", "experts", "none"] = "gated"

    @property
    def recurrent(self) -> bool:
        """The layer remembers a state a sequence, of one size, in place of keys and values a token."""
        return self.mixer in ("mamba2", "gated_delta")


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    max_position: int  # tokens of context that the model was made for
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    norm_eps: float = 1e-5
    # pre: x + f(norm(x)); post: x + norm(f(x)); sandwich: x + norm(f(norm(x)))
    norm_place: Literal["pre", "post", "sandwich"] = "pre"
    # head: RMS over each head's head_dim; full: over all heads together
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    attention_scale: float = 0.0  # multiplies q.k; families.py always sets it
    attention_softcap: float | None = None
    attention_gate: bool = False  # attention's output is times sigmoid(gate . x), number by number (Qwen3-Next)
    attention_sinks: bool = False  # a learned score a head that softmax counts beside the keys (gpt-oss)
    final_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    tie_embeddings: bool = False
    experts: Experts | None = None  # of the layers whose ffn is "experts"
    latent: Latent | None = None  # of the layers, all or none of those that attend, whose mixer is "latent"
    state_space: StateSpace | None = None  # of the layers whose mixer is "mamba2"
    delta_rule: DeltaRule | None = None  # of the layers whose mixer is "gated_delta"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def recurrence(self) -> StateSpace | DeltaRule | None:
        """Sizes of the recurrent layers, if there are any."""
        return self.state_space or self.delta_rule

    @property
    def num_recurrent_layers(self) -> int:
        return sum(layer.recurrent for layer in self.layers)

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of one sequence's states in all layers: a window in the weights' dtype, a float32 state each."""
        if self.recurrence is None:
            return 0
        window = (self.recurrence.conv_width - 1) * self.recurrence.conv_channels * itemsize
        return self.num_recurrent_layers * (window + 4 * math.prod(self.recurrence.state_shape))

    @property
    def q_per_kv(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    def __post_init__(self) -> None:
        if self.experts is None and any(layer.ffn == "experts" for layer in self.layers):
            raise ValueError("layers have experts, but nothing says how many")
        mixers = {layer.mixer for layer in self.layers}
        if ("mamba2" in mixers, "gated_delta" in mixers) != (self.state_space is not None, self.delta_rule is not None):
            raise ValueError("layers are mamba2 if `state_space` says their sizes, gated_delta if `delta_rule` does")
        if {"mamba2", "gated_delta"} <= mixers:
            raise ValueError("layers of one model recur in one way")
        attending = [layer.mixer == "latent" for layer in self.layers if not layer.recurrent]
        if set(attending) not in ({self.latent is not None}, set()):
            raise ValueError("either every layer's mixer is latent and `latent` says its sizes, or none is")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"num_q_heads {self.num_q_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
