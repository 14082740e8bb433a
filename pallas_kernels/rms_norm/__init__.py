"""Root-mean-square norms, with a residual added before or without: `rms_norm`, `add_rms_norm`."""

from pallas_kernels.rms_norm.api import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
