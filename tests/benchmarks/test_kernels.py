"""The kernel benchmark checks what it times, counts what must move, and times what it says."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernels
from benchmarks.device import Rates, copies_for, looped, measure_rates, timed, turns_for
from benchmarks.kernel_rivals import Rival, rivals
from benchmarks.kernel_work import OPS, Work, all_work, error
from pallas_kernels.target import CPU, Target

RATES = Rates(1e10, 1e11)


def named(op: str, name: str) -> Work:
    return next(work for work in all_work(op, CPU, small=True) if work.name == name)


SMALL = [
    pytest.param("paged_attention", "decode_gqa_3", marks=pytest.mark.slow),
    pytest.param("grouped_matmul", "ragged", marks=pytest.mark.slow),
    pytest.param("kv_write", "write_decode_int8", marks=pytest.mark.slow),
    ("quantized_matmul", "int4_64"),
]


def rows_of(work: Work) -> dict[str, Any]:
    return {row["by"]: row for row in kernels.measure(kernels.prepare(work, CPU, 1e-3))}


@pytest.mark.parametrize(("op", "name"), SMALL)
def test_a_right_result_is_timed(op: str, name: str) -> None:
    row = rows_of(named(op, name))["octavo"]
    assert row["implementation"] == "reference" and row["error"] < 8e-3 and row["timing"].median_s > 0


@pytest.mark.parametrize(("op", "name"), SMALL)
def test_a_wrong_result_is_not_timed(op: str, name: str) -> None:
    work = named(op, name)

    def spoilt(*inputs: Any, target: Target) -> jax.Array:
        out = work.call(*inputs, target=target)
        return out.at[1].set(1) if work.carried else 1.1 * out.astype(jnp.float32)

    row = rows_of(replace(work, call=spoilt))["octavo"]
    assert "wrong: error 0." in row["failed"] and "timing" not in row


def test_a_library_outside_jax_runs_its_own_turns() -> None:
    work, turns = named("quantized_matmul", "int8"), []

    def call(x: Any, w: Any, turns_: list[int] = turns, turns: int = 1) -> Any:
        turns_.append(turns)
        return work.answer(x, w)

    rival = Rival("host", call, fetch=np.asarray)
    program = kernels.Program("host", False, "", None, None, 3, 1, rival)
    inputs = jax.jit(work.make)()
    row = kernels._checked_time(program, work, inputs, work.answer(*inputs[0], *inputs[1]))
    assert row["error"] == 0 and row["timing"].turns == 3 and turns[0] == 1 and set(turns[1:]) == {3}


def test_one_wrong_number_is_seen() -> None:
    work = named("quantized_matmul", "int8")
    moving, fixed = jax.jit(work.make)()
    wanted = work.answer(*moving, *fixed)
    assert error(work, wanted, wanted) == 0
    assert not error(work, wanted.at[0, 0].add(jnp.linalg.norm(wanted[0])), wanted) <= work.tolerance
    assert not error(work, wanted.at[0, 0].set(jnp.nan), wanted) <= work.tolerance


def test_bytes_and_flops_counted_by_hand() -> None:
    """Llama-8B: 64 rows of 1024 keys of 8 heads of 128, key and value, 2 bytes; 32 query heads."""
    tpu = Target("tpu", "v6e")
    decode = next(w for w in all_work("paged_attention", tpu, small=False) if w.name == "llama8b_decode_64x1k")
    assert decode.bytes == 64 * 1024 * 8 * 2 * 128 * 2 + 2 * 64 * 32 * 128 * 2
    assert decode.flops == 4 * 64 * 1024 * 32 * 128
    prefill = next(w for w in all_work("paged_attention", tpu, small=False) if w.name == "llama8b_prefill_1k")
    assert prefill.flops == 4 * 32 * 128 * 1024 * 1025 / 2
    window = next(w for w in all_work("paged_attention", tpu, False) if w.name == "gemma3_27b_decode_16x8k_window")
    assert window.bytes == 16 * 1024 * 16 * 2 * 128 * 2 + 2 * 16 * 32 * 128 * 2
    matrix = next(w for w in all_work("quantized_matmul", tpu, small=False) if w.name == "llama_8b_qkv_int4_128_16")
    assert matrix.bytes == 4096 * 6144 // 2 + 4096 // 128 * 6144 * 4 + 16 * (4096 + 6144) * 2
    experts = next(w for w in all_work("grouped_matmul", tpu, small=False) if w.name == "qwen3_30b_up_1")
    write = next(w for w in all_work("kv_write", tpu, small=False) if w.name == "llama8b_write_decode_64")
    assert write.bytes == 64 * 2 * (8 * 2 * 128 * 2) and write.flops == 0
    assert experts.bytes == 8 * 2048 * 1536 * 2 + 8 * (2048 + 1536) * 2 and experts.flops == 2 * 8 * 2048 * 1536


def test_nothing_is_hoisted_out_of_the_loop() -> None:
    """The product stands in the loop's body, though its inputs never change."""
    x, w = jnp.ones((8, 64)), jnp.ones((64, 32))
    text = jax.jit(looped(jnp.dot, 5)).lower((x,), [(w,), (w + 1,)]).compile().as_text() or ""
    bodies = re.findall(r"body=%?([\w.]+)", text)
    assert bodies
    inside = text.split(f"%{bodies[0]} ", 1)[1].split("\n}", 1)[0]
    assert len(re.findall(r"dot\(|calls=|custom-call", inside)) >= 2
    moving, results = jax.jit(looped(jnp.dot, 5))((x,), [(w,), (w + 1,)])
    assert (moving[0] == x).all() and (results[1] == 2 * results[0]).all()


def test_the_clock_counts_turns_and_copies() -> None:
    timing = timed(lambda: time.sleep(0.03), turns=3, copies=2)
    assert 0.005 <= timing.least_s <= timing.median_s < 0.02
    assert turns_for(1e-5) == 512 or turns_for(1e-5) > 500
    assert turns_for(1.0) == 1
    assert copies_for(1 << 20, Target("gpu", "h200")) == 4 and copies_for(1 << 30, Target("gpu", "h200")) == 1
    assert copies_for(1 << 20, Target("tpu", "v6e")) == 1


@pytest.mark.slow
def test_rates_are_measured() -> None:
    rates = measure_rates(small=True)
    assert 1e7 < rates.copy_bytes_per_s < 1e12 and 1e7 < rates.matmul_flops < 1e14


def test_libraries_say_why_they_are_skipped() -> None:
    for op, reason in (("paged_attention", "KV in int8"), ("grouped_matmul", "weights in int4")):
        skipped = [rivals(work, Target("tpu", "v6e"))[1] for work in all_work(op, Target("tpu", "v6e"), small=False)]
        assert any(reason in text for by in skipped for text in by.values()), op


def test_a_spent_budget_names_what_was_left_out() -> None:
    run = kernels.Run(CPU, RATES, deadline=time.monotonic(), threads=1, cases=[], left_out=[])
    run.go([named("quantized_matmul", "int8"), named("quantized_matmul", "e4m3")])
    assert run.left_out == ["quantized_matmul int8", "quantized_matmul e4m3"] and not run.cases


def test_ops_take_turns() -> None:
    first = kernels.interleaved(OPS, CPU, True, ())[: len(OPS)]
    assert [work.op for work in first] == list(OPS)
    assert [work.name for work in kernels.interleaved(OPS, CPU, True, ("int8_one",))] == ["int8_one_row"]


def test_the_command_runs_end_to_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure_rates", lambda small: RATES)
    assert kernels.main(["--small", "--only", "quantized_matmul", "--cases", "int8_one_row", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "int8_one_row" in out and "xla dense" in out and "1 cases" in out
