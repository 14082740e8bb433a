"""What one device does in one step, counted from shapes: FLOPs, bytes of its memory, collectives. Nothing is compiled.

What is counted: every matrix that a step reads, once (of experts those that some token is expected to choose, were
choices even); a product's input and output, once each, whatever is elementwise being fused; keys and values that some
query sees, once a step, and those written; logits, written once and read twice. Tokens are those of the bucket that
the step runs in, sequences those that are there. Masks, penalties and log-probabilities, which only requests that ask
for them run, are not counted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from engine.attend import expands
from engine.chained import turns_a_token
from engine.config import EngineConfig
from engine.estimate.links import Collective, Kind
from engine.model.config import LayerSpec, ModelConfig
from engine.model.layers import Params
from engine.model.place import local_model, one_stage
from engine.pipeline import micro_of
from engine.programs import compute_of, local_shapes
from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.quantized import Quantized, tree_bytes

EXPERT_AXES = ("experts", "expert_mlp")
# Products that see the tokens of all groups of requests over which their layer's weights are cut.
SEES_ALL = {
    **dict.fromkeys(("gate_up", "down", "shared_gate_up", "shared_down"), ("mlp",)), "router": EXPERT_AXES,
}  # fmt: skip
VECTORS = ("conv",)  # two dimensions, and no matrix
LOGITS_PASSES = 3  # one write; one read to see that they are finite, one to draw


@dataclass(frozen=True)
class Span:
    """Sequences with so many new tokens each, behind `start` that are in the cache."""

    tokens: int
    start: int
    sequences: int = 1

    @property
    def length(self) -> int:
        return self.start + self.tokens

    def pairs(self, window: int | None) -> int:
        """Of a query and a key that it sees, in all of the sequences."""
        if window is None:
            return self.sequences * (self.tokens * self.length - self.tokens * (self.tokens - 1) // 2)
        short = max(0, min(self.tokens, window - self.start))  # queries that see everything before them
        return self.sequences * (short * self.start + short * (short + 1) // 2 + (self.tokens - short) * window)

    def keys(self, window: int | None) -> int:
        """That some query sees, in all of the sequences."""
        return self.sequences * (self.length if window is None else min(self.length, window + self.tokens - 1))


@dataclass(frozen=True)
class Step:
    """One call of a step program, or one turn of its loop: tokens that are computed, rows that draw, and for whom.

    Of one group of requests, the fullest; the others go along with as many tokens.
    """

    tokens: int
    drawn: int
    spans: tuple[Span, ...]
    each: int = 0  # `engine.attend.PrefillRows.each`


@dataclass(frozen=True)
class Count:
    """Of one device in one step."""

    flops: tuple[tuple[str, float], ...] = ()  # of products, by the dtype of their operands
    weight_bytes: float = 0.0
    cache_bytes: float = 0.0
    activation_bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()

    def __add__(self, other: Count) -> Count:
        flops = dict(self.flops)
        for dtype, number in other.flops:
            flops[dtype] = flops.get(dtype, 0.0) + number
        return Count(
            tuple(flops.items()),
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
            self.activation_bytes + other.activation_bytes,
            self.collectives + other.collectives,
        )

    def __mul__(self, times: float) -> Count:
        """So many of them, one after the other; chained steps take parts of a turn."""
        return Count(
            tuple((dtype, number * times) for dtype, number in self.flops),
            self.weight_bytes * times,
            self.cache_bytes * times,
            self.activation_bytes * times,
            tuple(replace(call, count=call.count * times) for call in self.collectives),
        )

    @property
    def all_flops(self) -> float:
        return sum(number for _, number in self.flops)

    @property
    def memory_bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes


def decode_step(config: EngineConfig, batch: int, context: int) -> Step:
    """One token of each of `batch` sequences of `context` tokens, it included. ValueError over max_num_seqs."""
    each = -(-batch // config.num_groups)
    rows = next((rows for rows in config.decode_buckets if rows >= each), None)
    if rows is None:
        raise ValueError(f"a batch of {batch}; at most {config.num_groups * config.max_num_seqs} sequences run at once")
    return Step(rows, rows, (Span(1, context - 1, each),))


def prefill_steps(config: EngineConfig, length: int) -> list[Step]:
    """The chunks of one prompt, alone on the device, first to last."""
    starts = range(0, length, config.max_num_batched_tokens)
    spans = [Span(min(config.max_num_batched_tokens, length - start), start) for start in starts]
    return [
        Step(next(t for t in config.token_buckets if t >= span.tokens), config.max_prefill_rows, (span,))
        for span in spans
    ]


def count_step(model: ModelConfig, config: EngineConfig, step: Step) -> Count:
    """What one device does in the step. Layers of a kind are alike, but for those that a checkpoint has packed."""
    alike = not config.stored and not config.shards.in_layers
    layers = one_stage(model, config.shards).layers
    kinds = tuple(dict.fromkeys(layers)) if alike else layers
    times = [layers.count(kind) if alike else 1 for kind in kinds]
    return _Counter(replace(model, layers=kinds * config.shards.count("layers")), config, step).count(times)


class _Counter:
    def __init__(self, model: ModelConfig, config: EngineConfig, step: Step) -> None:
        self.step, self.config, self.shards = step, config, config.shards
        self.model = local_model(model, config.shards)  # one device's heads and widths
        self.layout: KVLayout = compute_of(model, config).kv
        self.item = jnp.dtype(config.dtype).itemsize
        self.params = local_shapes(model, config)
        self.num_micro = 1  # of which this is one

    def _at(self, scope: str) -> _Counter:
        """For the parameters of one scope."""
        here = copy.copy(self)
        here.shards = self.shards.at(scope)
        return here

    def count(self, times: Sequence[int]) -> Count:
        """times: how often a stage, or the model, has each of the layers."""
        head = next(name for name in ("packed_head", "lm_head", "embed") if name in self.params)
        once, turns = self._in_turns()
        ends, times_ends = (once, turns) if self._is_chained else (self, 1)
        total = (ends._at("embed")._embedding() + ends._at(head)._logits(self.params[head])) * times_ends
        layers: dict[str, Params] = {}
        for name, weight in self.params.items():
            if name.startswith("layers."):
                _, layer, short = name.split(".", 2)
                layers.setdefault(layer, {})[short] = weight
        for i, (spec, often) in enumerate(zip(self.model.layers, times, strict=True)):
            total += sum(once._at(f"layers.{i}")._layer(spec, layers[str(i)]), Count()) * (often * turns)
        return total + Count(collectives=self._handed_on(once.step.tokens, turns))

    @property
    def _decodes(self) -> bool:
        return self.step.spans[0].tokens == 1

    @property
    def _is_chained(self) -> bool:
        return self.config.chains_steps and self._decodes

    def _in_turns(self) -> tuple[_Counter, float]:
        """For one turn of a stage, and how many there are, one behind the other: see `engine.pipeline`, and of decode
        steps that follow each other `engine.chained`."""
        stages, tokens = self.shards.count("layers"), self.step.tokens
        if stages == 1:
            return self, 1
        micro = micro_of(stages, tokens, 0) if self._decodes else micro_of(stages, 0, tokens)
        once, turns = copy.copy(self), float(micro.turns(stages))
        once.step, once.num_micro = replace(self.step, tokens=micro.rows + micro.tokens), micro.count
        if self._is_chained:
            turns = turns_a_token(self.config)
            once.step, once.num_micro = replace(once.step, drawn=micro.rows), stages
        return once, turns

    def _handed_on(self, tokens: int, turns: float) -> tuple[Collective, ...]:
        """From stage to stage, and from the last one to all: at once behind the last turn, or chained in each."""
        axes, size = self.shards.axes("layers"), float(self.model.hidden_size * self.item)
        if not axes:
            return ()
        if self._is_chained:
            kinds: tuple[Kind, ...] = ("collective-permute", "all-reduce")
            return tuple(Collective(kind, axes, size * tokens, turns) for kind in kinds)
        onward = Collective("collective-permute", axes, size * tokens, turns - 1)
        return onward, Collective("all-reduce", axes, size * self.step.tokens)

    def _embedding(self) -> Count:
        moved = 2 * self.step.tokens * self.model.hidden_size * self.item
        return Count(activation_bytes=moved, collectives=self._sum("vocab"))

    def _logits(self, weight: Any) -> Count:
        drawn = self.step.drawn
        if not drawn:  # a draft model that reads prompts
            return Count()
        whole = 4.0 * drawn * self.model.vocab_size
        gather = Collective("all-gather", self.shards.axes("vocab"), whole)
        columns, rows = weight.shape[::-1] if isinstance(weight, Quantized) else weight.shape
        product = self._product(weight, drawn, columns=columns, rows=rows)
        passes = Count(activation_bytes=LOGITS_PASSES * whole, collectives=(gather,) if gather.axes else ())
        return product + Count(weight_bytes=tree_bytes(weight)) + passes

    def _layer(self, spec: LayerSpec, weights: Params) -> Iterator[Count]:
        for name, weight in weights.items():
            if name.startswith("experts_"):
                yield self._experts(weight)
                continue
            yield Count(weight_bytes=tree_bytes(weight))
            if len(weight.shape) == 2 and name not in VECTORS:
                yield self._product(weight, self._tokens(*SEES_ALL.get(name, ())), *weight.shape)
        yield self._recurrence() if spec.recurrent else self._attention(spec)
        heads = "kv_heads" if self.model.latent is None else "q_heads"
        if not spec.recurrent:
            yield Count(collectives=self._sum(heads))
        if self.model.qk_norm == "full" and not spec.recurrent:  # squares of queries, and of keys
            yield Count(collectives=2 * self._sum(heads, 4))
        if spec.ffn == "experts":
            yield Count(collectives=self._gathered(*EXPERT_AXES))
        if spec.ffn == "gated" or "shared_down" in weights:
            yield Count(collectives=self._gathered("mlp"))

    def _product(self, weight: Any, tokens: float, rows: int, columns: int) -> Count:
        """Of activations [tokens, rows] with a matrix; its own bytes are counted elsewhere."""
        flops = 2.0 * tokens * rows * columns
        return Count(((self._operands(weight), flops),), activation_bytes=tokens * (rows + columns) * self.item)

    def _operands(self, weight: Any) -> str:
        """The dtype that the product runs in: packed weights are widened, unless activations are packed too."""
        if not isinstance(weight, Quantized) or weight.activations == "float":
            return self.config.dtype
        return weight.format if weight.activations == "dynamic" else "int8"

    def _experts(self, weight: Any) -> Count:
        """Matrices [experts here, rows, columns], or vectors, of experts."""
        experts = self.model.experts
        if experts is None:
            raise ValueError("the config has no experts")
        tokens = self._tokens(*EXPERT_AXES)
        missed = (1 - experts.per_token / experts.num_experts) ** tokens
        read = Count(weight_bytes=tree_bytes(weight) * (1 - missed))
        if len(weight.shape) != 3:
            return read
        rows = tokens * experts.per_token / self.shards.count("experts")
        return read + self._product(weight, rows, *weight.shape[1:])

    def _attention(self, spec: LayerSpec) -> Count:
        """Of the keys that this device has, and of the queries that are in one micro-batch: even shares."""
        parts = self.shards.count("sequence") * self.num_micro
        pairs = sum(span.pairs(spec.window) for span in self.step.spans) / parts
        keys = sum(span.keys(spec.window) for span in self.step.spans) / parts
        new = sum(span.tokens * span.sequences for span in self.step.spans) / parts
        heads, flops = self.model.num_q_heads, 0.0
        if self.model.latent is None:
            flops = 2.0 * heads * 2 * self.model.head_dim * pairs
        else:
            flops = heads * self._latent_flops(spec, pairs, keys)
        cache_bytes = (keys + new) * self.layout.token_bytes
        return Count(((self.config.dtype, flops),), cache_bytes=cache_bytes, collectives=self._merged(heads))

    def _merged(self, heads: int) -> tuple[Collective, ...]:
        """Of attention over parts of the pages: the highest scores, then float32 values and what divides them."""
        axes = self.shards.axes("sequence")
        each = 4.0 * self.step.tokens * heads
        sizes = (each, each * (self.layout.result_dim + 1))
        return tuple(Collective("all-reduce", axes, size) for size in sizes) if axes else ()

    def _latent_flops(self, spec: LayerSpec, pairs: float, keys: float) -> float:
        """Of one head: expanded where the step does so, else absorbed. See `engine.attend.expands`."""
        latent, tokens = self.model.latent, self.step.tokens
        if latent is None:
            raise ValueError("the config has no latent")
        up = latent.kv_rank * (latent.nope_dim + latent.value_dim)
        is_whole = self.shards.count("sequence") == 1
        if self.step.spans[0].tokens > 1 and is_whole and expands(self.model, spec, self.step.each or tokens):
            return 2.0 * (keys * up + pairs * (latent.nope_dim + latent.rope_dim + latent.value_dim))
        return 2.0 * (tokens * up + pairs * (latent.row_dim + latent.kv_rank))

    def _recurrence(self) -> Count:
        """A state is read and written a sequence; a token updates it and reads it: two products a number of it."""
        sizes = self.model.recurrence
        if sizes is None:
            raise ValueError("the config has no recurrence")
        state = math.prod(sizes.state_shape)
        sequences = sum(span.sequences for span in self.step.spans)
        window = (sizes.conv_width - 1) * sizes.conv_channels * self.item
        flops = self.step.tokens * (4.0 * state + 2.0 * sizes.conv_width * sizes.conv_channels)
        return Count((("float32", flops),), cache_bytes=2.0 * sequences * (4 * state + window))

    def _sum(self, logical: str, token_bytes: int | None = None) -> tuple[Collective, ...]:
        """Of activations [tokens, hidden] over the mesh axes of a logical axis."""
        axes = self.shards.axes(logical)
        size = self.model.hidden_size * self.item if token_bytes is None else token_bytes
        return (Collective("all-reduce", axes, float(self.step.tokens * size)),) if axes else ()

    def _gathered(self, *logical: str) -> tuple[Collective, ...]:
        """Around a layer's MLP: the groups' tokens before it, and sums after it, of which each group gets its own."""
        groups, axes = self.shards.group_axes(*logical), self.shards.other_axes(*logical)
        size = float(self._tokens(*logical) * self.model.hidden_size * self.item)
        sums = (Collective("all-reduce", axes, size),) if axes else ()
        if not groups:
            return sums
        return (Collective("all-gather", groups, size), *sums, Collective("reduce-scatter", groups, size))

    def _tokens(self, *logical: str) -> int:
        """That a product with a weight of these axes sees on each device."""
        return self.step.tokens * self.shards.parts(self.shards.group_axes(*logical))
