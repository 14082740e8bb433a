"""The kernel ops on the accelerator at hand, next to everyone else's: time, and what share of the chip that is.

    python -m benchmarks.kernels [--budget-s 480] [--only paged_attention] [--cases llama8b]
    python -m benchmarks.kernels --small        # the tests' shapes; also on a CPU

First the device's own copy bandwidth and bfloat16 matmul rate are measured. Then for each case and
implementation the result is checked against the float32 reference, and only what is right is
timed: median seconds of a call on the device, without dispatch. `bandwidth` is the bytes that must move once
(inputs that are seen, result) over time and measured bandwidth; `matmul` the same with FLOPs.
Cases start while the budget lasts; the rest are named. A library is skipped with its reason.

Compilation takes longer than measuring, so a few cases are compiled at a time, in threads. Writes
benchmarks/results/<date>-<chip>-kernels.json; the last line on stdout is the same JSON. Exit code 1
when an implementation of ours gave a wrong result.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import report
from benchmarks.device import Rates, Timing, copies_for, looped, measure_rates, rebound, target_here, timed, turns_for
from benchmarks.kernel_rivals import FAULTS, Rival, rivals, short
from benchmarks.kernel_work import OPS, Work, all_work, error
from pallas_kernels.choice import KernelDeclined
from pallas_kernels.quantized import tree_bytes
from pallas_kernels.target import Target

RIVAL_TOLERANCE = 3e-2  # libraries round where they like; what is further off computes something else
REFERENCE_TURNS = 8  # the plain reference is slow, and a loop of many turns would eat the budget
VERSIONS = ("octavo", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch")
TIME_LEFT_S = 20  # of the budget, kept for the report


@dataclass(frozen=True)
class Program:
    """Something to time: calls compiled for the abstract inputs, once alone and once in a loop."""

    name: str
    ours: bool
    implementation: str  # which of ours serves, "" for others
    once: Any
    loop: Any
    turns: int
    copies: int
    rival: Rival | None


@dataclass(frozen=True)
class Prepared:
    """A case ready to run: its inputs' abstract shapes, its programs, who does not serve it and why."""

    work: Work
    answer: Any
    programs: list[Program]
    skipped: dict[str, str]


def prepare(work: Work, target: Target, expected_s: float) -> Prepared:
    """Compile everything of a case; no array is made."""
    moving, fixed = jax.eval_shape(work.make)
    answer = jax.jit(work.answer).lower(*moving, *fixed).compile()
    programs: list[Program] = []
    others, skipped = rivals(work, target)
    turns, copies = turns_for(expected_s), copies_for(tree_bytes(fixed), target)
    for name, implementation in _ours(work, target):
        try:
            forced = work.forced(target, implementation)
            work.choice(forced)
            call = partial(work.call, target=forced)
            rounds = turns if name == "octavo" else min(turns, REFERENCE_TURNS)
            copies = 1 if work.carried else copies
            once, loop = compiled_pair(call, moving, fixed, rounds, copies, work.carried)
            programs.append(Program(name, True, implementation, once, loop, rounds, copies, None))
        except KernelDeclined as reason:
            skipped[name] = str(reason)
    for rival in others:
        try:
            programs.append(_rivals_program(rival, (moving, fixed), turns, copies))
        except FAULTS as reason:
            skipped[rival.name] = f"does not compile: {short(reason)}"
    return Prepared(work, answer, programs, skipped)


def _ours(work: Work, target: Target) -> list[tuple[str, str]]:
    """What the engine would get, and XLA's lowering of the reference where that is another."""
    chosen = work.choice(target).implementation.name
    return [("octavo", chosen)] + ([("xla reference", "reference")] if chosen != "reference" else [])


def _rivals_program(rival: Rival, inputs: Any, turns: int, copies: int) -> Program:
    if rival.fetch is not None:
        return Program(rival.name, False, "", None, None, turns, 1, rival)
    moving, fixed = jax.eval_shape(rival.prepare, inputs) if rival.prepare is not None else inputs
    once, loop = compiled_pair(rival.call, moving, fixed, turns, copies)
    return Program(rival.name, False, "", once, loop, turns, copies, rival)


def compiled_pair(
    call: Callable[..., Array], moving: Any, fixed: Any, turns: int, copies: int, carried: bool = False
) -> tuple[Any, Any]:
    """The call alone and in a loop, for abstract inputs; the loop's fixed input is donated where it is carried."""
    once = jax.jit(call).lower(*moving, *fixed).compile()
    donated = (0, 1) if carried else ()
    loop = jax.jit(looped(call, turns, carried), donate_argnums=donated).lower(moving, [fixed] * copies).compile()
    return once, loop


def measure(prepared: Prepared) -> list[dict[str, Any]]:
    """Check, then time, each program of a case; a row each."""
    work = prepared.work
    inputs = jax.jit(work.make)()
    wanted = prepared.answer(*inputs[0], *inputs[1])
    rows: list[dict[str, Any]] = []
    for program in prepared.programs:
        row: dict[str, Any] = {"by": program.name, "implementation": program.implementation}
        try:
            row |= _checked_time(program, work, inputs, wanted)
        except FAULTS as reason:
            row["failed"] = short(reason)
        rows.append(row)
    return rows + [{"by": name, "skipped": reason} for name, reason in prepared.skipped.items()]


def _checked_time(program: Program, work: Work, inputs: Any, wanted: Array) -> dict[str, Any]:
    rival = program.rival
    moving, fixed = inputs if rival is None or rival.prepare is None else rival.prepare(inputs)
    if rival is not None and rival.fetch is not None:
        host, got = rival.call, rival.fetch(rival.call(*moving, *fixed))
    else:
        host, got = None, program.once(*moving, *fixed)
    found = error(work, jnp.asarray(got), wanted)
    limit = work.tolerance if program.ours else RIVAL_TOLERANCE
    row: dict[str, Any] = {"error": float(f"{found:.3g}")}
    if not found <= limit:
        return row | {"failed": f"wrong: error {found:.3g}, at most {limit:g}"}
    if work.carried:
        timing = timed(rebound(program.loop, *jax.tree.map(jnp.copy, (moving, fixed))), program.turns)
    elif host is not None:
        timing = timed(lambda: host(*moving, *fixed, turns=program.turns), program.turns)
    else:
        sets = [fixed, *(jax.tree.map(jnp.copy, fixed) for _ in range(program.copies - 1))]
        timing = timed(lambda: program.loop(moving, sets), program.turns, program.copies)
    return row | {"timing": timing}


def figures(work: Work, timing: Timing, rates: Rates) -> dict[str, Any]:
    """Time and shares, rounded to what they mean."""
    seconds = timing.median_s
    return {
        "us": float(f"{seconds * 1e6:.4g}"),
        "least_us": float(f"{timing.least_s * 1e6:.4g}"),
        "bandwidth": round(work.bytes / seconds / rates.copy_bytes_per_s, 3),
        "matmul": round(work.flops / seconds / rates.matmul_flops, 3),
        **{key: value for key, value in asdict(timing).items() if not key.endswith("_s")},
    }


def interleaved(ops: Sequence[str], target: Target, small: bool, words: Sequence[str]) -> list[Work]:
    """A case of each op in turn, so that a short budget sees all ops."""
    lists = [all_work(op, target, small, words) for op in ops]
    return [work for row in zip_longest(*lists) for work in row if work is not None]


def waves(works: Sequence[Work], size: int) -> Iterator[list[Work]]:
    rest = iter(works)
    while wave := list(islice(rest, size)):
        yield wave


@dataclass
class Run:
    """What a run found so far."""

    target: Target
    rates: Rates
    deadline: float  # of time.monotonic
    threads: int
    cases: list[dict[str, Any]]
    left_out: list[str]
    wrong: int = 0

    def go(self, works: Sequence[Work]) -> None:
        with ThreadPoolExecutor(self.threads) as pool:
            for wave in waves(works, self.threads):
                late = time.monotonic() > self.deadline - TIME_LEFT_S
                if late:
                    self.left_out += [f"{work.op} {work.name}" for work in wave]
                    continue
                for work, prepared in zip(wave, pool.map(self._prepare, wave), strict=True):
                    self._case(work, prepared)

    def _prepare(self, work: Work) -> Prepared | str:
        expected = max(work.bytes / self.rates.copy_bytes_per_s, work.flops / self.rates.matmul_flops)
        try:
            return prepare(work, self.target, expected)
        except FAULTS as reason:
            return short(reason)

    def _case(self, work: Work, prepared: Prepared | str) -> None:
        if time.monotonic() > self.deadline:
            self.left_out.append(f"{work.op} {work.name}")
            return
        rows: list[dict[str, Any]]
        try:
            rows = [{"by": "octavo", "failed": prepared}] if isinstance(prepared, str) else measure(prepared)
        except FAULTS as reason:  # the inputs or the reference do not fit
            rows = [{"by": "octavo", "failed": short(reason)}]
        for row in rows:
            if "timing" in row:
                row |= figures(work, row.pop("timing"), self.rates)
            self.wrong += "failed" in row and row["by"] in ("octavo", "xla reference")
            print(line(work, row), flush=True)
        head = {"op": work.op, "case": work.name, "bytes": work.bytes, "flops": work.flops}
        self.cases.append(head | {"by": rows})


def line(work: Work, row: dict[str, Any]) -> str:
    head = f"{work.op:17} {work.name:38} {row['by']:27}"
    if "us" in row:
        shares = f"{row['bandwidth']:6.1%} of bandwidth {row['matmul']:6.1%} of matmul rate"
        served = f"  by {row['implementation']}" if row["implementation"] else ""
        return f"{head} {row['us']:11.1f} us  {shares}  error {row['error']:.1e}{served}"
    return f"{head} {row.get('failed') or 'skipped: ' + row['skipped']}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=480, help="no case starts when this much has passed")
    parser.add_argument("--only", nargs="+", choices=OPS, default=OPS, help="ops")
    parser.add_argument("--cases", nargs="+", default=(), help="words of names; none takes all")
    parser.add_argument("--small", action="store_true", help="the tests' shapes; nothing is written to results/")
    parser.add_argument(
        "--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="cases compiled at once"
    )
    args = parser.parse_args(arguments)
    start = time.monotonic()
    target, device = target_here(), jax.devices()[0]
    if target.platform == "cpu" and not args.small:
        parser.error("there is no accelerator here; --small runs the tests' shapes on the CPU")
    rates = measure_rates(args.small)
    print(f"{device.device_kind}: copies {rates.copy_bytes_per_s / 1e9:,.0f} GB/s, bfloat16 products", end=" ")
    print(f"{rates.matmul_flops / 1e12:,.1f} TFLOP/s", flush=True)
    run = Run(target, rates, start + args.budget_s, args.threads, [], [])
    run.go(interleaved(args.only, target, args.small, args.cases))
    print(f"{len(run.cases)} cases in {time.monotonic() - start:.0f} s, {run.wrong} wrong or failed", flush=True)
    if run.left_out:
        print(f"left out, the budget of {args.budget_s:g} s is spent: {', '.join(run.left_out)}")
    conclude(run, device.device_kind, args.small)
    return 1 if run.wrong else 0


def conclude(run: Run, kind: str, small: bool) -> None:
    result = {
        "device": kind,
        "chip": run.target.chip,
        "versions": report.versions(*VERSIONS),
        "rates": {key: float(f"{value:.4g}") for key, value in asdict(run.rates).items()},
        "cases": run.cases,
        "left_out": run.left_out,
    }  # fmt: skip
    if small:
        print({"chip": run.target.chip, "cases": len(run.cases), "wrong": run.wrong})
    else:
        report.finish("kernels", run.target.chip.replace(" ", "-"), result)


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())
