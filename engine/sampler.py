"""The whole sampler as one fixed-shape device program: every row, every parameter, no variants.

Costly parts run under `lax.cond`, only when some row asks for them; a row's result never
depends on its neighbours. The order of operations and their meaning follow vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from engine.batch import USES_BIAS, USES_COUNTS, USES_LOGPROBS, USES_MASK
from engine.model.place import Place
from engine.request import MAX_LOGPROBS
from engine.slots import Sampling, Slots
from pallas_kernels.greedy import greedy

NEVER = -jnp.inf
INT16_MAX = 32767
CHANGES_LOGITS = USES_MASK | USES_BIAS | USES_COUNTS  # see `process`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """One token a row, and how likely it was before any processing."""

    token: Array  # int32 [rows]
    logprob: Array  # float32 [rows]; 0 unless some row has USES_LOGPROBS
    top_ids: Array  # int32 [rows, MAX_LOGPROBS], best first
    top_logprobs: Array  # float32 [rows, MAX_LOGPROBS]
    faulty: Array  # bool [rows], some logit was not finite


def draw(logits: Array, slots: Slots, slot: Array, sampling: Sampling, length: Array, place: Place) -> Drawn:
    """Draw the token that makes each sequence `length + 1` long.

    logits: float32 [rows, vocab]; slot, length: int32 [rows]; sampling: the rows' parameters.
    """
    likeliest, faulty = _best_and_faulty(logits, place)
    # Where every row wants just that, nothing of the vocabulary's size is written.
    changed = jnp.any((sampling.temperature > 0) | (sampling.flags & CHANGES_LOGITS != 0) | (length < sampling.min_len))
    token = jax.lax.cond(
        changed, lambda: _draw_changed(logits, slots, slot, sampling, length, place), lambda: likeliest
    )
    logprob, top_ids, top_logprobs = jax.lax.cond(
        _any(sampling, USES_LOGPROBS), lambda: logprobs_of(logits, token), lambda: no_logprobs(token.shape[0])
    )
    return Drawn(token, logprob, top_ids, top_logprobs, faulty)


def best(logits: Array, place: Place) -> Array:
    """int32 [rows]: the first of the highest logits [rows, vocab]."""
    return _best_and_faulty(logits, place)[0]


def _best_and_faulty(logits: Array, place: Place) -> tuple[Array, Array]:
    return greedy(logits, target=place.target, num_devices=place.shards.num_devices)


def _draw_changed(logits: Array, slots: Slots, slot: Array, sampling: Sampling, length: Array, place: Place) -> Array:
    processed = process(logits, slots, slot, sampling, length)
    likeliest, is_random = best(processed, place), sampling.temperature > 0
    return jax.lax.cond(
        jnp.any(is_random),
        lambda: jnp.where(is_random, _draw_random(processed, sampling, length, place), likeliest),
        lambda: likeliest,
    )


def process(logits: Array, slots: Slots, slot: Array, sampling: Sampling, length: Array) -> Array:
    """Mask, bias and penalise: everything that can change the most likely token."""
    logits = jax.lax.cond(_any(sampling, USES_MASK), lambda x: _mask(x, slots, slot, sampling), lambda x: x, logits)
    young = length < sampling.min_len
    logits = jax.lax.cond(jnp.any(young), lambda x: _forbid_stops(x, sampling, young), lambda x: x, logits)
    logits = jax.lax.cond(_any(sampling, USES_BIAS), lambda x: _bias(x, slots, slot, sampling), lambda x: x, logits)
    return jax.lax.cond(_any(sampling, USES_COUNTS), lambda x: _penalise(x, slots, slot, sampling), lambda x: x, logits)


def count_output(slots: Slots, slot: Array, token: Array, counted: Array) -> Array:
    """`token_counts` with each row's token counted where `counted`; saturates."""
    old = slots.token_counts[slot, token]
    add = 2 * (counted & (old < INT16_MAX - 1)).astype(jnp.int16)
    return slots.token_counts.at[slot, token].add(add)


def logprobs_of(logits: Array, token: Array) -> tuple[Array, Array, Array]:
    """Log-softmax of raw logits at `token`, and the MAX_LOGPROBS best tokens with theirs."""
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1) - normalizer
    width = min(MAX_LOGPROBS, logits.shape[-1])
    top, ids = jax.lax.top_k(logits, width)
    pad = ((0, 0), (0, MAX_LOGPROBS - width))
    return chosen[:, 0], jnp.pad(ids, pad), jnp.pad(top - normalizer, pad, constant_values=NEVER)


def no_logprobs(rows: int) -> tuple[Array, Array, Array]:
    """What `logprobs_of` returns, empty."""
    wide = (rows, MAX_LOGPROBS)
    return jnp.zeros((rows,), jnp.float32), jnp.zeros(wide, jnp.int32), jnp.zeros(wide, jnp.float32)


def _any(sampling: Sampling, flag: int) -> Array:
    return jnp.any(sampling.flags & flag != 0)


def _has(sampling: Sampling, flag: int) -> Array:
    return (sampling.flags & flag != 0)[:, None]


def _mask(logits: Array, slots: Slots, slot: Array, sampling: Sampling) -> Array:
    words = slots.allowed_bits[slot]
    shifts = jnp.arange(32, dtype=jnp.uint32)[None, None, :]
    allowed = ((words[:, :, None] >> shifts) & jnp.uint32(1)).reshape(words.shape[0], -1)[:, : logits.shape[1]] != 0
    return jnp.where(allowed | ~_has(sampling, USES_MASK), logits, NEVER)


def _forbid_stops(logits: Array, sampling: Sampling, young: Array) -> Array:
    ids = jnp.where(young[:, None] & (sampling.stop_ids >= 0), sampling.stop_ids, logits.shape[1])
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, ids].set(NEVER, mode="drop")


def _bias(logits: Array, slots: Slots, slot: Array, sampling: Sampling) -> Array:
    values, vocab = jnp.where(_has(sampling, USES_BIAS), slots.bias_values[slot], 0.0), logits.shape[1]
    rows, column = jnp.arange(logits.shape[0])[:, None], jnp.arange(values.shape[1], dtype=jnp.int32)[None, :]
    ids = slots.bias_ids[slot]
    ids = jnp.where(ids < vocab, ids, vocab + column)  # told that no two are equal, a TPU's compiler needs a quarter
    return logits.at[rows, ids].add(values, mode="drop", indices_are_sorted=True, unique_indices=True)


def _penalise(logits: Array, slots: Slots, slot: Array, sampling: Sampling) -> Array:
    """Repetition (arXiv 1909.05858), then OpenAI's frequency and presence penalties."""
    counts = slots.token_counts[slot].astype(jnp.int32)
    count, seen = (counts >> 1).astype(jnp.float32), counts > 0
    factor = sampling.repetition_penalty[:, None]
    out = jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    out = out - sampling.frequency_penalty[:, None] * count
    out = out - sampling.presence_penalty[:, None] * (count > 0).astype(jnp.float32)
    return jnp.where(_has(sampling, USES_COUNTS), out, logits)


def _draw_random(logits: Array, sampling: Sampling, length: Array, place: Place) -> Array:
    """Gumbel-max with noise from (seed, length) alone, after temperature and the filters."""
    hot = sampling.temperature > 0
    logits = logits / jnp.where(hot, sampling.temperature, 1.0)[:, None]
    filters = hot & ((sampling.top_k > 0) | (sampling.top_p < 1.0) | (sampling.min_p > 0.0))
    logits = jax.lax.cond(jnp.any(filters), lambda x: filter_logits(x, sampling), lambda x: x, logits)
    noise = jax.vmap(_gumbel, in_axes=(0, 0, 0, None))(sampling.seed_high, sampling.seed_low, length, logits.shape[1])
    # A TPU's compiler is slow with a generator inside of a reduction.
    return best(jax.lax.optimization_barrier(logits + noise), place)


def _gumbel(seed_high: Array, seed_low: Array, length: Array, vocab_size: int) -> Array:
    data = jax.lax.bitcast_convert_type(jnp.stack([seed_high, seed_low]), jnp.uint32)
    key = jax.random.wrap_key_data(data, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, length), (vocab_size,), jnp.float32)


def filter_logits(logits: Array, sampling: Sampling) -> Array:
    """min-p, then top-k, then top-p, without a sort: what is dropped becomes -inf.

    Ties at a threshold are all kept. Row parameters that keep everything drop nothing.
    """
    peak = jnp.max(logits, axis=-1, keepdims=True)
    min_p = sampling.min_p[:, None]
    logits = jnp.where(jnp.exp(logits - peak) >= min_p, logits, NEVER)

    keys = _sortable(logits)
    vocab = logits.shape[1]
    k = jnp.where((sampling.top_k > 0) & (sampling.top_k < vocab), sampling.top_k, vocab)
    ones = jnp.ones_like(logits)
    logits = jnp.where(keys >= _threshold(keys, ones, k.astype(jnp.float32)), logits, NEVER)

    weights = jnp.exp(logits - peak)
    mass = jnp.where(sampling.top_p < 1.0, sampling.top_p, 2.0) * jnp.sum(weights, axis=-1)
    return jnp.where(keys >= _threshold(keys, weights, mass), logits, NEVER)


def _sortable(x: Array) -> Array:
    """uint32 keys in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 != 0, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(keys: Array, weights: Array, wanted: Array) -> Array:
    """Per row the largest key t whose keys >= t weigh at least `wanted`; 0 when even all do not.

    Binary search over the 32 bits of the key: exact, and each turn is one pass without a sort.
    """

    def turn(i: Array, found: Array) -> Array:
        bit = jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32))
        candidate = found | bit
        weight = jnp.sum(jnp.where(keys >= candidate[:, None], weights, 0.0), axis=-1)
        return jnp.where(weight >= wanted, candidate, found)

    return jax.lax.fori_loop(0, 32, turn, jnp.zeros(keys.shape[0], jnp.uint32))[:, None]
