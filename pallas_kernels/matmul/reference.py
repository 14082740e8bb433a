"""matmul in plain JAX: what a TPU and a GPU run, the fallback on a CPU, and the oracle."""

from __future__ import annotations

import numpy as np
from jax import Array

from pallas_kernels.panels import Panels, whole
from pallas_kernels.products import product
from pallas_kernels.target import Target


def run(x: Array, w: Array | Panels, *, transposed: bool, target: Target, dtype: np.dtype) -> Array:
    """See `api.matmul`."""
    return product("tk,nk->tn" if transposed else "tk,kn->tn", x, whole(w)).astype(dtype)
