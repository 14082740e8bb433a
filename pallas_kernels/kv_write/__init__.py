"""Scatter of new keys and values into pages: `write_kv`."""

from pallas_kernels.kv_write.api import write_kv

__all__ = ["write_kv"]
