"""Where the time of a step goes: `octavo bench steps`.

Decode steps of so many sequences are run by hand, one after the other as the engine's thread runs them, and each phase
of the loop is timed: plan, build, dispatch, wait (for the device), commit, detokenize, emit. Medians over steps, in
microseconds, and the host's part divided by the sequences. `device` is the time from when a step could start to its
result. Beside it stands what the roofline allows (`engine/estimate`), with the share of the memory's bandwidth (MBU)
and of the products' rate (MFU) that were used; the peaks are those of configs/chips.yaml, of a CPU a copy and a product
measured in the same run.

With `--fake-step-ms` the device is `benchmarks.fake_device`: what is left is the host, and how long the device waited
for it. `python_ns` is one turn of an empty loop of this interpreter on this machine at that moment: the host's times
scale with it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.fake_device import FakeDevice, fake_engine
from benchmarks.roofline import Machine
from engine.config import EngineOptions
from engine.device import device_facts
from engine.estimate.chips import Topology, topology_of
from engine.estimate.roofline import Bound, decode_bound
from engine.load import tokenizer_of
from engine.loop import Engine
from engine.phases import PHASES, Span
from engine.request import Request, SamplingParams
from engine.runner import Runner
from engine.start import load_any_engine, model_path
from engine.text import Tokenizer

WARM_STEPS = 5
WAITING_TOKENS = 128
HOST = tuple(phase for phase in PHASES if phase != "wait")


@dataclass(frozen=True)
class Load:
    """Equal sequences that decode at once, and those that wait behind them."""

    batch: int
    context: int  # tokens of each prompt
    waiting: int = 0


@dataclass(frozen=True)
class Timed:
    """Medians of decode steps under a load."""

    load: Load
    tokens: int  # that a step draws for each sequence
    phases_us: dict[str, float]
    device_us: float
    idle_us: float | None  # that a fake device waited for the host, a step
    python_ns: float
    spans: list[Span]

    @property
    def host_us(self) -> float:
        return sum(self.phases_us[phase] for phase in HOST)

    @property
    def host_us_per_sequence(self) -> float:
        return self.host_us / self.load.batch


def measure(engine: Engine, load: Load, steps: int, device: FakeDevice | None = None) -> Timed:
    """Decode steps of an engine whose thread is not started; it is idle before and after."""
    submit(engine, load, output_tokens(load, steps, engine.config.decode_steps))
    while engine.scheduler.prompts or len(engine.scheduler.running) < load.batch:
        engine.run_once_overlapped()
    for _ in range(WARM_STEPS):
        engine.run_once_overlapped()
    phases, started_s = engine.counters.phases, dict(engine.counters.step_s)
    idle_s = 0.0 if device is None else device.idle_s
    phases.spans = spans = []
    for _ in range(steps):
        engine.run_once_overlapped()
    phases.spans = None
    if len(engine.scheduler.running) != load.batch:
        raise RuntimeError(f"{len(engine.scheduler.running)} sequences run, not {load.batch}")
    device_s = sum(engine.counters.step_s.values()) - sum(started_s.values())
    found = Timed(
        load,
        engine.config.decode_steps,
        {phase: 1e6 * median(s.end_s - s.start_s for s in spans if s.phase == phase) for phase in PHASES},
        1e6 * device_s / steps,
        None if device is None else 1e6 * (device.idle_s - idle_s) / steps,
        python_ns(),
        spans,
    )
    abandon(engine)
    return found


def output_tokens(load: Load, steps: int, decode_steps: int) -> int:
    """That each sequence may draw: one a step while others' prompts are computed, and then until the last step."""
    return load.batch + decode_steps * (steps + WARM_STEPS + 4)


def submit(engine: Engine, load: Load, output: int) -> None:
    """Prompts that share no page, longer than any end of a text; those that wait are short, or making them is what
    takes the time."""
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    for i in range(load.batch + load.waiting):
        length = load.context if i < load.batch else min(load.context, WAITING_TOKENS)
        ids = (1000 + i % 30_000, *(200 + (7 * i + j) % 3000 for j in range(length - 1)))
        engine.submit(Request(request_id=str(i), prompt_token_ids=ids, params=params), lambda deltas: None)
    engine.read_inbox(block=False)


def abandon(engine: Engine) -> None:
    for request_id in engine.outbox.ids():
        engine.abort(request_id)
    engine.read_inbox(block=False)
    while engine.run_once_overlapped():
        pass


def python_ns(turns: int = 200_000) -> float:
    """CPU time of one turn of a loop that adds, the best of five."""

    def once() -> float:
        start, total = time.thread_time_ns(), 0
        for i in range(turns):
            total += i
        return (time.thread_time_ns() - start) / turns

    return min(once() for _ in range(5))


def chrome_trace(spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    """Complete events of the Trace Event Format, which Perfetto and chrome://tracing show; times in microseconds."""
    for span in spans:
        length = 1e6 * (span.end_s - span.start_s)
        yield {"name": span.phase, "ph": "X", "ts": 1e6 * span.start_s, "dur": length, "pid": 0, "tid": 0}


# -- the command -------------------------------------------------------------------------------


def run_fake(
    options: EngineOptions, loads: Sequence[Load], steps: int, step_s: float, decode_steps: int
) -> list[dict[str, Any]]:
    """The host alone. Texts are made with the model's tokenizer; its weights are not looked at."""
    tokenizer = tokenizer_of(options, model_path(options))
    return [_fake_row(tokenizer, load, steps, step_s, decode_steps) for load in loads]


def _fake_row(tokenizer: Tokenizer, load: Load, steps: int, step_s: float, decode_steps: int) -> dict[str, Any]:
    device = FakeDevice(step_s)
    length = load.context + output_tokens(load, steps, decode_steps)
    engine = fake_engine(
        device,
        tokenizer,
        max_num_seqs=load.batch,
        max_model_len=length,
        max_num_batched_tokens=max(8192, 2 * load.context),
        decode_steps=decode_steps,
        max_queued_requests=load.batch + load.waiting,
    )
    return _row(measure(engine, load, steps, device))


def run_real(options: EngineOptions, loads: Sequence[Load], steps: int, trace: Path | None) -> list[dict[str, Any]]:
    """The model on the device that is there."""
    engine = load_any_engine(options)
    if not isinstance(engine, Engine) or not isinstance(engine.runner, Runner):
        raise RuntimeError("steps are those of a model that generates, in one process")
    rows, spans = [], []
    for load in loads:
        timed = measure(engine, load, steps)
        peaks = _peaks(engine)
        context = load.context + timed.tokens * (WARM_STEPS + steps // 2)
        bound = decode_bound(engine.runner.model, engine.config, peaks, load.batch, context).bound
        rows.append(_row(timed) | _roofline(timed, bound))
        spans += timed.spans
    if trace is not None:
        trace.write_text(json.dumps({"traceEvents": list(chrome_trace(spans))}))
    return rows


def _peaks(engine: Engine) -> Topology:
    """Of the devices; a CPU's are measured now."""
    facts = device_facts()
    if facts.platform != "cpu":
        return topology_of(f"{facts.chip}:{facts.count}")
    machine = Machine(engine.config.dtype)
    machine.measure()
    return machine.chip("wall_s")


def _row(timed: Timed) -> dict[str, Any]:
    load = timed.load
    row: dict[str, Any] = {
        "batch": load.batch, "context": load.context, "waiting": load.waiting, "tokens_a_step": timed.tokens,
        **{f"{phase}_us": round(us, 1) for phase, us in timed.phases_us.items()},
        "host_us": round(timed.host_us, 1), "host_us_per_sequence": round(timed.host_us_per_sequence, 2),
        "device_us": round(timed.device_us, 1), "python_ns": round(timed.python_ns, 1),
    }  # fmt: skip
    return row if timed.idle_us is None else row | {"device_idle_us": round(timed.idle_us, 1)}


def _roofline(timed: Timed, bound: Bound) -> dict[str, Any]:
    """bound: of one token of each sequence."""
    step_s = timed.device_us / 1e6 / timed.tokens
    return {
        "allowed_us": round(1e6 * bound.seconds * timed.tokens, 1), "mbu": round(bound.memory_s / step_s, 3),
        "mfu": round(bound.compute_s / step_s, 3), "binds": bound.binds,
    }  # fmt: skip


def show(rows: Sequence[dict[str, Any]], backend: str, about: dict[str, Any], folder: Path | None) -> None:
    print(report.table([name.removesuffix("_us") for name in rows[0]], [tuple(row.values()) for row in rows]))
    report.finish("steps", backend, {**about, "rows": list(rows), "versions": report.versions("jax", "jaxlib")}, folder)
