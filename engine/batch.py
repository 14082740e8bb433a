"""`StepPlan` -> one padded int32 vector, and the lattice of shapes that steps come in.

The vector's layout is a list of named fields, packed by numpy here and unpacked inside the
step program: one transfer a step. A new buffer every step: JAX may alias host memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.pages import TRASH_PAGE
from engine.plan import DecodeRows, PrefillRow, StepPlan
from engine.request import MAX_LOGIT_BIAS, MAX_STOP_IDS
from engine.sequence import Sequence

# Bits of a row's `flags`: which of the device's heavy rows belong to the sequence.
USES_COUNTS, USES_BIAS, USES_MASK, USES_LOGPROBS = 1, 2, 4, 8


@dataclass(frozen=True)
class Field:
    name: str
    shape: tuple[int, ...]
    dtype: str  # int32 or float32: both are 4 bytes, floats travel as bits
    fill: int = 0


@dataclass(frozen=True)
class Layout:
    """Named fields in one int32 vector."""

    fields: tuple[Field, ...]

    @property
    def size(self) -> int:
        return sum(math.prod(f.shape) for f in self.fields)

    def pack(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A new vector and a writable view of each field, filled with its idle value."""
        vector = np.zeros(self.size, np.int32)
        views = self.split(vector, lambda part, f: part.view(f.dtype).reshape(f.shape))
        for f in self.fields:
            if f.fill:
                views[f.name].fill(f.fill)
        return vector, views

    def split(self, vector: Any, convert: Callable[[Any, Field], Any]) -> dict[str, Any]:
        """Cut a vector (numpy or traced) into its fields."""
        out, start = {}, 0
        for f in self.fields:
            out[f.name] = convert(vector[start : start + math.prod(f.shape)], f)
            start += math.prod(f.shape)
        return out


SAMPLING_FLOATS = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
SAMPLING_INTS = ("top_k", "seed_high", "seed_low", "min_len", "max_len", "flags")


@dataclass(frozen=True, order=True)
class StepKey:
    """Names one step program: prefill tokens (0: a decode step), decode rows, and tokens proposed for each of them."""

    tokens: int
    rows: int
    drafts: int = 0

    @property
    def name(self) -> str:
        if self.tokens:
            return f"prefill_{self.tokens}_{self.rows}"
        return f"verify_{self.rows}" if self.drafts else f"decode_{self.rows}"


def lattice(config: EngineConfig) -> list[StepKey]:
    """Every step program that serving can need: the closed set."""
    prefill = [StepKey(t, d) for t in config.token_buckets for d in config.prefill_decode_buckets]
    ways = [0, config.draft_tokens] if config.draft_tokens else [0]
    return prefill + [StepKey(0, rows, drafts) for rows in config.decode_buckets for drafts in ways]


def step_layout(config: EngineConfig, key: StepKey) -> Layout:
    """Fields of a step's vector. Idle rows name the idle slot; idle prefill rows come last."""
    idle = config.max_num_seqs
    new_pages = 1 if key.tokens else -(-config.most_steps(key.drafts) // config.page_size)
    decode = [
        Field("decode_slot", (key.rows,), "int32", idle),
        Field("decode_count", (key.rows,), "int32"),
        Field("first_new_page", (key.rows,), "int32"),
        Field("new_pages", (key.rows, new_pages), "int32", -1),
    ]
    if config.state_checkpoints is not None:
        decode += [
            Field("decode_checkpoint", (key.rows,), "int32", -1),
            Field("decode_checkpoint_at", (key.rows,), "int32"),
        ]
    if key.tokens == 0:
        return Layout(tuple(decode))
    rows = config.max_prefill_rows
    prefill = [
        Field("tokens", (key.tokens,), "int32"),
        Field("next_tokens", (key.tokens,), "int32"),
        Field("wants_prompt_logprobs", (), "int32"),
        Field("slot", (rows,), "int32", idle),
        Field("q_start", (rows,), "int32"),
        Field("q_len", (rows,), "int32"),
        Field("position", (rows,), "int32"),
        Field("samples", (rows,), "int32"),
        Field("block_table", (rows, config.max_pages_per_seq), "int32", TRASH_PAGE),
        *(Field(name, (rows,), "float32") for name in SAMPLING_FLOATS),
        *(Field(name, (rows,), "int32") for name in SAMPLING_INTS),
        Field("stop_ids", (rows, MAX_STOP_IDS), "int32", -1),
    ]
    if config.state_checkpoints is not None:
        prefill += [
            Field("state_source", (rows,), "int32", -1),
            Field("checkpoint", (rows,), "int32", -1),
            Field("checkpoint_at", (rows,), "int32"),
        ]
    return Layout(tuple(decode + prefill))


def step_key(config: EngineConfig, plan: StepPlan) -> StepKey:
    """The smallest program that holds the plan, of each group its own."""
    parts = parts_of(config, plan)
    num_decode = max(len(part.decode_rows) for part in parts)
    if not plan.prefill_rows:
        return StepKey(0, _bucket(config.decode_buckets, num_decode), plan.drafts)
    return StepKey(
        _bucket(config.token_buckets, max(part.num_prefill_tokens for part in parts)),
        _bucket(config.prefill_decode_buckets, num_decode),
    )


def parts_of(config: EngineConfig, plan: StepPlan) -> list[StepPlan]:
    """The plan of each group of requests."""
    return [plan] if config.num_groups == 1 else [plan.of_group(group) for group in range(config.num_groups)]


def build(config: EngineConfig, key: StepKey, layout: Layout, plan: StepPlan) -> np.ndarray:
    """The plan as the vector that program `key` takes: of each group its own, one behind the other."""
    vectors = [_build_part(layout, part) for part in parts_of(config, plan)]
    return vectors[0] if len(vectors) == 1 else np.concatenate(vectors)


def _build_part(layout: Layout, plan: StepPlan) -> np.ndarray:
    vector, fields = layout.pack()
    _fill_decode(fields, plan.decode_rows)
    start = 0
    for i, row in enumerate(plan.prefill_rows):
        _fill_prefill(fields, i, row, start)
        start += row.count
    return vector


def _fill_decode(fields: Mapping[str, np.ndarray], rows: DecodeRows) -> None:
    fields["decode_slot"][: len(rows)] = [seq.slot for seq in rows.seqs]
    fields["decode_count"][: len(rows)] = rows.counts
    for i, (first_new_page, new_pages) in rows.pages.items():
        fields["first_new_page"][i] = first_new_page
        fields["new_pages"][i, : len(new_pages)] = new_pages
    for i, state in rows.states.items():
        fields["decode_checkpoint"][i] = state.copy_to
        fields["decode_checkpoint_at"][i] = rows.starts[i] + state.copy_at - 1  # position of the last token in it


def _fill_prefill(fields: Mapping[str, np.ndarray], i: int, row: PrefillRow, start: int) -> None:
    seq, end = row.seq, row.start + row.count
    fields["tokens"][start : start + row.count] = seq.token_ids[row.start : end]
    following = seq.token_ids[row.start + 1 : end + 1]
    fields["next_tokens"][start : start + len(following)] = following
    fields["wants_prompt_logprobs"][...] |= row.wants_prompt_logprobs
    fields["slot"][i] = seq.slot
    fields["q_start"][i] = start
    fields["q_len"][i] = row.count
    fields["position"][i] = row.start
    fields["samples"][i] = row.samples
    fields["block_table"][i, : len(seq.pages)] = seq.pages
    for name, value in sampling_row(seq).items():
        fields[name][i] = value
    ids = tuple(sorted(seq.stop_ids))
    fields["stop_ids"][i, : len(ids)] = ids
    if row.state is not None:
        fields["state_source"][i] = row.state.source
        fields["checkpoint"][i] = row.state.copy_to
        fields["checkpoint_at"][i] = row.state.copy_at


def sampling_row(seq: Sequence) -> dict[str, float]:
    """The scalar sampling parameters of a sequence, as the device holds them."""
    params = seq.request.params
    seed = np.array([seq.seed >> 32, seq.seed & 0xFFFFFFFF], np.uint32).view(np.int32)
    flags = (
        (USES_COUNTS if params.uses_penalties else 0)
        | (USES_BIAS if params.logit_bias else 0)
        | (USES_MASK if params.allowed_token_ids is not None or seq.request.banned_token_ids else 0)
        | (USES_LOGPROBS if params.logprobs is not None else 0)
    )
    return {
        **{name: getattr(params, name) for name in SAMPLING_FLOATS},
        "top_k": max(params.top_k, 0),
        "seed_high": int(seed[0]),
        "seed_low": int(seed[1]),
        "min_len": seq.prompt_len + params.min_tokens,
        "max_len": seq.max_total_len,
        "flags": flags,
    }


def needs_configure(config: EngineConfig, seq: Sequence) -> bool:
    """Whether the sequence uses rows of `Slots` that do not travel with every prefill."""
    return bool(config.draft_tokens or int(sampling_row(seq)["flags"]) & (USES_COUNTS | USES_BIAS | USES_MASK))


def configure_layout(config: EngineConfig, vocab_size: int) -> Layout:
    """Fields of the vector that fills the heavy rows of one slot."""
    return Layout((
        Field("slot", (), "int32", config.max_num_seqs),
        Field("tokens", (config.max_model_len,), "int32", vocab_size),  # out of range: counted nowhere
        Field("prompt_len", (), "int32"),
        Field("bias_ids", (MAX_LOGIT_BIAS,), "int32", vocab_size),
        Field("bias_values", (MAX_LOGIT_BIAS,), "float32"),
        Field("allowed_bits", (-(-vocab_size // 32),), "int32"),
    ))  # fmt: skip


def idle_vector(config: EngineConfig, layout: Layout) -> np.ndarray:
    """A step in which nobody does anything."""
    return np.tile(layout.pack()[0], config.num_groups)


def build_configure(config: EngineConfig, layout: Layout, seq: Sequence, vocab_size: int) -> np.ndarray:
    """History, biases and allowed tokens of one sequence; the other groups fill their idle slot."""
    vectors = [_configure_vector(layout, seq, vocab_size) if group == seq.group else layout.pack()[0]
               for group in range(config.num_groups)]  # fmt: skip
    return np.concatenate(vectors)


def _configure_vector(layout: Layout, seq: Sequence, vocab_size: int) -> np.ndarray:
    vector, fields = layout.pack()
    request = seq.request
    fields["slot"][...] = seq.slot
    fields["tokens"][: len(seq.token_ids)] = seq.token_ids
    fields["prompt_len"][...] = seq.prompt_len
    for i, (token, bias) in enumerate(sorted(request.params.logit_bias.items())):
        fields["bias_ids"][i], fields["bias_values"][i] = token, bias
    allowed = np.ones(-(-vocab_size // 32) * 32, np.uint8)
    if request.params.allowed_token_ids is not None:
        allowed[:] = 0
        allowed[list(request.params.allowed_token_ids)] = 1
    allowed[list(request.banned_token_ids)] = 0
    fields["allowed_bits"][:] = np.packbits(allowed, bitorder="little").view("<i4")
    return vector


def _bucket(sizes: tuple[int, ...], count: int) -> int:
    return next(size for size in sizes if size >= count)
