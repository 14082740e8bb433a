"""Short convolution in plain JAX: shifted copies of the tokens, and the window where a chunk begins."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.states import DecodeStates, PrefillStates, keep, replace_active, sources


def short_conv(
    x: Array, pool: Array, weight: Array, bias: Array | None, decode: DecodeStates, prefill: PrefillStates | None
) -> tuple[Array, Array]:
    """See `api.short_conv`."""
    num_decode = decode.rows.shape[0]
    parts = []
    if num_decode:
        out, windows = _one_token(x[:num_decode], pool[decode.rows], weight)
        pool = replace_active(pool, decode, windows)
        parts.append(out)
    if prefill is not None:
        windows = sources(pool, prefill).reshape(prefill.q_len.shape[0], -1, x.shape[1])
        out, last, copies = _chunks(x[num_decode:], windows, weight, prefill)
        pool = keep(pool, prefill, last, lambda: copies)
        parts.append(out)
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return (out if bias is None else out + bias[None].astype(jnp.float32)).astype(x.dtype), pool


def _one_token(x: Array, windows: Array, weight: Array) -> tuple[Array, Array]:
    """float32 [rows, channels] and the windows after one token a row."""
    rows, channels = x.shape
    seen = jnp.concatenate([windows, x], axis=1)
    wide = seen.reshape(rows, -1, channels).astype(jnp.float32)
    return jnp.sum(wide * weight[None].astype(jnp.float32), axis=1), seen[:, channels:]


def _chunks(x: Array, windows: Array, weight: Array, rows: PrefillStates) -> tuple[Array, Array, Array]:
    """float32 [tokens, channels], the rows' last windows, and those where copies are taken."""
    tokens, width = x.shape[0], weight.shape[0]
    index = jnp.arange(tokens, dtype=jnp.int32)
    mine = (index[:, None] >= rows.q_start[None]) & (index[:, None] < (rows.q_start + rows.q_len)[None])
    row = jnp.argmax(mine, axis=1)
    offset = index - rows.q_start[row]  # of the token in its chunk
    out = jnp.zeros(x.shape, jnp.float32)
    for tap in range(width):
        back = width - 1 - tap
        before = windows[row, jnp.clip(offset + tap, 0, width - 2)]
        shifted = jnp.pad(x, ((back, 0), (0, 0)))[:tokens]
        seen = jnp.where((offset >= back)[:, None], shifted, before)
        out = out + seen.astype(jnp.float32) * weight[tap].astype(jnp.float32)[None]

    def window_after(count: Array) -> Array:
        """[rows, (width - 1) * channels]: the last inputs once `count` tokens of the chunk are in."""
        at = count[:, None] - (width - 1) + jnp.arange(width - 1, dtype=jnp.int32)[None]
        new = x[jnp.clip(rows.q_start[:, None] + at, 0, tokens - 1)]
        old = jnp.take_along_axis(windows, jnp.clip(at + width - 1, 0, width - 2)[:, :, None], axis=1)
        return jnp.where((at >= 0)[:, :, None], new, old).reshape(windows.shape[0], -1)

    return out, window_after(rows.q_len), window_after(rows.copy_len)
