"""Attention over a paged KV cache: `decode_attention` and `prefill_attention`."""

from pallas_kernels.paged_attention.api import decode_attention, decode_part, prefill_attention, prefill_part

__all__ = ["decode_attention", "decode_part", "prefill_attention", "prefill_part"]
