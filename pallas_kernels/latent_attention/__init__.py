"""Multi-head latent attention over expanded keys and values: `expanded_prefill`."""

from pallas_kernels.latent_attention.api import expanded_prefill

__all__ = ["expanded_prefill"]
