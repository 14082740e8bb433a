"""Prefill of multi-head latent attention (MLA, arXiv 2405.04434) with keys and values expanded.

`paged_attention` over a latent layout is the absorbed form: w_uk is multiplied into the query, and a
query head costs value_dim + head_dim (1088 for DeepSeek) a key, which decode's bandwidth hides. A
prompt has queries enough to pay for expanding a latent once: then a head costs
nope + rope + v_dim (320). Both forms give the same result but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

from jax import Array

from pallas_kernels.choice import Choice, Implementation, choose, never
from pallas_kernels.kv_layout import KVLayout, check_pages
from pallas_kernels.latent_attention import reference
from pallas_kernels.target import Target


@dataclass(frozen=True)
class ExpandedSpec:
    """What a choice depends on. `tokens` counts queries, `rows` block tables."""

    tokens: int
    rows: int
    pages_per_seq: int
    q_heads: int
    nope_dim: int  # of a query and an expanded key, without the rotary part
    value_dim: int  # of an expanded value
    page_size: int
    dtype: str  # of q, the weights and the result
    layout: KVLayout


CANDIDATES: tuple[Implementation[ExpandedSpec], ...] = (Implementation("reference", never, reference.prefill),)


def choice(spec: ExpandedSpec, target: Target) -> Choice[ExpandedSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    return choose("expanded_prefill", CANDIDATES, spec, target)


def expanded_prefill(
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    q_starts: Array,
    q_lens: Array,
    positions: Array,
    w_uk: Array,
    w_uv: Array,
    *,
    layout: KVLayout,
    target: Target,
    scale: float,
) -> Array:
    """Chunks of several prompts: q [tokens, q_heads, nope + rope] -> [tokens, q_heads, v_dim], causal.

    Pages, rows and positions are those of `paged_attention.prefill_attention` over a latent layout.
    A token's vector is its latent [rank], then the rotary key [rope] of all heads. Head h has the key
    [latent @ w_uk[h]; rotary key] and the value latent @ w_uv[h]:
    w_uk [q_heads, rank, nope], w_uv [q_heads, rank, v_dim], both of q's dtype.
    """
    spec = _spec(q, kv_pages, block_tables, q_lens, w_uk, w_uv, layout)
    run = choice(spec, target).implementation.run
    rows = (block_tables, q_starts, q_lens, positions)
    return run(q, kv_pages, *rows, w_uk, w_uv, layout=layout, target=target, scale=scale)


def _spec(
    q: Array, kv_pages: Array, block_tables: Array, lens: Array, w_uk: Array, w_uv: Array, layout: KVLayout
) -> ExpandedSpec:
    """The call's spec, once its shapes fit together; ValueError names the numbers that do not."""
    tokens, q_heads, head_dim = q.shape
    if layout.value_dim is None:
        raise ValueError(f"pages of {layout.kv_heads} heads of {layout.head_dim} are not latent: nothing to expand")
    check_pages(kv_pages, layout)
    rank, rope = layout.value_dim, layout.head_dim - layout.value_dim
    for name, weight in (("w_uk", w_uk), ("w_uv", w_uv)):
        if weight.ndim != 3 or weight.shape[:2] != (q_heads, rank):
            raise ValueError(f"{name} {weight.shape} must be [{q_heads}, {rank}, ...]: query heads, latent lanes")
        if weight.dtype != q.dtype:
            raise ValueError(f"q is {q.dtype}, {name} is {weight.dtype}")
    if head_dim != w_uk.shape[2] + rope:
        raise ValueError(f"q has head_dim {head_dim}, w_uk {w_uk.shape[2]} and the rotary key {rope}")
    if not layout.quantized and kv_pages.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}, pages are {kv_pages.dtype}; only quantized pages may differ from q")
    if block_tables.shape[0] != lens.shape[0]:
        raise ValueError(f"block_tables has {block_tables.shape[0]} rows, lengths {lens.shape[0]}")
    return ExpandedSpec(
        tokens=tokens,
        rows=block_tables.shape[0],
        pages_per_seq=block_tables.shape[1],
        q_heads=q_heads,
        nope_dim=w_uk.shape[2],
        value_dim=w_uv.shape[2],
        page_size=kv_pages.shape[1],
        dtype=str(q.dtype),
        layout=layout,
    )
