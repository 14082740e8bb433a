"""Which implementation each op of the step programs gets, and why: said at start-up, before any tracing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from engine.attend import expands
from engine.batch import StepKey, lattice
from engine.config import EngineConfig
from engine.errors import InvalidParam
from engine.model.config import DeltaRule, LayerSpec, ModelConfig
from engine.model.params import mlp_block
from engine.pipeline import micro_of
from engine.programs import compute_of, local_shapes, model_specs, served_models
from pallas_kernels.choice import Choice, KernelDeclined
from pallas_kernels.gated import api as gated
from pallas_kernels.gated.spec import GatedSpec
from pallas_kernels.gated_delta import api as gated_delta
from pallas_kernels.greedy import api as greedy
from pallas_kernels.greedy.spec import GreedySpec
from pallas_kernels.grouped_matmul import api as grouped_matmul
from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.kv_write import api as kv_write
from pallas_kernels.latent_attention import api as latent_attention
from pallas_kernels.latent_attention.api import ExpandedSpec
from pallas_kernels.matmul import api as matmul
from pallas_kernels.paged_attention import api as paged_attention
from pallas_kernels.paged_attention.api import AttentionSpec
from pallas_kernels.quantized import Quantized
from pallas_kernels.quantized_matmul import api as quantized_matmul
from pallas_kernels.rms_norm import api as rms_norm
from pallas_kernels.rms_norm.spec import NormSpec
from pallas_kernels.rope import api as rope_op
from pallas_kernels.rope.spec import RopeSpec
from pallas_kernels.short_conv import api as short_conv
from pallas_kernels.ssd import api as ssd


def kernel_choices(model: ModelConfig, config: EngineConfig) -> list[str]:
    """One line for each op and set of shapes that gets a choice of its own.

    Raises InvalidParam when an implementation that was asked for by name does not exist or declines.
    """
    try:
        return list(
            dict.fromkeys(str(choice) for _, one, own in served_models(model, config) for choice in _choices(one, own))
        )
    except (KernelDeclined, ValueError) as error:
        raise InvalidParam("kernel", str(error)) from None


def _choices(model: ModelConfig, config: EngineConfig) -> Iterator[Choice]:
    compute, matmuls = compute_of(model, config), _matmuls(model, config)
    model, layout = compute.model, compute.kv
    yield from _gated_choices(model, config)
    yield from _norm_choices(model, config)
    yield from _rope_choices(model, config)
    yield greedy.choice(GreedySpec(config.shards.num_devices), config.target)
    for turn in (one_turn(config, key) for key in lattice(config)):
        tokens = turn.decode_rows + turn.chunk_tokens
        for spec in dict.fromkeys(model.layers):
            if spec.recurrent:
                yield from _recurrent_choices(model, config, turn)
                continue
            yield from _attention_choices(model, config, layout, spec, turn)
            yield kv_write.choice(kv_write.WriteSpec(tokens, config.part_size, layout), config.target)
        for rows, weight in matmuls:
            x = jax.ShapeDtypeStruct((tokens * rows, weight.shape[-2]), jnp.dtype(config.dtype))
            if len(weight.shape) == 3:
                sizes = jax.ShapeDtypeStruct(weight.shape[:1], jnp.int32)
                yield grouped_matmul.choice(grouped_matmul.spec_of(x, weight, sizes), config.target)
            elif isinstance(weight, Quantized):
                yield quantized_matmul.choice(quantized_matmul.spec_of(x, weight), config.target)
            else:
                yield matmul.choice(matmul.spec_of(x, weight), config.target)


def _gated_choices(model: ModelConfig, config: EngineConfig) -> Iterator[Choice]:
    """Of the activations, which are the same in every program."""
    experts = model.experts
    sizes = [(model.intermediate_size, False)] if any(layer.ffn == "gated" for layer in model.layers) else []
    if experts is not None:
        sizes.append((experts.intermediate_size, experts.clamp is not None))
        if experts.shared_size:
            sizes.append((experts.shared_size, False))
    for size, clamped in sizes:
        yield gated.choice(GatedSpec(mlp_block(size), config.dtype, model.activation, clamped), config.target)


def _norm_choices(model: ModelConfig, config: EngineConfig) -> Iterator[Choice]:
    """Of the norms, which are the same in every program."""
    sizes = [(model.hidden_size, config.dtype)]
    if model.qk_norm == "head":
        sizes.append((model.head_dim, config.dtype))
    if model.latent is not None:
        ranks = (model.latent.q_rank, model.latent.kv_rank)
        sizes += [(rank, config.dtype) for rank in ranks if rank is not None]
    if model.state_space is not None:
        sizes.append((model.state_space.inner_dim // model.state_space.groups, "float32"))
    if model.delta_rule is not None:
        sizes.append((model.delta_rule.value_dim, config.dtype))
    for size, dtype in sizes:
        yield rms_norm.choice(NormSpec(size, dtype, config.shards.num_devices), config.target)


def _rope_choices(model: ModelConfig, config: EngineConfig) -> Iterator[Choice]:
    """Of the rotations of queries and keys, which are the same in every program."""
    for rope in dict.fromkeys(layer.rope for layer in model.layers if layer.mixer == "attention" and layer.rope):
        spec = RopeSpec(model.head_dim, 2 * len(rope.inv_freq), config.dtype, config.shards.num_devices)
        yield rope_op.choice(spec, config.target)


@dataclass(frozen=True)
class Turn:
    """What layers see of a step."""

    decode_rows: int
    chunk_tokens: int
    chunks: int
    room: int  # tokens of each chunk, where that is known


def one_turn(config: EngineConfig, key: StepKey) -> Turn:
    """All of a step, or in stages one micro-batch; rows that verify proposed tokens are chunks."""
    stages = config.shards.count("layers")
    rows, tokens, chunks = key.rows, key.tokens, config.max_prefill_rows
    room = key.drafts + 1 if key.drafts else 0
    if room:
        rows, tokens, chunks = 0, key.rows * room, key.rows
    if stages > 1:
        micro = micro_of(stages, rows, tokens)
        rows, tokens = micro.rows, micro.tokens
    return Turn(rows, tokens, chunks, room)


def _matmuls(model: ModelConfig, config: EngineConfig) -> list[tuple[int, Any]]:
    """(rows of x a token, a device's abstract weight) of the products that have kernels, each kind of weight once."""
    weights = [(name.split(".")[-1], weight) for name, weight in local_shapes(model, config).items()]
    specs = model_specs(model, config)
    dense = {name.split(".")[-1] for name, spec in specs.items() if spec.packable}
    found = []
    for name, weight in {f"{name} {weight}": (name, weight) for name, weight in weights}.values():
        if model.experts is not None and name in ("experts_gate_up", "experts_down"):
            found.append((model.experts.per_token, weight))
        elif isinstance(weight, Quantized) or (name in dense and len(weight.shape) == 2):
            found.append((1, weight))
    return found


def _recurrent_choices(model: ModelConfig, config: EngineConfig, turn: Turn) -> Iterator[Choice]:
    """Of the ops of a recurrent layer in one program."""
    sizes = model.recurrence
    if sizes is None:
        raise ValueError(f"{model.family} has no recurrent layers")
    rows = (turn.decode_rows, turn.chunk_tokens)
    conv = short_conv.ConvSpec(*rows, sizes.conv_channels, sizes.conv_width, config.dtype)
    yield short_conv.choice(conv, config.target)
    if isinstance(sizes, DeltaRule):
        heads = (sizes.key_heads, sizes.value_heads, sizes.key_dim, sizes.value_dim)
        yield gated_delta.choice(gated_delta.DeltaSpec(*rows, *heads, config.dtype, turn.room), config.target)
    else:
        heads = (sizes.num_heads, sizes.head_dim, sizes.state_dim, sizes.groups)
        yield ssd.choice(ssd.SSDSpec(*rows, *heads, config.dtype, turn.room), config.target)


def _attention_choices(
    model: ModelConfig, config: EngineConfig, layout: KVLayout, layer: LayerSpec, turn: Turn
) -> Iterator[Choice]:
    """Of the attention calls of a layer in one program."""
    shared: dict[str, Any] = {
        "pages_per_seq": config.max_pages_per_seq,
        "q_heads": model.num_q_heads,
        "page_size": config.part_size,
        "dtype": config.dtype,
        "layout": layout,
    }
    parts = config.shards.count("sequence")
    how: dict[str, Any] = {
        "softcap": model.attention_softcap,
        "window": layer.window,
        "sinks": model.attention_sinks,
        "parts": parts,
    }
    if turn.decode_rows:
        decode = AttentionSpec(kind="decode", tokens=turn.decode_rows, rows=turn.decode_rows, **shared, **how)
        yield paged_attention.choice(decode, config.target)
    prefill: dict[str, Any] = {"tokens": turn.chunk_tokens, "rows": turn.chunks}
    latent, queries = model.latent, turn.room or turn.chunk_tokens
    if turn.chunk_tokens and latent is not None and parts == 1 and expands(model, layer, queries):
        sizes: dict[str, Any] = {"nope_dim": latent.nope_dim, "value_dim": latent.value_dim}
        yield latent_attention.choice(ExpandedSpec(**prefill, **shared, **sizes), config.target)
    elif turn.chunk_tokens:
        yield paged_attention.choice(AttentionSpec(kind="prefill", **prefill, **shared, **how), config.target)
