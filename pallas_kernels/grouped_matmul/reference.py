"""grouped_matmul in plain JAX: the fallback on every backend and the oracle of the kernels.

A loop over blocks of rows of one expert, so that the weights of experts without rows are neither
read nor computed with. Every block has the same shape, which gives a row's sum one order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.products import product
from pallas_kernels.quantized import Quantized, as_bits
from pallas_kernels.quantized_matmul import reference as quantized_matmul
from pallas_kernels.target import Target


def run(x: Array, w: Array | Quantized, group_sizes: Array, *, target: Target) -> Array:
    """x [tokens, K] by w [experts, K, N] -> [tokens, N]; see `api.grouped_matmul`. Rows of nobody are zeros."""
    tokens, (experts, _, columns) = x.shape[0], w.shape
    block = block_rows(tokens, experts)
    ends = jnp.minimum(jnp.cumsum(group_sizes), tokens)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    counts = (ends - starts + block - 1) // block
    blocks_end = jnp.cumsum(counts)
    padded = jnp.pad(x, ((0, block), (0, 0)))  # a slice past the end would be moved back
    whole = jax.tree.map(as_bits, w)  # XLA still copies float8 of every expert once a call, int8 not

    def one_block(i: Array, out: Array) -> Array:
        expert = jnp.searchsorted(blocks_end, i, side="right")
        start = starts[expert] + (i - blocks_end[expert] + counts[expert]) * block
        rows = lax.dynamic_slice_in_dim(padded, start, block)
        product = _product(rows, _expert(whole, expert, w), target)
        mine = start + jnp.arange(block) < ends[expert]
        # The rows past this expert's end are the next block's to write.
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine[:, None], product, 0), start, 0)

    out = jnp.zeros((tokens + block, columns), x.dtype)
    return lax.fori_loop(0, blocks_end[-1], one_block, out)[:tokens]


def block_rows(tokens: int, experts: int) -> int:
    """Rows of a block: 8 to 64, near the mean group. Measured on a CPU; see docs/kernels/grouped_matmul.md."""
    mean = max(1, tokens // experts)
    return min(64, max(8, 1 << (mean.bit_length() - 1)))


def _expert(whole: Array | Quantized, expert: Array, w: Array | Quantized) -> Array | Quantized:
    """One expert's weight [K, N], in w's dtypes."""
    cut = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, expert, keepdims=False), whole)
    return jax.tree.map(lambda leaf, like: lax.bitcast_convert_type(leaf, like.dtype), cut, w)


def _product(x: Array, w: Array | Quantized, target: Target) -> Array:
    if isinstance(w, Quantized):
        return quantized_matmul.run(x, w, target=target, dtype=x.dtype)
    return product("tk,kn->tn", x, w).astype(x.dtype)
