"""The device programs as pure functions: `prefill_step`, `decode_step`, `configure`, `token_logits`.

Everything a step reads is an argument; everything it changes is donated and returned. The
request path through a step: add pages, forward (writing KV), draw, advance the slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from engine import draft_model, drafts, sampler
from engine.attend import DecodeRows, PrefillRows
from engine.batch import SAMPLING_FLOATS, SAMPLING_INTS, Field, Layout
from engine.forward import KV, Compute, chunk_rows, forward, logits_of, nobody
from engine.model.config import ModelConfig
from engine.model.layers import Params
from engine.recur import Tried, take, tried_rows
from engine.request import MAX_LOGPROBS
from engine.sampler import Drawn
from engine.slots import Sampling, Slots, add_pages, history_of
from pallas_kernels.states import PrefillStates

PROMPT_LOGPROB_TOKENS = 32  # prompt positions whose logits exist at once


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What the host reads back. Rows: decode rows, then prefill rows."""

    tokens: Array  # int32 [rows, steps]
    num_drawn: Array  # int32 [rows]
    faulty: Array  # bool [rows]
    logprobs: Array  # float32 [rows, steps]
    top_ids: Array  # int32 [rows, steps, MAX_LOGPROBS]
    top_logprobs: Array  # float32 [rows, steps, MAX_LOGPROBS]
    prompt: tuple[Array, Array, Array] | None = None  # as logprobs_of, a row a prefill token
    expert_tokens: Array | None = None  # int32 [layers with experts, experts], tokens that chose each
    num_proposed: Array | None = None  # int32 [rows], draft tokens of a verifying step


def unpack(layout: Layout, vector: Array) -> dict[str, Array]:
    """The fields of a step's int32 vector, inside a program."""

    def convert(part: Array, f: Field) -> Array:
        bits = part if f.dtype == "int32" else jax.lax.bitcast_convert_type(part, jnp.float32)
        return bits.reshape(f.shape)

    return layout.split(vector, convert)


def decode_step(
    compute: Compute, layout: Layout, max_steps: int, params: Params, kv: KV, slots: Slots, vector: Array
) -> tuple[KV, Slots, StepOutput]:
    """Draw decode_count <= max_steps tokens for each row, fewer where it ends; leaves when all are done."""
    batch = unpack(layout, vector)
    slot = batch["decode_slot"]
    slots = add_pages(slots, slot, batch["first_new_page"], batch["new_pages"])
    tables, sampling = slots.block_tables[slot], slots.sampling.rows(slot)
    out = empty_output(compute.model, slot.shape[0], max_steps)

    def is_drawing(i: Array, slots: Slots) -> Array:
        return slots.active[slot] & (i < batch["decode_count"])

    def turn(state: tuple[Array, KV, Slots, StepOutput]) -> tuple[Array, KV, Slots, StepOutput]:
        i, kv, slots, out = state
        drawing, position = is_drawing(i, slots), slots.position[slot]
        rows = DecodeRows(slot, position, drawing, tables, decode_copies(batch, position))
        kv, hidden, load = forward(compute, params, kv, slots.last_token[slot], rows, None)
        drawn = sampler.draw(logits_of(compute, params, hidden), slots, slot, sampling, position + 1, compute.place)
        out = record(out, i, drawn, drawing, load)
        return i + 1, kv, advance(slots, slot, drawn, sampling, position + 1, drawing), out

    def more(state: tuple[Array, KV, Slots, StepOutput]) -> Array:
        return compute.place.any(is_drawing(state[0], state[2]))

    state = (jnp.int32(0), kv, slots, out)
    # One step needs no loop: see Chip.loops_copy.
    _, kv, after, out = turn(state) if max_steps == 1 else jax.lax.while_loop(more, turn, state)
    return copy_draft_states(compute, kv, batch, slots, after), after, out


def verify_step(
    compute: Compute, layout: Layout, max_steps: int, params: Params, kv: KV, slots: Slots, vector: Array
) -> tuple[KV, Slots, StepOutput]:
    """Like `decode_step`, from one forward pass over each row's last token and max_steps - 1 proposed ones.

    A row draws its tokens one after the other, each as decoding would, and goes on while it draws what was
    proposed. A draft is one token with certainty, so that is speculative sampling (arXiv 2211.17192): a token
    is accepted as often as the model would draw it; and as draws depend on seed and position alone, the
    output is that of decoding, token by token.
    """
    batch = unpack(layout, vector)
    slot = batch["decode_slot"]
    slots = add_pages(slots, slot, batch["first_new_page"], batch["new_pages"])
    sampling, position, rows = slots.sampling.rows(slot), slots.position[slot], slot.shape[0]
    active = slots.active[slot] & (batch["decode_count"] > 0)
    if compute.draft is None:
        proposed = drafts.propose(history_of(slots)[slot], position, max_steps - 1)
    else:
        kv, proposed = draft_model.propose(compute, params, kv, slots, slot, active, max_steps - 1)
    tokens = jnp.concatenate([slots.last_token[slot][:, None], jnp.maximum(proposed, 0)], axis=1)
    chunks = chunk_rows(slots, slot, active, position, max_steps)
    if compute.model.recurrence is not None:
        # Behind what may be drawn keys come from the trash page, and a block of a recurrence would mix them in.
        mine = jnp.where(active, batch["decode_count"], 0)
        chunks = replace(chunks, states=tried_rows(chunks.q_start, mine, slot, max_steps))
    kv, hidden, load = forward(compute, params, kv, tokens.reshape(-1), nobody(slots), chunks)
    # One position's rows beside each other: an axis of few positions would be padded to a tile, of every row's logits.
    hidden = jnp.swapaxes(hidden.reshape(rows, max_steps, -1), 0, 1).reshape(hidden.shape)
    logits = logits_of(compute, params, hidden)
    out = replace(
        empty_output(compute.model, rows, max_steps, verifies=True),
        num_proposed=jnp.sum((proposed >= 0) & active[:, None], axis=1, dtype=jnp.int32),
        expert_tokens=load,
    )

    def turn(state: tuple[Array, Array, Slots, StepOutput]) -> tuple[Array, Array, Slots, StepOutput]:
        i, drawing, slots, out = state
        of_turn = jax.lax.dynamic_slice_in_dim(logits, i * rows, rows)
        drawn = sampler.draw(of_turn, slots, slot, sampling, position + i + 1, compute.place)
        out = record(out, i, drawn, drawing, None)
        slots = advance(slots, slot, drawn, sampling, position + i + 1, drawing)
        expected = jnp.take_along_axis(proposed, jnp.minimum(i, max_steps - 2)[None, None], axis=1)[:, 0]
        goes_on = drawing & slots.active[slot] & (drawn.token == expected) & (i + 1 < batch["decode_count"])
        return i + 1, goes_on, slots, out

    def more(state: tuple[Array, Array, Slots, StepOutput]) -> Array:
        return (state[0] < max_steps) & compute.place.any(state[1])

    _, _, after, out = jax.lax.while_loop(more, turn, (jnp.int32(0), active, slots, out))
    if compute.draft is not None:
        after = draft_model.keep_count(compute, slots, after, slot, active, max_steps - 1)
    if chunks.states is not None:
        kv = take_drawn(compute, kv, verified_rows(batch, chunks.states, position, out.num_drawn))
    return copy_draft_states(compute, kv, batch, slots, after), after, out


def prefill_step(
    compute: Compute, layout: Layout, params: Params, kv: KV, slots: Slots, vector: Array
) -> tuple[KV, Slots, StepOutput]:
    """Prompt chunks on a flat token axis, with decode rows riding along for one token each."""
    batch = unpack(layout, vector)
    slots = add_pages(slots, batch["decode_slot"], batch["first_new_page"], batch["new_pages"])
    slots = enter_rows(slots, batch)
    riders = batch["decode_slot"]
    position = slots.position[riders]
    copy_to = decode_copies(batch, position)
    decode = DecodeRows(riders, position, slots.active[riders], slots.block_tables[riders], copy_to)
    tokens = jnp.concatenate([slots.last_token[riders], batch["tokens"]])
    chunks = prefill_rows(batch)
    kv, hidden, load = forward(compute, params, kv, tokens, decode, chunks)
    if compute.draft is not None:
        kv = draft_model.read_prompts(compute, params, kv, slots, batch["tokens"], chunks)
    num_riders = riders.shape[0]
    last = num_riders + batch["q_start"] + jnp.maximum(batch["q_len"], 1) - 1
    slot = jnp.concatenate([riders, batch["slot"]])
    length = jnp.concatenate([position + 1, batch["position"] + batch["q_len"]])
    drawing = jnp.concatenate([slots.active[riders], batch["samples"] != 0])
    sampling = slots.sampling.rows(slot)
    logits = logits_of(compute, params, jnp.concatenate([hidden[:num_riders], hidden[last]]))
    drawn = sampler.draw(logits, slots, slot, sampling, length, compute.place)
    out = record(empty_output(compute.model, slot.shape[0], 1), jnp.int32(0), drawn, drawing, load)
    out = replace(
        out,
        prompt=jax.lax.cond(
            batch["wants_prompt_logprobs"] != 0,
            lambda: prompt_logprobs(compute, params, hidden[num_riders:], batch["next_tokens"]),
            lambda: sampler.no_logprobs(batch["tokens"].shape[0]),
        ),
    )
    after = advance(slots, slot, drawn, sampling, length, drawing)
    return copy_draft_states(compute, kv, batch, slots, after), after, out


def token_logits(
    compute: Compute, layout: Layout, params: Params, kv: KV, slots: Slots, vector: Array
) -> tuple[KV, Slots, Array]:
    """Like `prefill_step` without decode rows or drawing: float32 logits [tokens, vocab] of every token."""
    batch = unpack(layout, vector)
    kv, hidden, _ = forward(compute, params, kv, batch["tokens"], nobody(slots), prefill_rows(batch))
    return kv, slots, logits_of(compute, params, hidden)


def configure(layout: Layout, slots: Slots, vector: Array) -> Slots:
    """Fill the heavy rows of one slot: token counts, biases, allowed tokens."""
    fields = unpack(layout, vector)
    slot, vocab = fields["slot"], slots.token_counts.shape[1]
    index = jnp.arange(fields["tokens"].shape[0], dtype=jnp.int32)
    prompt = jnp.where(index < fields["prompt_len"], fields["tokens"], vocab)
    output = jnp.where(index >= fields["prompt_len"], fields["tokens"], vocab)
    seen = jnp.zeros((vocab,), jnp.int16).at[prompt].set(1, mode="drop")
    counts = seen.at[output].add(jnp.int16(2), mode="drop")
    bits = jax.lax.bitcast_convert_type(fields["allowed_bits"], jnp.uint32)
    return replace(
        slots,
        token_counts=slots.token_counts.at[slot].set(counts),
        bias_ids=slots.bias_ids.at[slot].set(fields["bias_ids"]),
        bias_values=slots.bias_values.at[slot].set(fields["bias_values"]),
        allowed_bits=slots.allowed_bits.at[slot].set(bits),
        history=None if slots.history is None else slots.history.at[slot].set(fields["tokens"]),
    )


def _no_load(model: ModelConfig) -> Array | None:
    """None: no layer has experts."""
    layers = sum(layer.ffn == "experts" for layer in model.layers)
    return jnp.zeros((layers, model.experts.num_experts), jnp.int32) if model.experts and layers else None


def decode_copies(batch: dict[str, Array], position: Array) -> Array | None:
    """Where each decode row leaves a copy of its states behind the token at `position`; None: nothing recurs."""
    if "decode_checkpoint" not in batch:
        return None
    return jnp.where(position == batch["decode_checkpoint_at"], batch["decode_checkpoint"], -1)


def verified_rows(batch: dict[str, Array], tried: PrefillStates, position: Array, num_drawn: Array) -> PrefillStates:
    """Of the tokens that each row tried from `position` on, as many as it drew: the last one drawn comes next."""
    copy_to = copies_left(batch, position, position + num_drawn)
    copy_at = batch["decode_checkpoint_at"] - position + 1
    return replace(tried, q_len=num_drawn, target=tried.source, copy_to=copy_to, copy_at=copy_at)


def copies_left(batch: dict[str, Array], before: Array, after: Array) -> Array:
    """Where each decode row left a copy of its states on its way between two positions; negative: nowhere."""
    at = batch["decode_checkpoint_at"]
    return jnp.where((before <= at) & (at < after), batch["decode_checkpoint"], -1)


def copy_draft_states(compute: Compute, kv: KV, batch: dict[str, Array], before: Slots, after: Slots) -> KV:
    """A draft model's states beside the copies that the model's layers left in a step between these slots."""
    if compute.draft is None or compute.draft.model.recurrence is None:
        return kv
    slot = batch["decode_slot"]
    copies = copies_left(batch, before.position[slot], after.position[slot])
    return draft_model.leave_copies(compute, kv, slot, copies)


def take_drawn(compute: Compute, kv: KV, rows: PrefillStates) -> KV:
    """The tokens of a verifying step that count enter the recurrent states."""
    model, target = compute.model, compute.target
    own = (
        take(model, layer, cache, rows, target) if isinstance(cache, Tried) else cache
        for layer, cache in zip(model.layers, kv[: model.num_layers], strict=True)
    )
    return (*own, *kv[model.num_layers :])


def prefill_rows(batch: dict[str, Array]) -> PrefillRows:
    """The chunks of prompts of a step, and where their states come from and go."""
    states = None
    if "state_source" in batch:
        rows = (batch["q_start"], batch["q_len"], batch["state_source"], batch["slot"])
        states = PrefillStates(*rows, copy_to=batch["checkpoint"], copy_at=batch["checkpoint_at"])
    return PrefillRows(batch["q_start"], batch["q_len"], batch["position"], batch["block_table"], states)


def enter_rows(slots: Slots, batch: dict[str, Array]) -> Slots:
    """Write the prefill rows' block tables and sampling parameters into their slots."""
    slot = batch["slot"]
    fresh = Sampling(**{name: batch[name] for name in (*SAMPLING_FLOATS, *SAMPLING_INTS, "stop_ids")})
    return replace(
        slots,
        block_tables=slots.block_tables.at[slot].set(batch["block_table"]),
        sampling=jax.tree.map(lambda old, new: old.at[slot].set(new), slots.sampling, fresh),
        drafted=None if slots.drafted is None else slots.drafted.at[slot].set(batch["position"] + batch["q_len"]),
    )


def advance(slots: Slots, slot: Array, drawn: Drawn, sampling: Sampling, length: Array, drawing: Array) -> Slots:
    """The slots after each drawing row became `length + 1` tokens long; the others stay as they are."""
    stops = jnp.any(drawn.token[:, None] == sampling.stop_ids, axis=1) & (length >= sampling.min_len)
    goes_on = ~stops & (length + 1 < sampling.max_len) & ~drawn.faulty
    active = jnp.where(drawing, goes_on, slots.active[slot])
    token = jnp.where(drawing, drawn.token, slots.last_token[slot])
    position = jnp.where(drawing, length, slots.position[slot])
    return replace(
        slots,
        last_token=slots.last_token.at[slot].set(token),
        position=slots.position.at[slot].set(position),
        active=slots.active.at[slot].set(active),
        token_counts=sampler.count_output(slots, slot, drawn.token, drawing),
        history=None if slots.history is None else remember(slots.history, slot, drawn.token, length, drawing),
    )


def remember(history: Array, slot: Array, token: Array, length: Array, drawing: Array) -> Array:
    """`history` with each drawing row's token, which follows `length` others."""
    return history.at[slot, jnp.where(drawing, length, history.shape[1])].set(token, mode="drop")


def empty_output(model: ModelConfig, rows: int, steps: int, *, verifies: bool = False) -> StepOutput:
    wide = (rows, steps, MAX_LOGPROBS)
    return StepOutput(
        tokens=jnp.zeros((rows, steps), jnp.int32),
        num_drawn=jnp.zeros((rows,), jnp.int32),
        faulty=jnp.zeros((rows,), jnp.bool_),
        logprobs=jnp.zeros((rows, steps), jnp.float32),
        top_ids=jnp.zeros(wide, jnp.int32),
        top_logprobs=jnp.zeros(wide, jnp.float32),
        expert_tokens=_no_load(model),
        num_proposed=jnp.zeros((rows,), jnp.int32) if verifies else None,
    )


def empty_output_shape(
    model: ModelConfig, rows: int, steps: int, prompt_tokens: int, *, verifies: bool = False
) -> StepOutput:
    """Abstract output of a step; with `prompt_tokens`, of a prefill step; with `verifies`, of a verifying one."""
    out = jax.eval_shape(lambda: empty_output(model, rows, steps, verifies=verifies))
    return replace(out, prompt=jax.eval_shape(lambda: sampler.no_logprobs(prompt_tokens)) if prompt_tokens else None)


def record(out: StepOutput, step: Array, drawn: Drawn, drawing: Array, load: Array | None) -> StepOutput:
    """Store one step's draw in column `step`, which only rows that are drawing count; add its experts' load."""
    return replace(
        out,
        tokens=out.tokens.at[:, step].set(drawn.token),
        num_drawn=out.num_drawn + drawing.astype(jnp.int32),
        faulty=out.faulty | (drawn.faulty & drawing),
        logprobs=out.logprobs.at[:, step].set(drawn.logprob),
        top_ids=out.top_ids.at[:, step].set(drawn.top_ids),
        top_logprobs=out.top_logprobs.at[:, step].set(drawn.top_logprobs),
        expert_tokens=out.expert_tokens if out.expert_tokens is None or load is None else out.expert_tokens + load,
    )


def prompt_logprobs(compute: Compute, params: Params, hidden: Array, next_tokens: Array) -> tuple[Array, Array, Array]:
    """Logprob of each prefill token's successor and the best alternatives, a few positions at a time."""
    num_tokens = hidden.shape[0]
    unrolled = compute.target.loops_copy
    # Each block is more of an unrolled program's text: as few as hold 128 MiB of logits.
    most = 1 << ((1 << 25) // compute.model.vocab_size).bit_length() - 1 if unrolled else 0
    size = min(max(PROMPT_LOGPROB_TOKENS, min(most, 8 * PROMPT_LOGPROB_TOKENS)), num_tokens)
    blocks = -(-num_tokens // size)
    pad = blocks * size - num_tokens
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(blocks, size, -1)
    next_tokens = jnp.pad(next_tokens, (0, pad)).reshape(blocks, size)

    def of_block(block: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        return sampler.logprobs_of(logits_of(compute, params, block[0]), block[1])

    if unrolled:
        cut = []
        for i in range(blocks):
            block = (hidden[i], next_tokens[i])
            if cut:  # one behind the other: the compiler would keep the logits of all
                block, cut[-1] = jax.lax.optimization_barrier((block, cut[-1]))
            cut.append(of_block(block))
        found = tuple(jnp.stack(parts) for parts in zip(*cut, strict=True))
    else:
        found = jax.lax.map(of_block, (hidden, next_tokens))
    logprob, ids, top = (a.reshape(blocks * size, *a.shape[2:])[:num_tokens] for a in found)
    return logprob, ids, top
