"""The activation of a gated MLP: `gated`."""

from pallas_kernels.gated.api import gated
from pallas_kernels.gated.reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "gated"]
