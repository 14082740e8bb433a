"""Attention over a paged KV cache: `decode_attention` and `prefill_attention`."""

from pallas_kernels.paged_attention.api import decode_attention, prefill_attention

__all__ = ["decode_attention", "prefill_attention"]
