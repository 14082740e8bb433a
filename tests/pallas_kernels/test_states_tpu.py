"""Decode rows' states taken on in their places, against the recurrences and cases of `test_states`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pallas_kernels import states_tpu
from pallas_kernels.choice import KernelDeclined
from pallas_kernels.gated_delta import api as gated_delta
from pallas_kernels.ssd import api as ssd
from pallas_kernels.target import Target
from tests.pallas_kernels.test_states import CASES, TOLERANCE, Case, Op, delta_op, fill, ssd_op

TPU = Target("tpu", "v6e", interpret=True)
NAMES = ("ssd", "gated_delta")


def op(name: str) -> Op:
    """Sixteen heads: two blocks of them, where a block is as small as `small_blocks` has it."""
    return ssd_op(16, 16, 128, 2, TPU) if name == "ssd" else delta_op(8, 16, 16, 128, TPU)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states_tpu, "_BLOCK_BYTES", 1 << 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", [case for case in CASES if case.decode or case.room], ids=lambda case: case.name)
@pytest.mark.parametrize("name", NAMES)
def test_equals_one_token_at_a_time(name: str, case: Case) -> None:
    heads, *state = op(name).state
    assert states_tpu.heads_of(heads, (state[0], state[1])) == 8
    assert fill(op(name), case).check() < TOLERANCE


@pytest.mark.parametrize("broken", ["rows", "a token", "active"])
@pytest.mark.parametrize("name", NAMES)
def test_the_check_notices_broken_input(name: str, broken: str) -> None:
    call = fill(op(name), CASES[0])
    if broken == "rows":
        call.decode = replace(call.decode, rows=call.decode.rows[::-1])
    elif broken == "active":
        call.decode = replace(call.decode, active=call.decode.active.at[0].set(False))
    else:
        call.tokens[0][0] *= 1.01
    assert call.check() > 10 * TOLERANCE


@pytest.mark.parametrize("broken", ["q_len", "copy_at"])
@pytest.mark.parametrize("name", NAMES)
def test_the_check_notices_broken_chunks(name: str, broken: str) -> None:
    call = fill(op(name), next(case for case in CASES if case.name == "room"))
    assert call.prefill is not None
    call.prefill = replace(call.prefill, **{broken: getattr(call.prefill, broken).at[3].add(-1)})
    assert call.check() > 10 * TOLERANCE


@pytest.mark.parametrize(("rows", "state", "chip", "why"), [
    (1, (64, 128), "v6e", None), (0, (64, 128), "v6e", "no decode rows"), (1, (64, 128), "gpu", "chip 'gpu' is not"),
    (1, (60, 128), "v6e", "not whole tiles"), (1, (64, 64), "tpu7x", "not whole tiles"),
])  # fmt: skip
def test_what_the_kernel_declines(rows: int, state: tuple[int, int], chip: str, why: str | None) -> None:
    asked = Target("tpu", chip, (("ssd", "tpu"), ("gated_delta", "tpu")))
    for choose in (
        lambda target: ssd.choice(ssd.SSDSpec(rows, 2, 24, *state, 1, "bfloat16"), target),
        lambda target: gated_delta.choice(gated_delta.DeltaSpec(rows, 2, 8, 24, *state, "bfloat16"), target),
    ):
        chosen = choose(Target("tpu", chip))
        assert chosen.implementation.name == ("tpu" if why is None else "reference")
        if why is not None:
            with pytest.raises(KernelDeclined, match=why):
                choose(asked)


def test_few_tokens_are_served_and_many_are_not() -> None:
    def chosen(room: int) -> str:
        return ssd.choice(
            ssd.SSDSpec(0, 64, 24, 64, 128, 1, "bfloat16", room), Target("tpu", "v6e")
        ).implementation.name

    assert [chosen(room) for room in (5, 16, 17)] == ["tpu", "tpu", "reference"]


@pytest.mark.parametrize(("heads", "state", "block"), [
    (80, (64, 128), 16), (128, (64, 128), 32), (32, (128, 128), 16), (24, (64, 128), 24), (6, (128, 256), 6),
])  # fmt: skip
def test_heads_of_a_block_divide_all_and_fill_sublanes(heads: int, state: tuple[int, int], block: int) -> None:
    assert states_tpu.heads_of(heads, state) == block
