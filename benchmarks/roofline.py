"""The roofline of `octavo plan` against measured steps of the default model on this machine.

    python -m benchmarks.roofline          # --help

A copy and a matrix product say what the machine can do: they are the peak rates of a chip as `configs/chips.yaml` has
them for others. The count of a decode step (`engine.estimate.count`) and these rates give a bound, and the engine is
then timed: prompts of one length at several batches, with many tokens and with one, whose difference is decoding.
Calibration and rounds alternate, and CPU seconds of the process are compared beside the wall clock, since a machine
that others use gives every process a part of it. A ratio of 1 would be a step that only its bytes or products hold up.

Writes benchmarks/results/<date>-cpu-roofline.json; the last line on stdout is the same JSON.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from engine import LLM, SamplingParams
from engine.config import EngineOptions
from engine.estimate.chips import Topology, topology_of
from engine.estimate.roofline import decode_bound, prefill_bound
from engine.explain import model_of

COPY_BYTES = 1 << 28
PRODUCT = (512, 2048, 2048)  # rows, inner, columns: weights of 2048 x 2048 stay in no core's cache


@dataclass(frozen=True)
class Times:
    """Of one call: the clock, and CPU seconds of all threads."""

    wall_s: float
    cpu_s: float

    def __sub__(self, other: Times) -> Times:
        return Times(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)


def timed(call: Callable[[], Any]) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


def best(calls: Sequence[Times]) -> Times:
    return Times(min(t.wall_s for t in calls), min(t.cpu_s for t in calls))


class Machine:
    """A copy and a product, measured again with every round."""

    def __init__(self, dtype: str) -> None:
        rows, inner, columns = PRODUCT
        self.dtype, self._copies, self._products = dtype, list[Times](), list[Times]()
        self._array = jnp.zeros((COPY_BYTES // 4,), jnp.float32)
        self._left, self._right = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
        # In place: the pages of a new array cost more than what is written to them.
        self._copy = jax.jit(lambda x: x + 1, donate_argnums=0)
        self._product = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
        self._round()  # compiles
        self._copies.clear()
        self._products.clear()

    def _round(self) -> None:
        self._copies.append(timed(self._copied))
        self._products.append(timed(lambda: self._product(self._left, self._right)))

    def _copied(self) -> jax.Array:
        self._array = self._copy(self._array)
        return self._array

    def measure(self, times: int = 3) -> None:
        for _ in range(times):
            self._round()

    def chip(self, clock: str) -> Topology:
        """One device with the rates of the best calls. clock: a field of `Times`."""
        copy, product = getattr(best(self._copies), clock), getattr(best(self._products), clock)
        rows, inner, columns = PRODUCT
        rate = 2.0 * rows * inner * columns / product
        cpu = topology_of("cpu:1").chip
        known = replace(cpu, memory_bytes_per_s=2 * COPY_BYTES / copy, flops=((self.dtype, rate),))
        return Topology(known, (1,))


def answered(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> Times:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return timed(lambda: llm.generate([list(prompt) for prompt in prompts], params) and None)


def prompts_of(rng: np.random.Generator, batch: int, length: int) -> list[list[int]]:
    """Random, so that no prefix is known."""
    return rng.integers(100, 40000, (batch, length)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens that are decoded")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    llm = LLM(max_model_len=512, max_num_seqs=max(given.batches), max_num_batched_tokens=128, decode_steps=1)
    model, config = model_of(EngineOptions(max_model_len=512)), llm.engine.config
    machine, rng = Machine(config.dtype), np.random.default_rng(0)
    decodes: dict[int, list[Times]] = {batch: [] for batch in given.batches}
    prefills: list[Times] = []
    for _ in range(given.rounds):
        machine.measure()
        for batch, found in decodes.items():
            one = answered(llm, prompts_of(rng, batch, given.length), 1)
            many = answered(llm, prompts_of(rng, batch, given.length), 1 + given.tokens)
            found.append(many - one)
        prefills.append(answered(llm, prompts_of(rng, 1, given.length), 1))
    llm.shutdown()
    rows = []
    for clock in ("wall_s", "cpu_s"):
        chip = machine.chip(clock)
        for batch, found in decodes.items():
            bound = decode_bound(model, config, chip, batch, given.length + given.tokens // 2).bound
            rows.append(_row(f"decode {batch}", clock, bound, getattr(best(found), clock) / given.tokens))
        bound = prefill_bound(model, config, chip, given.length).bound
        rows.append(_row(f"prefill {given.length}", clock, bound, getattr(best(prefills), clock)))
    rates = {clock: _rates(machine.chip(clock)) for clock in ("wall_s", "cpu_s")}
    header = ("step", "clock", "allowed ms", "measured ms", "ratio", "binds")
    print(report.table(header, [tuple(row.values()) for row in rows]))
    report.finish("roofline", "cpu", {
        "model": "smollm2-135m-instruct", "dtype": config.dtype, "cores": os.cpu_count(), "rounds": given.rounds,
        "rates": rates, "steps": rows, "versions": report.versions("jax", "jaxlib"),
    })  # fmt: skip


def _row(step: str, clock: str, bound: Any, measured: float) -> dict[str, Any]:
    return {
        "step": step, "clock": clock, "allowed_ms": round(bound.seconds * 1e3, 2),
        "measured_ms": round(measured * 1e3, 2), "ratio": round(measured / bound.seconds, 2), "binds": bound.binds,
    }  # fmt: skip


def _rates(topology: Topology) -> dict[str, float]:
    chip = topology.chip
    return {"gflops": round(dict(chip.flops).popitem()[1] / 1e9, 1) if chip.flops else 0.0,
            "copy_gb_per_s": round((chip.memory_bytes_per_s or 0) / 1e9, 1)}  # fmt: skip


if __name__ == "__main__":
    main()
