"""Writing new keys and values into their pages, in place when the pages are donated."""

from __future__ import annotations

from dataclasses import dataclass

from jax import Array

from pallas_kernels.choice import Choice, Implementation, choose, mosaic, never
from pallas_kernels.kv_layout import KVLayout, check_pages, check_rows, pack_rows
from pallas_kernels.kv_write import reference
from pallas_kernels.target import Target


@dataclass(frozen=True)
class WriteSpec:
    """What a choice depends on."""

    tokens: int
    page_size: int
    layout: KVLayout


CANDIDATES: tuple[Implementation[WriteSpec], ...] = (
    mosaic("tpu", "pallas_kernels.kv_write.tpu", "write_rows"),
    Implementation("reference", never, reference.write_rows),
)


def choice(spec: WriteSpec, target: Target) -> Choice[WriteSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    return choose("kv_write", CANDIDATES, spec, target)


def write_kv(
    kv_pages: Array, k: Array, v: Array | None, page_ids: Array, offsets: Array, *, layout: KVLayout, target: Target
) -> Array:
    """kv_pages [pages, page_size, layout.width] with k and v [tokens, kv_heads, head_dim] stored.

    v is None for a latent layout, whose vector k [tokens, 1, head_dim] is both.

    page_ids, offsets: int32 [tokens], in range. Tokens without an owner go to the trash page;
    which of several stays there is undefined; no other place is written twice in a call.
    """
    check_rows(k, v, layout)
    check_pages(kv_pages, layout)
    run = choice(WriteSpec(k.shape[0], kv_pages.shape[1], layout), target).implementation.run
    return run(kv_pages, pack_rows(k, v, layout), page_ids, offsets, target=target)
