"""The tiny checkpoints of tests/fixtures/models, opened: configs, float32 parameters, expected values."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engine.model.params import param_specs
from engine.model.weights.hf import HfCheckpoint, open_hf

FOLDER = Path(__file__).parent.parent / "fixtures" / "models"
NAMES = tuple(sorted(path.name for path in FOLDER.iterdir() if path.is_dir()))


@dataclass(frozen=True)
class Expected:
    """One prompt, and what transformers computed in float32."""

    prompt: list[int]
    positions: np.ndarray  # int [rows]: the positions whose logits are kept
    logits: np.ndarray  # float32 [rows, vocab]
    greedy: list[int]  # 64 tokens


@functools.cache
def expected(name: str) -> list[Expected]:
    arrays = np.load(FOLDER / name / "expected.npz")
    num_prompts = sum(key.startswith("prompt_") for key in arrays)
    return [
        Expected(
            arrays[f"prompt_{i}"].tolist(),
            arrays[f"positions_{i}"],
            arrays[f"logits_{i}"],
            arrays[f"greedy_{i}"].tolist(),
        )
        for i in range(num_prompts)
    ]


def max_model_len(name: str) -> int | None:
    arrays = np.load(FOLDER / name / "expected.npz")
    return int(arrays["max_model_len"]) if "max_model_len" in arrays else None


@functools.cache
def checkpoint(name: str) -> HfCheckpoint:
    return open_hf(FOLDER / name, max_model_len(name))


@functools.cache
def params(name: str) -> dict[str, jax.Array]:
    """float32 parameters on the device."""
    specs = param_specs(checkpoint(name).config, np.dtype(np.float32))
    return checkpoint(name).load(specs, lambda _, array: jax.device_put(array))


def hf_config(name: str, file: str = "config.json") -> dict[str, Any]:
    return json.loads((FOLDER / name / file).read_text())


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Norm-wise: |got - want| / |want|, the worst row."""
    return float(np.max(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)))
