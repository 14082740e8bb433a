"""A judged layout as plain facts (the JSON of `octavo plan`), and facts as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from engine.estimate.compiled import Compiled
from engine.estimate.layouts import Layout
from engine.estimate.links import Collective
from engine.estimate.memory import Holding
from engine.estimate.roofline import Bound

Json = dict[str, Any]


def facts(layout: Layout) -> Json:
    """Numbers in bytes and seconds, of one device."""
    return {
        "name": layout.name,
        "topology": layout.topology.name,
        "sharding": layout.options.sharding,
        "quantization": layout.options.quantization,
        "mesh": {axis.name: axis.size for axis in layout.config.shards.mesh},
        "devices": layout.topology.num_devices,
        "devices_used": max(1, layout.config.shards.num_devices),
        "dtype": layout.config.dtype,
        "kv_cache_dtype": layout.config.kv_cache_dtype,
        "max_model_len": layout.config.max_model_len,
        "max_num_seqs": layout.config.num_groups * layout.config.max_num_seqs,
        "groups": layout.config.num_groups,
        "layers": layout.model.num_layers,
        "fits": layout.fits,
        "memory": _memory(layout.memory, layout.config.max_model_len),
        "changes_that_fit": [{"change": text, **_memory(then, layout.config.max_model_len)}
                             for text, then in layout.changes],
        "programs": layout.programs,
        "collectives_counted": [_collective(call) for call in layout.counted],
        "compiled": [_compiled(step) for step in layout.compiled],
        "not_compiled": layout.problem,
        "prefill": [{"prompt": p.length, "ttft_s": p.ttft_s, **_bound(p.bound)} for p in layout.prefills],
        "decode": [_decode(layout, i) for i in range(len(layout.decodes))],
        "rates": layout.topology.chip.source,
    }  # fmt: skip


def _memory(found: Holding, length: int) -> Json:
    return {
        "usable": found.usable, "weights": found.weights, "slots": found.slots, "states": found.states,
        "temporary": found.temporary, "cache": found.pool, "cache_tokens": found.tokens,
        "sequences_of_max_model_len": found.sequences(length),
        "over": max(0, found.held + found.page * -(-length // found.page_size) - found.usable),
    }  # fmt: skip


def _bound(bound: Bound) -> Json:
    return {
        "compute_s": bound.compute_s, "memory_s": bound.memory_s, "links_s": bound.links_s, "binds": bound.binds,
    }  # fmt: skip


def _decode(layout: Layout, i: int) -> Json:
    decode, price = layout.decodes[i], layout.question.price
    return {
        "batch": decode.batch, "context": decode.context, "tpot_s": decode.tpot_s, **_bound(decode.bound),
        "tokens_per_s": decode.tokens_per_s, "tokens_per_s_chip": decode.tokens_per_s / layout.topology.num_chips,
        "cost_per_million": decode.cost(layout.topology, price) if price else None,
        "has_room": layout.has_room(decode),
    }  # fmt: skip


def _collective(call: Collective) -> Json:
    return {"kind": call.kind, "axes": list(call.axes), "bytes": call.bytes, "count": call.count}


def _compiled(step: Compiled) -> Json:
    return {
        "name": step.name, "seconds": step.seconds, "layers_compiled": step.layers,
        "arguments": step.memory.arguments, "aliased": step.memory.aliased, "outputs": step.memory.outputs,
        "temporary": step.memory.temporary, "code": step.memory.code, "collectives_from": step.source,
        "collectives": [_collective(call) for call in step.collectives.always],
        "collectives_in_branches": [_collective(call) for call in step.collectives.branches],
    }  # fmt: skip


def table(model: str, layouts: Sequence[Json]) -> str:
    """For a terminal."""
    first = layouts[0]
    head = (
        f"{model}: {first['layers']} layers, {first['dtype']}, sequences of at most {first['max_model_len']:,} tokens, "
        f"{first['max_num_seqs']} at once. Sizes are of one device; times are what peak rates allow."
    )
    return "\n".join([head, *(line for layout in layouts for line in _layout(layout))])


def _layout(found: Json) -> Iterator[str]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "one device"
    idle = found["devices"] - found["devices_used"]
    yield ""
    yield (
        f"{found['name']} ({mesh}{f', {idle} of {found["devices"]} devices idle' if idle else ''}): "
        f"{'fits' if found['fits'] else 'DOES NOT FIT'}"
    )
    yield from _memory_lines(found)
    yield from _compiled_lines(found)
    yield from _prefill_lines(found["prefill"])
    yield from _decode_lines(found["decode"])
    if not found["decode"]:
        yield "  times       not estimated: no peak rates are known"


def _memory_lines(found: Json) -> Iterator[str]:
    memory = found["memory"]
    parts = [f"{name} {size(memory[key])}" for name, key in (
        ("weights", "weights"), ("slots", "slots"), ("recurrent states", "states"), ("temporaries", "temporary"),
    ) if memory[key]]  # fmt: skip
    yield f"  memory      {size(memory['usable'])} to use: {', '.join(parts)}, KV cache {size(memory['cache'])}"
    if memory["temporary"] == 0:
        yield "              (temporaries are not counted: nothing was compiled)"
    yield (
        f"  cache       {memory['cache_tokens']:,} tokens, {memory['sequences_of_max_model_len']:,} sequences of "
        f"{found['max_model_len']:,}"
    )
    if found["fits"]:
        return
    yield f"              {size(memory['over'])} too many for one sequence of {found['max_model_len']:,} tokens"
    for change in found["changes_that_fit"][:4]:
        yield f"              would fit with {change['change']}: {change['cache_tokens']:,} tokens of cache"
    if not found["changes_that_fit"]:
        yield "              none of the single changes that were tried would make it fit"


def _compiled_lines(found: Json) -> Iterator[str]:
    yield f"  programs    {found['programs']} in the closed set"
    if found["not_compiled"]:
        yield f"              not compiled: {found['not_compiled']}"
    for step in found["compiled"]:
        how = (
            "all layers"
            if step["layers_compiled"] == found["layers"]
            else f"{step['layers_compiled']} of {found['layers']} layers, the others extrapolated"
        )
        yield (
            f"              {step['name']}: {step['seconds']:.0f} s to compile ({how}); arguments "
            f"{size(step['arguments'])}, temporaries {size(step['temporary'])}, code {size(step['code'])}"
        )
        yield from _call_lines(step["collectives"], found["layers"], f"{step['name']}, {step['collectives_from']}")
    if not found["compiled"]:
        yield from _call_lines(found["collectives_counted"], found["layers"], "largest decode step, counted")


def _call_lines(calls: Sequence[Json], layers: int, where: str) -> Iterator[str]:
    if not calls:
        return
    yield f"  collectives {where}:"
    for call in calls:
        often = f"{call['count']:g} a step"
        if call["count"] >= layers:
            often += f", {call['count'] / layers:.1f} a layer"
        along = " * ".join(call["axes"]) or "one device"
        yield f"              {call['kind']} along {along}, {size(call['bytes'])}: {often}"


def _prefill_lines(rows: Sequence[Json]) -> Iterator[str]:
    for row in rows:
        yield f"  TTFT        {row['ttft_s'] * 1e3:9,.1f} ms  prompt of {row['prompt']:,} ({_resources(row)})"


def _decode_lines(rows: Sequence[Json]) -> Iterator[str]:
    for row in rows:
        cost = f", {row['cost_per_million']:.2f} a million tokens" if row["cost_per_million"] else ""
        room = "" if row["has_room"] else "; the cache has no room for them"
        yield (
            f"  TPOT        {row['tpot_s'] * 1e3:9,.2f} ms  batch of {row['batch']} x {row['context']:,}: "
            f"{row['tokens_per_s']:,.0f} tok/s{cost} ({_resources(row)}){room}"
        )


def _resources(row: Json) -> str:
    times = ", ".join(f"{name} {row[f'{name}_s'] * 1e3:.1f}" for name in ("compute", "memory", "links"))
    return f"{row['binds']} binds: {times}"


def size(number: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f} B"
