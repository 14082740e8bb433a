"""`octavo sharding explain`: how a model would be cut over devices that need not be there, parameter by parameter."""

from __future__ import annotations

import json

from engine.config import EngineOptions
from engine.explain import device_of, explain, model_of, planned_config
from server.commands.options import ShardingOptions


def run(engine_options: EngineOptions, options: ShardingOptions) -> int:
    model, device = model_of(engine_options), device_of(options.chip, options.devices)
    config = planned_config(engine_options, model, device)
    found = explain(model, config, device)
    if options.json:
        print(json.dumps(found))
        return 0
    mesh = " x ".join(f"{axis.name}={axis.size}" for axis in config.shards.mesh) or "one device"
    print(f"{engine_options.model} over {mesh} ({options.chip}), {config.dtype}; sizes are of one device\n")
    width = max(len(row["name"]) for row in found["parameters"])
    for row in found["parameters"]:
        why = f"  by {row['override']}" if row["override"] else ""
        print(f"{row['name']:{width}}  {row['shape']:>22}  {row['cut']:>22}  {row['bytes'] / 1e6:12,.1f} MB{why}")
    print(f"\nweights, slots and states {found['held_bytes'] / 1e9:,.2f} GB of {found['usable_bytes'] / 1e9:,.2f} GB; "
          f"a token of the cache {found['token_bytes']:,} bytes")  # fmt: skip
    left = found["usable_bytes"] - found["held_bytes"]
    if left <= 0:
        print(f"does not fit: {-left / 1e9:,.2f} GB too many")
    elif found["token_bytes"]:
        print(f"room for {left // found['token_bytes']:,} tokens, less what a step's temporaries take")
    return 0
