"""What Qwen's dense families and those with experts share."""

from __future__ import annotations

from engine.model.config import LayerSpec
from engine.model.families.common import LAYER_TYPES, layer_count, windows_of
from engine.model.families.keys import Keys


def qwen_layers(keys: Keys, head_dim: int) -> tuple[LayerSpec, ...]:
    """Full attention, with a window from layer max_window_layers on if use_sliding_window."""
    num_layers, sliding = layer_count(keys), keys.flag("use_sliding_window")
    first = keys.value("max_window_layers")
    window = keys.value("sliding_window")
    kinds = keys.per_layer("layer_types", num_layers, LAYER_TYPES)
    if kinds and not sliding and "sliding_attention" in kinds:
        raise keys.wrong("use_sliding_window", "contradicts layer_types, which names sliding_attention")
    if kinds is None and sliding and window is not None:
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise keys.wrong("max_window_layers", "must be an integer >= 0")
        kinds = [LAYER_TYPES[i >= first] for i in range(num_layers)]
    windows = windows_of(keys, kinds or ["full_attention"] * num_layers)
    rope = keys.rope(head_dim)
    return tuple(LayerSpec(rope, window) for window in windows)
