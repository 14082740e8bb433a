"""The gated delta rule of linear attention: `gated_delta`."""

from pallas_kernels.gated_delta.api import gated_delta

__all__ = ["gated_delta"]
