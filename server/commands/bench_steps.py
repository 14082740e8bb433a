"""`octavo bench steps`: where the time of a decode step goes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from benchmarks import report, steps
from engine.config import EngineOptions
from engine.device import device_facts
from server.commands.bench import BenchStepsOptions


def run(engine_options: EngineOptions, options: BenchStepsOptions) -> int:
    loads = [steps.Load(*load) for load in itertools.product(options.batch, options.context, options.waiting)]
    folder = report.folder(options.result_dir)
    about = {"model": engine_options.model, "steps": options.steps, "fake_step_ms": options.fake_step_ms}
    decode_steps = engine_options.decode_steps or 1  # calls of one length can be compared
    if options.fake_step_ms is not None:
        rows = steps.run_fake(engine_options, loads, options.steps, options.fake_step_ms / 1e3, decode_steps)
        steps.show(rows, "fake", about, folder)
        return 0
    most = max(options.batch)
    engine_options = replace(
        engine_options,
        max_num_seqs=engine_options.max_num_seqs or most,
        max_queued_requests=max(engine_options.max_queued_requests, most + max(options.waiting)),
        enable_prefix_caching=False,
        decode_steps=decode_steps,
    )
    trace = None if options.trace is None else Path(options.trace)
    rows = steps.run_real(engine_options, loads, options.steps, trace)
    steps.show(rows, device_facts().platform, about, folder)
    return 0
