"""The shapes of well-known models, without weights: `configs/models/*.json`, each as its maker's config.json has it.

For planning and for compiling ahead of time.
"""

from __future__ import annotations

import difflib
import json
from importlib import resources

from engine.errors import InvalidParam
from engine.model.config import ModelConfig
from engine.model.families import model_config


def known_models() -> list[str]:
    """Their names, sorted."""
    folder = resources.files("configs") / "models"
    return sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json"))


def known_config(name: str, max_model_len: int | None = None) -> ModelConfig:
    """The model of that name; InvalidParam with the nearest name when there is none."""
    names = known_models()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise InvalidParam("model", f"{name!r} has no shapes in configs/models; {hint}")
    text = (resources.files("configs") / "models" / f"{name}.json").read_text("utf-8")
    return model_config(json.loads(text), max_model_len)
