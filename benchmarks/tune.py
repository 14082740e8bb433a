"""Block sizes by measurement: tries candidates on the accelerator at hand and writes <op>/tuned.json.

    python -m benchmarks.tune [--budget-s 1800] [--only quantized_matmul] [--cases llama_8b]

For each key that the op's kernel looks up for its REAL cases (pallas_kernels/tuning.py): start from the
computed choice and change one parameter at a time, keeping what is faster, until nothing is. Cases
that share a key count alike, by the mean of their logarithms. A candidate that does not compile or
gives a wrong result is skipped with a line. An entry is written only where it saves at least 2 %;
entries of other chips and keys stay. The file is written after every key, so a run may be cut short.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks.device import Rates, copies_for, measure_rates, target_here, timed, turns_for
from benchmarks.kernel_rivals import FAULTS, short
from benchmarks.kernel_work import Work, all_work, error
from benchmarks.kernels import compiled_pair, tree_bytes
from pallas_kernels import tuning
from pallas_kernels.choice import KernelDeclined
from pallas_kernels.grouped_matmul import gpu as grouped_gpu
from pallas_kernels.grouped_matmul import tpu as grouped_tpu
from pallas_kernels.paged_attention import gpu as attention_gpu
from pallas_kernels.paged_attention import tpu as attention_tpu
from pallas_kernels.paged_attention.tpu_shape import shape_for
from pallas_kernels.quantized import Quantized
from pallas_kernels.quantized_matmul import gpu as quantized_gpu
from pallas_kernels.quantized_matmul import tpu as quantized_tpu
from pallas_kernels.target import Target

OPS = ("paged_attention", "grouped_matmul", "quantized_matmul")  # that look anything up
FOLDER = Path(tuning.__file__).parent
WORTH = 0.98  # of the computed choice's time; what saves less is noise
CASES_A_KEY = 4
Parameters = dict[str, int]


class Unfit(Exception):
    """Why a candidate is no choice."""


@dataclass(frozen=True)
class Search:
    """Where a key's search starts and which values each parameter may take."""

    start: Parameters
    options: dict[str, Sequence[int]]
    fits: Callable[[Parameters], bool] = lambda parameters: True


# What each kernel may be given; the rules are those of its `blocks` functions and declines.


def search_of(work: Work, target: Target) -> Search:
    return SEARCHES[work.op, target.platform](work, target)


def _weight(work: Work) -> Any:
    return jax.eval_shape(work.make)[1][0]


def _divisors(k: int, unit: int, most: int = 8192) -> list[int]:
    return [d for d in range(unit, min(k, most) + 1, unit) if k % d == 0]


def _quantized_tpu(work: Work, target: Target) -> Search:
    case, w = work.case, _weight(work)
    start = asdict(quantized_tpu.computed_blocks(case.tokens, w, target))
    unit = max(128, 8 * w.group) if w.group != case.k else 128
    rows = [start["bm"]] if case.tokens <= 64 else [b for b in (128, 256, 512, 1024) if b <= case.tokens]
    columns = [b for b in (256, 512, 1024, 2048, 4096) if b <= case.n]
    return Search(start, {"bn": columns, "bk": _divisors(case.k, unit) or [case.k], "bm": rows})


def _quantized_gpu(work: Work, target: Target) -> Search:
    case, w = work.case, _weight(work)
    start = asdict(quantized_gpu.computed_blocks(case.tokens, w, target))
    scaled = w.scales.shape[0] > 1

    def fits(p: Parameters) -> bool:
        whole = case.k % (p["bk"] * p["splits"]) == 0 and case.n % p["bn"] == 0
        return whole and (not scaled or p["bk"] % w.group == 0)

    options = {
        "stages": (2, 3, 4, 5, 6, 8),
        "splits": (1, 2, 3, 4, 6, 7, 8, 12, 14, 16),
        "bk": (64, 128, 256),
        "bn": (64, 128),
        "bt": sorted({start["bt"], *(b for b in (16, 32, 64) if b <= case.tokens)}),
    }
    return Search(start, options, fits)


def _grouped_tpu(work: Work, target: Target) -> Search:
    case, w = work.case, _weight(work)
    start = asdict(grouped_tpu.blocks(case.num_tokens, w, target))
    group = getattr(w, "group", case.k)
    unit = 128 if group == case.k else math.lcm(8 * group, 128)
    depths = sorted({case.k, *_divisors(case.k, unit)} if case.k <= 4096 else set(_divisors(case.k, unit)))
    rows = sorted({min(b, case.num_tokens) for b in (128, 256, 512, 1024)})
    columns = [b for b in (128, 256, 512, 768, 1024, 1536, 2048, 4096) if b <= case.n]
    return Search(start, {"bn": columns, "bm": rows, "bk": [d for d in depths if d >= 256] or depths})


def _grouped_gpu(work: Work, target: Target) -> Search:
    w = _weight(work)
    start = asdict(grouped_gpu.blocks(work.case.num_tokens, w, target))
    rows = (16, 32, 64, 128) if isinstance(w, Quantized) else (64, 128)
    return Search(start, {"stages": (3, 4, 5, 6, 7, 8), "bm": rows})


def _attention_tpu(work: Work, target: Target) -> Search:
    spec = work.case.spec("tpu")
    shape = shape_for(attention_tpu._sizes(spec), target)
    start = {"chunk_tokens": shape.chunk, "block_tokens": shape.block_tokens}
    options: dict[str, Sequence[int]] = {"chunk_tokens": (128, 256, 512, 1024, 2048)}
    if spec.kind == "prefill":
        options["block_tokens"] = (16, 32, 64, 128, 256)
    return Search(start, options, lambda p: p["chunk_tokens"] >= spec.page_size)


def _attention_gpu(work: Work, target: Target) -> Search:
    spec = work.case.spec("gpu")
    tile = attention_gpu._tile_of(spec, target)
    # Consumers that take turns at the ring need an even number of stages.
    stages = (2, 4, 6, 8, 10) if spec.kind == "decode" else (2, 3, 4)
    return Search({"block_kv": tile.block_kv, "stages": tile.stages}, {"stages": stages, "block_kv": (64, 128)})


SEARCHES: dict[tuple[str, str], Callable[[Work, Target], Search]] = {
    ("quantized_matmul", "tpu"): _quantized_tpu,
    ("quantized_matmul", "gpu"): _quantized_gpu,
    ("grouped_matmul", "tpu"): _grouped_tpu,
    ("grouped_matmul", "gpu"): _grouped_gpu,
    ("paged_attention", "tpu"): _attention_tpu,
    ("paged_attention", "gpu"): _attention_gpu,
}


def key_of(work: Work, target: Target) -> str | None:
    """The key that the kernel looks up for the case; None where it does not serve it, or looks nothing up."""
    moving, fixed = jax.eval_shape(work.make)
    with tuning.trying(work.op, None) as trial:
        try:
            jax.eval_shape(partial(work.call, target=work.forced(target, target.platform)), *moving, *fixed)
        except KernelDeclined:
            return None
    if len(trial.keys) > 1:
        raise ValueError(f"{work.op} looks up several keys for {work.name}: {sorted(trial.keys)}")
    return next(iter(trial.keys), None)


@dataclass(frozen=True)
class Bench:
    """A case with its inputs and answer on the device, ready for candidates."""

    work: Work
    target: Target  # the kernel asked for by name
    turns: int
    inputs: Any
    wanted: Any

    def seconds(self, parameters: Parameters) -> float:
        """Of one call with these parameters, once its result is right; raises Unfit."""
        moving, fixed = self.inputs
        copies = copies_for(tree_bytes(fixed), self.target)
        try:
            with tuning.trying(self.work.op, parameters):
                call = partial(self.work.call, target=self.target)
                once, loop = compiled_pair(call, moving, fixed, self.turns, copies)
            found = error(self.work, once(*moving, *fixed), self.wanted)
            if not found <= self.work.tolerance:
                raise Unfit(f"wrong: error {found:.3g}")
            sets = [fixed, *(jax.tree.map(jax.numpy.copy, fixed) for _ in range(copies - 1))]
            return timed(lambda: loop(moving, sets), self.turns, copies, longest_s=0.5).median_s
        except FAULTS as fault:
            raise Unfit(short(fault)) from fault


def bench(work: Work, target: Target, rates: Rates) -> Bench:
    inputs = jax.jit(work.make)()
    wanted = jax.jit(work.answer)(*inputs[0], *inputs[1])
    expected = max(work.bytes / rates.copy_bytes_per_s, work.flops / rates.matmul_flops)
    return Bench(work, work.forced(target, target.platform), turns_for(expected), inputs, wanted)


def best_of(search: Search, cost: Callable[[Parameters], float], deadline: float) -> tuple[Parameters, float]:
    """Coordinate descent: the cheapest found, and its cost. The start must be a choice."""
    best, least = search.start, cost(search.start)
    seen = {tuple(best.values())}
    improved = True
    while improved and time.monotonic() < deadline:
        improved = False
        for name, values in search.options.items():
            for value in values:
                candidate = best | {name: value}
                if tuple(candidate.values()) in seen or not search.fits(candidate) or time.monotonic() > deadline:
                    continue
                seen.add(tuple(candidate.values()))
                try:
                    price = cost(candidate)
                except Unfit as reason:
                    print(f"    {candidate}: {reason}", flush=True)
                    continue
                if price < least:
                    best, least, improved = candidate, price, True
    return best, least


def tune_key(works: Sequence[Work], target: Target, rates: Rates, deadline: float) -> tuple[Parameters, float] | None:
    """The best parameters for cases that share a key, and their time over the computed choice's."""
    benches = [bench(work, target, rates) for work in works]
    search = search_of(works[0], target)
    try:
        before = [b.seconds(search.start) for b in benches]
    except Unfit as reason:
        print(f"    the computed choice {search.start}: {reason}", flush=True)
        return None

    def cost(parameters: Parameters) -> float:
        logs = [math.log(b.seconds(parameters) / s) for b, s in zip(benches, before, strict=True)]
        return math.exp(sum(logs) / len(logs))

    return best_of(search, cost, deadline)


def write(folder: Path, op: str, chip: str, key: str, parameters: Parameters) -> None:
    """Put one entry into <folder>/<op>/tuned.json beside what is there."""
    file = folder / op / "tuned.json"
    table = json.loads(file.read_text()) if file.is_file() else {}
    table.setdefault(chip, {})[key] = parameters
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def by_key(works: Sequence[Work], target: Target) -> dict[str, list[Work]]:
    found: dict[str, list[Work]] = {}
    for work in works:
        key = key_of(work, target)
        if key is None:
            print(f"{work.op} {work.name}: the kernel does not serve it", flush=True)
        elif len(found.setdefault(key, [])) < CASES_A_KEY:
            found[key].append(work)
    return found


def tune(groups: dict[str, list[Work]], target: Target, rates: Rates, deadline: float, folder: Path) -> list[str]:
    """Searches each key and writes what is worth it; the keys that the budget left out."""
    for index, (key, works) in enumerate(groups.items()):
        if time.monotonic() > deadline:
            return list(groups)[index:]
        print(f"{works[0].op} {key} ({', '.join(work.name for work in works)})", flush=True)
        try:
            found = tune_key(works, target, rates, deadline)
        except FAULTS as reason:  # the inputs or the reference do not fit
            print(f"    {short(reason)}", flush=True)
            continue
        if found is not None:
            print(f"    {found[0]}: {found[1]:.3f} of the computed choice's time", flush=True)
            if found[1] < WORTH:
                write(folder, works[0].op, target.chip, key, found[0])
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=1800)
    parser.add_argument("--only", nargs="+", choices=OPS, default=OPS, help="ops")
    parser.add_argument("--cases", nargs="+", default=(), help="words of names; none takes all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder that holds <op>/tuned.json")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + args.budget_s
    target = target_here()
    if target.facts is None:
        parser.error(f"no kernel knows the device here, {target.platform} {target.chip!r}")
    rates = measure_rates(small=False)
    left_out = []
    for op in args.only:
        works = all_work(op, target, small=False, words=args.cases)
        left_out += [f"{op} {key}" for key in tune(by_key(works, target), target, rates, deadline, args.out)]
    if left_out:
        print(f"left out, the budget of {args.budget_s:g} s is spent: {'; '.join(left_out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
