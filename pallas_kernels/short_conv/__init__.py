"""Causal convolution over the last few tokens of each sequence: `short_conv`."""

from pallas_kernels.short_conv.api import short_conv

__all__ = ["short_conv"]
