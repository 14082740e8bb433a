"""Attention over a paged KV cache: public functions, their checks, and the choice of implementation.

Common to both: kv_pages is [pages, page_size, layout.width] in the layout's dtype (see `kv_layout`);
block_tables is int32 [rows, pages_per_seq], entry j holding positions [j * page_size, ...) of
its row; entries past a row's length must be valid page ids, their content may be anything,
NaN included. Query head h reads KV head h // (q_heads // kv_heads). Scores are
softcap(scale * q.k), softmax in float32; with a window, query i sees keys (i - window, i].
sinks: float32 [q_heads], a score that each head's softmax counts beside its keys (arXiv 2309.17453
as in gpt-oss: learned, without a value).

Over a latent layout (MLA in its absorbed form, arXiv 2405.04434) every query head reads the one
vector of a token, and the result is [tokens, q_heads, layout.value_dim].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jax import Array

from pallas_kernels.choice import Choice, Implementation, choose, never
from pallas_kernels.kv_layout import KVLayout, check_pages
from pallas_kernels.paged_attention import gpu, reference, tpu
from pallas_kernels.target import Target


@dataclass(frozen=True)
class AttentionSpec:
    """What a choice depends on. `tokens` counts queries, `rows` block tables."""

    kind: Literal["decode", "prefill"]
    tokens: int
    rows: int
    pages_per_seq: int
    q_heads: int
    page_size: int
    dtype: str  # of q and the result
    layout: KVLayout
    softcap: float | None = None
    window: int | None = None
    sinks: bool = False


DECODE: tuple[Implementation[AttentionSpec], ...] = (
    Implementation("tpu", tpu.declines, tpu.decode),
    Implementation("gpu", gpu.declines, gpu.decode),
    Implementation("reference", never, reference.decode),
)
PREFILL: tuple[Implementation[AttentionSpec], ...] = (
    Implementation("tpu", tpu.declines, tpu.prefill),
    Implementation("gpu", gpu.declines, gpu.prefill),
    Implementation("reference", never, reference.prefill),
)


def choice(spec: AttentionSpec, target: Target) -> Choice[AttentionSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    if spec.kind == "decode":
        return choose("decode_attention", DECODE, spec, target)
    return choose("prefill_attention", PREFILL, spec, target)


def decode_attention(
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    kv_lens: Array,
    *,
    layout: KVLayout,
    target: Target,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Array | None = None,
) -> Array:
    """One query a row: q [rows, q_heads, head_dim] at position kv_lens - 1; returns [rows, q_heads, layout.result_dim].

    kv_lens: int32 [rows], keys visible to the row, the query's own included; 0 marks an idle row,
    which comes back undefined but finite.
    """
    spec = _spec("decode", q, kv_pages, block_tables, kv_lens, layout, softcap, window, sinks)
    run = choice(spec, target).implementation.run
    return run(
        q,
        kv_pages,
        block_tables,
        kv_lens,
        layout=layout,
        target=target,
        scale=scale,
        softcap=softcap,
        window=window,
        sinks=sinks,
    )


def prefill_attention(
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    q_starts: Array,
    q_lens: Array,
    positions: Array,
    *,
    layout: KVLayout,
    target: Target,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Array | None = None,
) -> Array:
    """Chunks of several prompts on one token axis: q [tokens, q_heads, head_dim]; as decode, a token a row.

    Row r owns tokens [q_starts[r], q_starts[r] + q_lens[r]), the first at position positions[r];
    rows are ascending and do not overlap; idle rows have q_lens 0 and come last. Keys [0, positions[r] +
    q_lens[r]) must already be in the pages. Tokens of no row come back undefined but finite.
    """
    spec = _spec("prefill", q, kv_pages, block_tables, q_lens, layout, softcap, window, sinks)
    run = choice(spec, target).implementation.run
    return run(
        q,
        kv_pages,
        block_tables,
        q_starts,
        q_lens,
        positions,
        layout=layout,
        target=target,
        scale=scale,
        softcap=softcap,
        window=window,
        sinks=sinks,
    )


def _spec(
    kind: Literal["decode", "prefill"],
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    lens: Array,
    layout: KVLayout,
    softcap: float | None,
    window: int | None,
    sinks: Array | None,
) -> AttentionSpec:
    """The call's spec, once its shapes fit together; ValueError names the numbers that do not."""
    tokens, q_heads, head_dim = q.shape
    if head_dim != layout.head_dim:
        raise ValueError(f"q has head_dim {head_dim}, the layout {layout.head_dim}")
    check_pages(kv_pages, layout)
    if not layout.quantized and kv_pages.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}, pages are {kv_pages.dtype}; only quantized pages may differ from q")
    if q_heads % layout.kv_heads:
        raise ValueError(f"q_heads {q_heads} must be a multiple of kv_heads {layout.kv_heads}")
    if block_tables.shape[0] != lens.shape[0]:
        raise ValueError(f"block_tables has {block_tables.shape[0]} rows, lengths {lens.shape[0]}")
    if kind == "decode" and tokens != lens.shape[0]:
        raise ValueError(f"q has {tokens} rows, lengths {lens.shape[0]}")
    if sinks is not None and sinks.shape != (q_heads,):
        raise ValueError(f"sinks {sinks.shape} must be one a query head, ({q_heads},)")
    return AttentionSpec(
        kind=kind,
        tokens=tokens,
        rows=block_tables.shape[0],
        pages_per_seq=block_tables.shape[1],
        q_heads=q_heads,
        page_size=kv_pages.shape[1],
        dtype=str(q.dtype),
        layout=layout,
        softcap=softcap,
        window=window,
        sinks=sinks is not None,
    )
