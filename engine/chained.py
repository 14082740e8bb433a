"""Decode steps of layers in stages that follow each other without a gap, in one program (see `engine.pipeline`).

There are as many micro-batches as stages: as one leaves the last stage its next tokens are drawn, and they enter the
first stage in the next turn. So k tokens a row take k s + s - 1 turns of s stages, where k steps one after the other
take k (2 s - 1). Turns are a loop, whose body has each layer of a stage once and draws for one micro-batch.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from engine import sampler
from engine.attend import DecodeRows, Memory, cache_view
from engine.batch import Layout
from engine.config import EngineConfig
from engine.forward import KV, Compute, expert_load, logits_of
from engine.model import decoder
from engine.model.layers import Params
from engine.pipeline import Micro
from engine.sampler import Drawn
from engine.slots import Slots, add_pages
from engine.steps import StepOutput, advance, empty_output, record, unpack

State = tuple[Array, Array, KV, Slots, StepOutput, Array | None]


def turns_a_token(config: EngineConfig) -> float:
    """Of the loop, with every row drawing as many tokens as a call can."""
    stages, steps = config.shards.count("layers"), config.decode_steps
    return (steps * stages + stages - 1) / steps


def decode_step(
    compute: Compute, layout: Layout, max_steps: int, params: Params, kv: KV, slots: Slots, vector: Array
) -> tuple[KV, Slots, StepOutput]:
    """As `steps.decode_step`, with the same tokens."""
    model, place = compute.model, compute.place
    stages, stage, axes = place.count("layers"), jnp.int32(place.index("layers")), place.shards.axes("layers")
    batch, attend = unpack(layout, vector), Memory(compute.kv, place)
    slots = add_pages(slots, batch["decode_slot"], batch["first_new_page"], batch["new_pages"])
    num_rows, idle = batch["decode_slot"].shape[0], slots.active.shape[0] - 1
    micro = Micro(stages, num_rows, 0)
    slot = micro.split_rows(batch["decode_slot"] - idle) + idle  # rows that pad are idle
    count, tables = micro.split_rows(batch["decode_count"]), slots.block_tables[slot]
    first = jnp.arange(stages, dtype=jnp.int32)[:, None]

    def is_drawing(slots: Slots, number: Array) -> Array:
        """Which rows are in the pass of that number: a micro-batch's step, which began in the turn of that number."""
        at = number % stages
        return (number >= 0) & slots.active[slot[at]] & (number // stages < count[at])

    def turn(state: State) -> State:
        t, x, kv, slots, out, load = state
        x = jnp.where(stage == 0, decoder.embedded(model, params, slots.last_token[slot[t % stages]], place), x)
        at = (t - stage) % stages
        rows = DecodeRows(slot[at], slots.position[slot[at]], is_drawing(slots, t - stage), tables[at])
        view, positions = cache_view(rows, None, micro.rows, compute.page_size)
        x, kv, chosen = decoder.through_layers(model, params, x, positions, kv, view, attend, place)
        load = None if load is None else load + expert_load(model, chosen, view.is_live)
        hidden = jax.lax.psum(jnp.where(stage == stages - 1, x, 0), axes)
        x = jax.lax.ppermute(x, axes, [(i, i + 1) for i in range(stages - 1)])
        done = t - (stages - 1)
        leaving, drawing = slot[done % stages], is_drawing(slots, done)
        length, sampling = slots.position[leaving] + 1, slots.sampling.rows(leaving)
        drawn = sampler.draw(logits_of(compute, params, hidden), slots, leaving, sampling, length, compute.place)
        out = _recorded(micro, out, done, drawn, drawing)
        return t + 1, x, kv, advance(slots, leaving, drawn, sampling, length, drawing), out, load

    def more(state: State) -> Array:
        behind = jnp.maximum(state[0] - first, 0) // stages  # steps that each micro-batch is through with
        return jnp.any(state[3].active[slot] & (behind < count))

    entering = jax.eval_shape(lambda: decoder.embedded(model, params, slots.last_token[slot[0]], place))
    out = empty_output(model, stages * micro.rows, max_steps)
    state = (jnp.int32(0), jnp.zeros_like(entering), kv, slots, replace(out, expert_tokens=None), out.expert_tokens)
    _, _, kv, slots, drawn, load = jax.lax.while_loop(more, turn, state)
    return kv, slots, replace(jax.tree.map(lambda x: x[:num_rows], drawn), expert_tokens=load)


def _recorded(micro: Micro, out: StepOutput, number: Array, drawn: Drawn, drawing: Array) -> StepOutput:
    """With what the micro-batch whose pass has that number drew; nothing is drawing in one below 0."""
    first = number % micro.count * micro.rows
    part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, micro.rows), out)
    part = record(part, jnp.maximum(number // micro.count, 0), drawn, drawing, None)
    return jax.tree.map(lambda x, rows: jax.lax.dynamic_update_slice_in_dim(x, rows, first, 0), out, part)
