"""`octavo plan`: what layouts of a model hold, allow and cost, on chips that need not be there."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.config import EngineOptions
from engine.errors import InvalidParam
from engine.estimate.chips import Topology, topology_of
from engine.estimate.compiled import How, stay_on_cpu
from engine.estimate.layouts import Layout, Question, compiled, judged, searched
from engine.explain import model_of
from engine.resolve import GIB
from server.commands.options import PlanOptions
from server.plan_page import page
from server.plan_text import facts, table


def run(engine_options: EngineOptions, options: PlanOptions) -> int:
    topologies = [_topology(text, options) for text in options.topology]
    stay_on_cpu(max((t.num_devices for t in topologies if t.chip.platform == "cpu"), default=1))
    layouts = _searched(engine_options, options, topologies) if options.search else _asked(
        engine_options, options, topologies
    )  # fmt: skip
    found = [facts(layout) for layout in layouts]
    if options.html:
        Path(options.html).write_text(page(engine_options.model, found), encoding="utf-8")
    print(json.dumps({"model": engine_options.model, "layouts": found}) if options.json
          else table(engine_options.model, found))  # fmt: skip
    return 0 if any(layout.fits for layout in layouts) else 1


def _topology(text: str, options: PlanOptions) -> Topology:
    topology = topology_of(text)
    if options.memory_gib is None or topology.chip.platform != "cpu":
        return topology
    return replace(topology, chip=replace(topology.chip, memory_bytes=options.memory_gib * GIB))


def _question(options: PlanOptions) -> Question:
    return Question(options.prompt, options.batch, options.context, options.price)


def _asked(engine_options: EngineOptions, options: PlanOptions, topologies: Sequence[Topology]) -> list[Layout]:
    """Each topology under each sharding file."""
    model, found = model_of(engine_options), []
    for topology in topologies:
        for sharding in _shardings(engine_options):
            changed = replace(engine_options, sharding=sharding)
            found.append(_told(judged(changed, model, topology, _question(options)), options))
    return found


def _searched(engine_options: EngineOptions, options: PlanOptions, topologies: Sequence[Topology]) -> list[Layout]:
    """The best, compiled, and behind them the others by the count alone."""
    model, named = model_of(engine_options), _shardings(engine_options)
    found = searched(
        engine_options,
        model,
        topologies,
        _question(options),
        () if named == ["single"] else named,
        tuple(dict.fromkeys((engine_options.quantization, *options.try_quantization))),
        options.goal,
    )
    if not found:
        raise InvalidParam("topology", "no layout divides and fits; name one with --sharding to see its sizes")
    return [_told(layout, options) if i < options.best else layout for i, layout in enumerate(found)]


def _shardings(engine_options: EngineOptions) -> list[str]:
    """--sharding tp,ep names two."""
    return [name for name in engine_options.sharding.split(",") if name]


def _told(layout: Layout, options: PlanOptions) -> Layout:
    if not options.compile:
        return layout
    print(f"octavo: compiling {layout.name}", file=sys.stderr)
    return compiled(layout, How(options.effort, options.full))
