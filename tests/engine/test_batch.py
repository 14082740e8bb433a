"""From plan to vector and back, the lattice of programs, and what `configure` makes of a request."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import steps
from engine.batch import (
    USES_BIAS,
    USES_COUNTS,
    USES_LOGPROBS,
    USES_MASK,
    Field,
    Layout,
    StepKey,
    build,
    build_configure,
    configure_layout,
    lattice,
    needs_configure,
    sampling_row,
    step_key,
    step_layout,
)
from engine.plan import DecodeRow, DecodeRows, PrefillRow, StateMove, StepPlan
from engine.request import MAX_LOGIT_BIAS, MAX_STOP_IDS
from engine.sequence import Sequence
from engine.slots import Slots, add_pages, slots_shape
from tests.engine.fakes import config, request

CONFIG = config(max_num_seqs=6, token_buckets=(4, 16), prefill_decode_buckets=(0, 6), decode_buckets=(2, 6))


def sequence(slot: int, num_prompt: int = 3, output: tuple[int, ...] = (), seed: int = 0, **params: Any) -> Sequence:
    made = request(f"r{slot}", num_prompt, **params)
    tokens = [*made.prompt_token_ids, *output]
    return Sequence(made, 0, 0, seed, num_prompt + 9, None, tokens, slot=slot, pages=[7, 3, 9])


def prefill(seq: Sequence, start: int, count: int, samples: bool = True, logprobs: bool = False) -> PrefillRow:
    return PrefillRow(seq, start, count, samples, logprobs)


def plan_of(prefill_rows: tuple[PrefillRow, ...] = (), decode_rows: tuple[DecodeRow, ...] = ()) -> StepPlan:
    return StepPlan(prefill_rows, DecodeRows.of(decode_rows), ())


def unpacked(key: StepKey, plan: StepPlan) -> dict[str, np.ndarray]:
    """Through the vector, cut as a program cuts it."""
    layout = step_layout(CONFIG, key)
    vector = build(CONFIG, key, layout, plan)
    assert vector.shape == (layout.size,) and vector.dtype == np.int32
    return {name: np.asarray(a) for name, a in steps.unpack(layout, jnp.asarray(vector)).items()}


def test_a_layout_carries_floats_as_bits() -> None:
    layout = Layout((Field("a", (2,), "float32"), Field("b", (), "int32", -1), Field("c", (2, 2), "int32", 7)))
    vector, views = layout.pack()
    views["a"][:] = [np.pi, -0.0]
    views["c"][1, 0] = 5
    back = steps.unpack(layout, jnp.asarray(vector))
    assert np.asarray(back["a"]).tobytes() == np.asarray([np.pi, -0.0], np.float32).tobytes()
    assert back["b"] == -1 and np.asarray(back["c"]).tolist() == [[7, 7], [5, 7]]


def test_each_pack_is_a_new_vector() -> None:
    layout = step_layout(CONFIG, StepKey(0, 2))
    assert layout.pack()[0] is not layout.pack()[0]


def test_the_lattice_holds_every_step() -> None:
    keys = set(lattice(CONFIG))
    assert {key.name for key in keys} == {
        "prefill_4_0",
        "prefill_4_6",
        "prefill_16_0",
        "prefill_16_6",
        "decode_2",
        "decode_6",
    }
    seqs = [sequence(i) for i in range(6)]
    for num_decode in range(7):
        rows = tuple(DecodeRow(seq, 5, 1, 0, ()) for seq in seqs[:num_decode])
        for tokens in range(17):
            if tokens or rows:
                plan = plan_of((prefill(sequence(5, 20), 0, tokens),) if tokens else (), rows)
                key = step_key(CONFIG, plan)
                assert key in keys and key.rows >= num_decode and key.tokens >= tokens
                assert (key.tokens > 0) == (tokens > 0)


def test_decode_rows() -> None:
    rows = (DecodeRow(sequence(4), 11, 3, 2, (8,)), DecodeRow(sequence(0), 5, 1, 0, ()))
    fields = unpacked(StepKey(0, 6), plan_of(decode_rows=rows))
    assert fields["decode_slot"].tolist() == [4, 0, 6, 6, 6, 6], "idle rows name the idle slot"
    assert fields["decode_count"].tolist() == [3, 1, 0, 0, 0, 0]
    assert fields["first_new_page"].tolist()[:2] == [2, 0]
    assert fields["new_pages"].tolist() == [[8]] + [[-1]] * 5


def test_prefill_rows() -> None:
    seed = (5 << 32) + 0x80000001
    a = sequence(2, 10, seed=seed, temperature=0.5, top_k=-1, min_tokens=2, stop_token_ids=(9, 4), logprobs=1)
    b = sequence(1, 3, output=(5,), prompt_logprobs=0)
    fields = unpacked(StepKey(16, 0), plan_of((prefill(a, 4, 5, samples=False), prefill(b, 0, 4, logprobs=True))))
    tokens = [*a.token_ids[4:9], *b.token_ids]
    assert fields["tokens"].tolist() == tokens + [0] * 7
    assert fields["next_tokens"].tolist()[:8] == [*a.token_ids[5:10], *b.token_ids[1:]]
    assert fields["slot"].tolist() == [2, 1, 6] and fields["q_start"].tolist() == [0, 5, 0]
    assert fields["q_len"].tolist() == [5, 4, 0] and fields["position"].tolist() == [4, 0, 0]
    assert fields["samples"].tolist() == [0, 1, 0] and fields["wants_prompt_logprobs"] == 1
    assert fields["block_table"][:2, :4].tolist() == [[7, 3, 9, 0]] * 2 and not fields["block_table"][2].any()
    assert fields["temperature"].tolist() == [0.5, 1.0, 0.0] and fields["top_k"].tolist() == [0, 0, 0]
    assert fields["min_len"].tolist() == [12, 3, 0] and fields["max_len"].tolist() == [19, 12, 0]
    assert fields["stop_ids"][0].tolist() == [4, 9] + [-1] * (MAX_STOP_IDS - 2)
    words = fields["seed_high"][0].astype(np.uint32), fields["seed_low"][0].astype(np.uint32)
    assert (int(words[0]) << 32) + int(words[1]) == seed


@pytest.mark.parametrize(
    ("params", "flags"),
    [
        ({}, 0),
        ({"presence_penalty": 0.1}, USES_COUNTS),
        ({"frequency_penalty": -0.1}, USES_COUNTS),
        ({"repetition_penalty": 1.1}, USES_COUNTS),
        ({"logit_bias": {1: 2.0}}, USES_BIAS),
        ({"allowed_token_ids": (1,)}, USES_MASK),
        ({"logprobs": 0}, USES_LOGPROBS),
        ({"logprobs": 1, "logit_bias": {1: 1.0}}, USES_BIAS | USES_LOGPROBS),
    ],
)
def test_flags(params: dict[str, Any], flags: int) -> None:
    seq = sequence(0, **params)
    assert sampling_row(seq)["flags"] == flags
    assert needs_configure(CONFIG, seq) == bool(flags & ~USES_LOGPROBS)


@pytest.mark.parametrize("vocab", [251, 256])
def test_configure_fills_one_slot_and_no_other(vocab: int) -> None:
    bias = {i: i / 8 - 3 for i in range(0, 200, 2)}
    seq = sequence(3, 6, output=(1, 1, 7), logit_bias=bias, allowed_token_ids=(0, 31, 32, 63, 250))
    layout = configure_layout(CONFIG, vocab)
    before: Slots = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), slots_shape(6, 16, vocab))
    after = jax.jit(lambda s, v: steps.configure(layout, s, v))(
        before, jnp.asarray(build_configure(CONFIG, layout, seq, vocab))
    )
    for name in ("token_counts", "bias_ids", "bias_values", "allowed_bits"):
        old, new = np.asarray(getattr(before, name)), np.asarray(getattr(after, name))
        assert np.array_equal(np.delete(old, 3, 0), np.delete(new, 3, 0)), name
    counts = np.asarray(after.token_counts[3])
    assert np.flatnonzero(counts & 1).tolist() == sorted(set(seq.request.prompt_token_ids))
    assert {int(t): int(counts[t] >> 1) for t in np.flatnonzero(counts >> 1)} == {1: 2, 7: 1}
    assert np.asarray(after.bias_ids[3]).tolist() == [*bias, *[vocab] * (MAX_LOGIT_BIAS - len(bias))]
    assert np.asarray(after.bias_values[3])[: len(bias)].tolist() == list(bias.values())
    bits = np.unpackbits(np.asarray(after.allowed_bits[3]).view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [0, 31, 32, 63, 250]


def test_add_pages_extends_tables_and_drops_what_is_none() -> None:
    slots: Slots = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), slots_shape(3, 4, 8))
    pages = jnp.asarray([[5, 6], [7, -1], [-1, -1]], jnp.int32)
    out = add_pages(slots, jnp.asarray([2, 0, 3], jnp.int32), jnp.asarray([1, 3, 0], jnp.int32), pages)
    assert np.asarray(out.block_tables).tolist() == [[0, 0, 0, 7], [0] * 4, [0, 5, 6, 0], [0] * 4]


def test_states_travel_only_for_models_that_have_them() -> None:
    """Idle rows start from zeros and copy nowhere; the other vectors are as they were."""
    key, stateful = StepKey(16, 0), config(state_checkpoints=3)
    layout, plain = step_layout(stateful, key), step_layout(config(), key)
    names = ["state_source", "checkpoint", "checkpoint_at"]
    decoded = {"decode_checkpoint", "decode_checkpoint_at"}
    assert [f.name for f in layout.fields if f.name not in decoded] == [*(f.name for f in plain.fields), *names]
    rows = [PrefillRow(sequence(slot), 0, 3, True, False, move) for slot, move in
            ((0, StateMove(-1)), (2, StateMove(6, copy_to=7, copy_at=2)))]  # fmt: skip
    fields = layout.split(build(stateful, key, layout, plan_of(tuple(rows))), lambda part, f: part.tolist())
    assert [fields[name] for name in names] == [[-1, 6, -1], [-1, 7, -1], [0, 2, 0]]
    key = StepKey(0, 2)
    row = DecodeRow(sequence(3), 14, 3, 0, (), StateMove(3, copy_to=6, copy_at=2))
    vector = build(stateful, key, step_layout(stateful, key), plan_of((), (row,)))
    fields = step_layout(stateful, key).split(vector, lambda part, f: part.tolist())
    assert fields["decode_checkpoint"] == [6, -1] and fields["decode_checkpoint_at"] == [15, 0]
    assert stateful.num_states == 4 + 1 + 3 and list(stateful.checkpoint_rows or ()) == [5, 6, 7]
    assert config().num_states == 0 and config().checkpoint_rows is None
