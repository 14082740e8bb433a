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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from jax import Array

from pallas_kernels.choice import Choice, Implementation, choose, mosaic, never
from pallas_kernels.kv_layout import KVLayout, check_pages
from pallas_kernels.paged_attention import cpu, reference
from pallas_kernels.paged_attention.part import Part
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
    parts: int = 1  # devices that each page is spread over; page_size is of one part


DECODE: tuple[Implementation[AttentionSpec], ...] = (
    mosaic("tpu", "pallas_kernels.paged_attention.tpu", "decode"),
    mosaic("gpu", "pallas_kernels.paged_attention.gpu", "decode"),
    Implementation("cpu", cpu.declines, cpu.decode),
    Implementation("reference", never, reference.decode),
)
PREFILL: tuple[Implementation[AttentionSpec], ...] = (
    mosaic("tpu", "pallas_kernels.paged_attention.tpu", "prefill"),
    mosaic("gpu", "pallas_kernels.paged_attention.gpu", "prefill"),
    Implementation("cpu", cpu.declines, cpu.prefill),
    Implementation("reference", never, reference.prefill),
)


def _keeps_no_sums(spec: AttentionSpec, target: Target) -> str | None:
    """Over one device's part of the pages a kernel would have to see other keys, and return its log-sum-exp."""
    return "reads whole pages and returns no log-sum-exp"


DECODE_PART: tuple[Implementation[AttentionSpec], ...] = (
    mosaic("tpu", "pallas_kernels.paged_attention.tpu", "decode_part"),
    replace(mosaic("gpu", "pallas_kernels.paged_attention.gpu", "decode"), declines=_keeps_no_sums),
    Implementation("cpu", _keeps_no_sums, cpu.decode),
    Implementation("reference", never, reference.decode_part),
)
PREFILL_PART: tuple[Implementation[AttentionSpec], ...] = (
    mosaic("tpu", "pallas_kernels.paged_attention.tpu", "prefill_part"),
    replace(mosaic("gpu", "pallas_kernels.paged_attention.gpu", "prefill"), declines=_keeps_no_sums),
    Implementation("cpu", _keeps_no_sums, cpu.prefill),
    Implementation("reference", never, reference.prefill_part),
)


def choice(spec: AttentionSpec, target: Target) -> Choice[AttentionSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    whole, parts = (DECODE, DECODE_PART) if spec.kind == "decode" else (PREFILL, PREFILL_PART)
    candidates = whole if spec.parts == 1 else parts
    return choose(f"{spec.kind}_attention", candidates, spec, target)


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
    how: dict[str, Any] = {"layout": layout, "target": target, "softcap": softcap, "window": window, "sinks": sinks}
    run = _implementation("decode", q, kv_pages, block_tables, kv_lens, 1, **how)
    return run(q, kv_pages, block_tables, kv_lens, scale=scale, **how)


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
    how: dict[str, Any] = {"layout": layout, "target": target, "softcap": softcap, "window": window, "sinks": sinks}
    run = _implementation("prefill", q, kv_pages, block_tables, q_lens, 1, **how)
    return run(q, kv_pages, block_tables, q_starts, q_lens, positions, scale=scale, **how)


def decode_part(
    q: Array, kv_pages: Array, block_tables: Array, kv_lens: Array, part: Part, **how: Any
) -> tuple[Array, Array]:
    """`decode_attention` over those keys that are in this device's part of the pages [pages, part of a page, width].

    Returns float32 values [rows, q_heads, layout.result_dim] and the log-sum-exp of their scores [rows, q_heads],
    about -1e30 where no key is here. kv_lens, and `how`, as for whole pages; sinks are counted where given.
    """
    run = _implementation("decode", q, kv_pages, block_tables, kv_lens, part.count, **how)
    return run(q, kv_pages, block_tables, kv_lens, part, **how)


def prefill_part(
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    q_starts: Array,
    q_lens: Array,
    positions: Array,
    part: Part,
    **how: Any,
) -> tuple[Array, Array]:
    """`prefill_attention` over the keys that are in this device's part of the pages; returns as `decode_part`."""
    run = _implementation("prefill", q, kv_pages, block_tables, q_lens, part.count, **how)
    return run(q, kv_pages, block_tables, q_starts, q_lens, positions, part, **how)


def _implementation(
    kind: Literal["decode", "prefill"],
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    lens: Array,
    parts: int,
    *,
    layout: KVLayout,
    target: Target,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Array | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """What serves the call, once its shapes fit together; ValueError names the numbers that do not."""
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
    spec = AttentionSpec(
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
        parts=parts,
    )
    return choice(spec, target).implementation.run
