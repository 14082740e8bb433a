"""Tuning searches within the rules, skips what fails, and writes what the kernels then look up."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import tune
from benchmarks.device import Rates
from benchmarks.kernel_work import Work, all_work
from pallas_kernels import tuning
from pallas_kernels.quantized_matmul import gpu as quantized_gpu
from pallas_kernels.quantized_matmul import tpu as quantized_tpu
from pallas_kernels.target import Target

RATES = Rates(1e12, 1e14)
TPU, GPU = Target("tpu", "v6e"), Target("gpu", "h200")
EVER = 1e12


def named(op: str, name: str, target: Target, small: bool = False) -> Work:
    return next(work for work in all_work(op, target, small) if work.name == name)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Lookups read <tmp>/<op>/tuned.json."""
    monkeypatch.setattr(tuning.resources, "files", lambda package: tmp_path)
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def fake_benches(monkeypatch: pytest.MonkeyPatch, seconds: Any) -> None:
    class Fake:
        def __init__(self, work: Work) -> None:
            self.work = work

        def seconds(self, parameters: tune.Parameters) -> float:
            return seconds(parameters)

    monkeypatch.setattr(tune, "bench", lambda work, target, rates: Fake(work))


def test_what_is_written_is_what_the_kernel_looks_up(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = named("quantized_matmul", "llama_8b_qkv_int8_16", TPU)

    def seconds(p: tune.Parameters) -> float:
        if p["bn"] == 1024:
            raise tune.Unfit("does not compile")
        return 1.0 + abs(p["bn"] - 2048) / 2048 + abs(p["bk"] - 512) / 4096

    fake_benches(monkeypatch, seconds)
    assert tune.tune(tune.by_key([work], TPU), TPU, RATES, EVER, files) == []
    table = json.loads((files / "quantized_matmul" / "tuned.json").read_text())
    assert table == {"v6e": {"16x4096x6144 int8 0 float": {"bm": 16, "bn": 2048, "bk": 512}}}
    w = jax.eval_shape(work.make)[1][0]
    assert quantized_tpu._blocks(16, w, TPU) == quantized_tpu.Blocks(16, 2048, 512)
    assert quantized_tpu._blocks(16, w, Target("tpu", "v5e")) == quantized_tpu.computed_blocks(
        16, w, Target("tpu", "v5e")
    )


def test_two_percent_are_not_worth_an_entry(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = named("quantized_matmul", "llama_8b_qkv_int8_16", GPU)
    fake_benches(monkeypatch, lambda p: 1.0 - 0.01 * (p["stages"] == 3))
    tune.tune(tune.by_key([work], GPU), GPU, RATES, EVER, files)
    assert not (files / "quantized_matmul").exists()


def test_other_entries_stay(files: Path) -> None:
    tune.write(files, "op", "h100", "a", {"x": 1})
    tune.write(files, "op", "h200", "a", {"x": 2})
    tune.write(files, "op", "h200", "b", {"x": 3})
    assert tuning.lookup("op", "h100", "a") == {"x": 1} and tuning.lookup("op", "h200", "b") == {"x": 3}
    assert tuning.lookup("op", "h200", "c") is None


def test_a_trial_is_of_one_op_and_ends() -> None:
    with tuning.trying("quantized_matmul", {"bm": 1}) as trial:
        assert tuning.lookup("quantized_matmul", "any", "key") == {"bm": 1}
        assert tuning.lookup("grouped_matmul", "any", "key") is None
    assert trial.keys == {"key"} and tuning.lookup("quantized_matmul", "any", "key") is None


@pytest.mark.parametrize("target", [TPU, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("paged_attention", "llama8b_decode_64x1k"),
        ("paged_attention", "llama8b_prefill_1k"),
        ("grouped_matmul", "qwen3_30b_up_32"),
        ("grouped_matmul", "qwen3_30b_up_32_int4"),
        ("quantized_matmul", "llama_8b_down_int4_128_16"),
    ],
)
def test_every_op_has_a_key_and_a_search_around_the_computed_choice(op: str, name: str, target: Target) -> None:
    work = named(op, name, target)
    assert tune.key_of(work, target)
    search = tune.search_of(work, target)
    assert search.fits(search.start) and set(search.options) <= set(search.start)
    assert sum(len(values) for values in search.options.values()) > len(search.options)
    # What the search would hand out is taken up: tracing with it goes another way than without.
    moving, fixed = jax.eval_shape(work.make)
    with tuning.trying(op, search.start):
        jax.eval_shape(lambda *a: work.call(*a, target=work.forced(target, target.platform)), *moving, *fixed)


def test_cases_of_one_key_are_searched_together() -> None:
    works = [w for w in all_work("paged_attention", GPU, False) if w.name.startswith("llama8b_decode")]
    groups = tune.by_key(works, GPU)
    assert any(len(group) == tune.CASES_A_KEY for group in groups.values())
    assert sum(len(group) for group in groups.values()) < len(works)


def test_the_gpu_search_keeps_k_whole() -> None:
    work = named("quantized_matmul", "llama_8b_down_int4_128_16", GPU)
    search = tune.search_of(work, GPU)
    assert not search.fits(search.start | {"bk": 64}) and not search.fits(search.start | {"splits": 3})
    w = jax.eval_shape(work.make)[1][0]
    assert search.start == tune.asdict(quantized_gpu.computed_blocks(16, w, GPU))


def test_a_spent_budget_names_what_was_left_out(files: Path) -> None:
    work = named("quantized_matmul", "llama_8b_qkv_int8_16", TPU)
    assert tune.tune({"key": [work]}, TPU, RATES, time.monotonic() - 1, files) == ["key"]


@pytest.mark.slow
def test_the_real_clock_in_the_interpreter(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end on a CPU: candidates are compiled, checked against the reference, timed, and one is written."""
    target = Target("tpu", "v6e", interpret=True)
    work = named("quantized_matmul", "int4_128", target, small=True)
    monkeypatch.setattr(tune, "WORTH", 9.0)
    options = {"bn": (128,), "bk": (512, 100)}
    monkeypatch.setitem(
        tune.SEARCHES,
        ("quantized_matmul", "tpu"),
        lambda work, target: tune.Search({"bm": 2, "bn": 128, "bk": 512}, options),
    )
    assert tune.tune(tune.by_key([work], target), target, Rates(1e3, 1e3), EVER, files) == []
    assert tuning.lookup("quantized_matmul", "v6e", "2x512x128 int4 128 float") == {"bm": 2, "bn": 128, "bk": 512}
