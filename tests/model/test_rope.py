"""Frequencies of every rope type equal those of transformers, bit for bit; wrong fields are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ModelError
from engine.model.rope import Context, make_rope

ROWS = json.loads((Path(__file__).parent.parent / "fixtures" / "rope.json").read_text())
CONTEXT = Context(4096, 4096)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['parameters']['rope_type']}-{row['max_model_len']}")
def test_equal_to_transformers(row: dict) -> None:
    rope = make_rope(row["parameters"], 64, Context(131072, row["max_model_len"]))
    np.testing.assert_allclose(rope.inv_freq, row["inv_freq"], rtol=2e-7)
    assert rope.scale == pytest.approx(row["scale"], rel=1e-12)


def test_longrope_switches_only_beyond_the_original_length() -> None:
    fields = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096,
              "short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}  # fmt: skip
    at, beyond = (make_rope(fields, 4, Context(8192, length)) for length in (4096, 4097))
    assert at.inv_freq[0] == 1.0
    assert beyond.inv_freq[0] == 0.5
    assert at.scale == beyond.scale > 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "dynamic"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "factor"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}, "factor"),
        ({"rope_type": "linear", "rope_theta": float("nan"), "factor": 2.0}, "rope_theta"),
        ({"rope_type": "default", "rope_theta": "1e4"}, "rope_theta"),
        ({"rope_type": "default", "rope_theta": 1.0}, "rope_theta"),
        ({"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}, "mrope_section"),
        ({"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}, "factor"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3}, "partial_rotary_factor"),
        ({"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]}, "short_factor"),
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}, "high_"),
    ],
)
def test_wrong_fields_are_named(fields: dict, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        make_rope(fields, 64, CONTEXT)
