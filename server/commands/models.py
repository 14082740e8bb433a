"""`octavo models`: what the registry knows by name, and whether it is on this machine."""

from __future__ import annotations

import dataclasses
import json

from engine.config import DEFAULT_MODEL, cache_root
from engine.registry import list_models
from server.commands.options import ModelsOptions


def run(options: ModelsOptions) -> int:
    root = cache_root()
    for entry in list_models():
        is_here = entry.is_here(root)
        if options.json:
            print(
                json.dumps(dataclasses.asdict(entry) | {"downloaded": is_here, "default": entry.name == DEFAULT_MODEL})
            )
            continue
        state = "downloaded" if is_here else f"{entry.num_bytes / 1e6:.0f} MB to download"
        star = " (default)" if entry.name == DEFAULT_MODEL else ""
        print(f"{entry.name}{star}: {entry.description.strip()}")
        print(
            f"    {entry.num_parameters / 1e6:.0f}M parameters, {entry.context_tokens} tokens, {entry.license}; {state}"
        )
    return 0
