"""The Mosaic kernel of paged attention in the TPU interpreter: every case of the op, races looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # its race detector has no public name
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_layout import kv_layout
from pallas_kernels.paged_attention import tpu, tpu_kernel
from pallas_kernels.paged_attention.api import choice
from pallas_kernels.paged_attention.cases import CASES, REAL, Case
from pallas_kernels.paged_attention.tpu_shape import FIELDS, HI, LO, NEXT, ROW
from pallas_kernels.target import Target
from tests.pallas_kernels.attention_calls import TOLERANCE, by_parts, fill, jitted, shift_pages, swap_keys_with_values

TPU = Target("tpu", "v6e", interpret=True)
DECLINED = {"decode_pages_of_1", "prefill_pages_of_1", "decode_int8"}  # pages of 1, and of 16 in int8
DECLINED |= {"decode_latent_lanes"}  # a value of 24 lanes
OFTEN = {
    "decode_gqa_3",
    "decode_head_80",
    "decode_window",
    "decode_sinks_bfloat16",
    "decode_int8_head_80",
    "decode_e5m2",
    "decode_latent",
    "decode_latent_e4m3",
    "prefill_latent_bfloat16",
    "prefill_latent_128_heads",
    "prefill_ragged",
    "prefill_all_idle",
    "prefill_sinks",
    "prefill_softcap_mqa_8",
}
# Of pages whose tokens are spread over devices.
SPREAD = Case(name="spread", lengths=(40, 9), queries=(20, 9), window=24, sinks=True, q_heads=2, page_size=32)
PARTS = ("decode_window", "decode_long", "decode_latent_int8", "decode_sinks_bfloat16", "decode_softcap_bfloat16",
         "prefill_continues", "prefill_window", "prefill_latent_window", "prefill_bfloat16",
         "prefill_e4m3")  # fmt: skip


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    """The interpreter raises where it finds a race; older ones only say so here."""
    yield
    races = interpret_pallas_call.races
    found = races is not None and races.races_found
    pltpu.reset_tpu_interpret_mode_state()
    assert not found


def served() -> list[Any]:
    cases = [case for case in CASES if case.name not in DECLINED]
    return [pytest.param(c, id=c.name, marks=[] if c.name in OFTEN else [pytest.mark.slow]) for c in cases]


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("case", served())
def test_equals_dense_attention(case: Case) -> None:
    assert choice(case.spec("tpu"), TPU).implementation.name == "tpu"
    assert fill(case, TPU).error() < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", [SPREAD, *(pytest.param(named(name), marks=pytest.mark.slow) for name in PARTS)],
                         ids=lambda case: case.name)  # fmt: skip
def test_parts_of_pages_are_the_whole(case: Case) -> None:
    """Two or four devices with a part of every page's tokens, NaN in what is no key; it matters whose is whose."""
    count, page_size = (2, 32) if case is SPREAD else (4, 128)
    call = fill(replace(case, page_size=page_size), TPU)
    spec = replace(call.case.spec("tpu"), page_size=page_size // count, parts=count)
    assert choice(spec, TPU).implementation.name == "tpu"
    assert by_parts(call, count) < TOLERANCE[case.dtype]
    if case is SPREAD:
        assert not by_parts(call, count, turn=1) < 0.01


def test_parts_that_are_no_power_of_two_are_declined() -> None:
    spec = replace(named("decode_gqa_3").spec("tpu"), parts=3)
    assert "spread over 3 devices, which is not a power of two" in (tpu.declines(spec, TPU) or "")


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (named("decode_pages_of_1"), "page_size 1 is not a power of two of at least 8 (float32 tiles)"),
        (named("decode_int8"), "page_size 16 is not a power of two of at least 32 (int8 tiles)"),
        (named("decode_latent_lanes"), "latents of 128 lanes, 24 of them the value: not multiples of 128"),
        (Case(name="pages_of_24", lengths=(5,), page_size=24), "page_size 24 is not a power of two"),
        (Case(name="endless", lengths=(5,), pages_per_seq=1 << 16), "1052672 bytes of SMEM for 1 rows of 65536 pages"),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_declines_name_the_numbers(case: Case, why: str) -> None:
    assert why in (tpu.declines(case.spec("tpu"), TPU) or "")
    assert choice(case.spec("tpu"), TPU).implementation.name == "reference"


def test_declines_other_layouts_and_platforms() -> None:
    spec = named("decode_head_80").spec("tpu")
    assert "head_width 80" in (tpu.declines(replace(spec, layout=kv_layout(2, 80, "float32", "cpu")), TPU) or "")
    tail = replace(kv_layout(2, 128, "int8", "tpu"), exponent_width=16)
    assert "exponent_width 16" in (tpu.declines(replace(spec, layout=tail, page_size=32), TPU) or "")
    assert tpu.declines(spec, Target("gpu", "h100")) == "for tpu"
    assert "'v2' is not in" in (tpu.declines(spec, Target("tpu", "v2")) or "")


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_serves_every_real_case(chip: str) -> None:
    for case in REAL:
        assert tpu.declines(case.spec("tpu"), Target("tpu", chip)) is None, case.name


def test_a_table_larger_than_smem_is_streamed() -> None:
    """256 rows of 4096 pages are 4 MiB, SMEM is 1."""
    case = Case(name="table", lengths=(1 << 16,) * 256, pages_per_seq=4096)
    assert tpu.declines(case.spec("tpu"), TPU) is None
    assert tpu.smem_bytes(case.spec("tpu"), TPU) < 1 << 17
    assert fill(Case(name="wide_table", lengths=(40, 0, 17), pages_per_seq=4096), TPU).error() < TOLERANCE["float32"]


@pytest.mark.parametrize("name", ["decode_gqa_3", "decode_latent", "prefill_continues"])
def test_the_check_notices_keys_swapped_with_values(name: str) -> None:
    call = fill(named(name), TPU)
    swap_keys_with_values(call)
    assert not call.error() < 0.1


@pytest.mark.parametrize("name", ["decode_gqa_3", "prefill_continues"])
def test_the_check_notices_a_shifted_page(name: str) -> None:
    call = fill(named(name), TPU)
    shift_pages(call, 1)
    assert not call.error() < 0.01


@pytest.mark.parametrize("name", ["decode_idle_rows", "prefill_ragged"])
def test_tokens_of_nobody_come_back_finite(name: str) -> None:
    call = fill(named(name), TPU)
    call.q = jnp.nan_to_num(call.q)
    assert np.isfinite(call.run()).all()


@pytest.mark.parametrize("queries", [None, (20, 30, 0, 9)], ids=["decode", "prefill"])
def test_a_rows_result_does_not_depend_on_the_others(queries: tuple[int, ...] | None) -> None:
    """Bit for bit, also where prompts share a block of queries and one of them has NaN in its keys and values."""
    lengths = (20, 300, 0, 77) if queries is None else (20, 300, 77)
    case = Case(name="neighbours", lengths=lengths, queries=queries and (20, 30, 9), window=50)
    call = fill(case, TPU)
    together = call.run()
    spoilt = replace(call, pages=call.pages.at[call.tables[1, 17]].set(jnp.nan)).run()
    mine = (lambda out, row: out[row]) if queries is None else (lambda out, row: np.split(out, (20, 50))[row])
    assert np.isnan(mine(spoilt, 1)).any(), "row 1 sees its own NaN"
    for row in (0, len(lengths) - 1):
        assert mine(spoilt, row).tobytes() == mine(together, row).tobytes()
        assert np.isfinite(mine(together, row)).all()


def test_the_detector_notices_copies_into_the_half_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tpu_kernel._copies

    def careless(*arguments: Any) -> Callable[..., None]:
        go = whole(*arguments)
        return lambda chunk, slot, *, start: go(chunk, 0 * slot, start=start)

    monkeypatch.setattr(tpu_kernel, "_copies", careless)
    jitted.cache_clear()
    try:
        with pytest.raises(Exception, match="RACE DETECTED"):
            fill(named("decode_gqa_3"), TPU).run()
    finally:
        jitted.cache_clear()
        pltpu.reset_tpu_interpret_mode_state()


def test_items_of_prompts_that_share_blocks() -> None:
    """Worked by hand: blocks of 8, rows of 5, 9 and 1 tokens, an idle row, a block of padding."""
    starts, lens, positions = (jnp.asarray(a, jnp.int32) for a in ([0, 5, 14, 0], [5, 9, 1, 0], [3, 0, 7, 0]))
    items = np.asarray(tpu.prefill_items(starts, lens, positions, 3, 8, None)).reshape(-1, FIELDS)
    assert items.shape == (7, FIELDS)
    used = [(int(i[0]), int(i[ROW]), int(i[4]), int(i[5]), int(i[6]), int(i[HI])) for i in items if i[LO] < i[HI]]
    assert used == [(0, 0, 3, 0, 5, 8), (0, 1, -5, 5, 8, 3), (1, 1, 3, 0, 6, 9), (1, 2, 1, 6, 7, 8)]
    assert items[:, NEXT].tolist() == [1, 2, 3, 7, 7, 7, 7]
    assert items[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 2], "the padding's block is opened and closed too"
