"""The tiny encoders of tests/fixtures/encoders: opened, and what transformers computed of their texts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from engine.model.encoder import encoder_specs
from engine.model.weights.encoder import EncoderCheckpoint, open_encoder
from engine.pooling.request import TextIds

FOLDER = Path(__file__).parent.parent / "fixtures" / "encoders"
NAMES = ("bert", "bert_classifier", "xlm_roberta_classifier")


@dataclass(frozen=True)
class Case:
    """One text, and what transformers computed in float32."""

    text: TextIds
    hidden: np.ndarray  # float32 [tokens, hidden]
    logits: np.ndarray | None  # float32 [labels]


@functools.cache
def cases(name: str) -> list[Case]:
    arrays = np.load(FOLDER / name / "expected.npz")
    count = sum(key.startswith("ids_") for key in arrays)
    return [
        Case(
            TextIds(tuple(arrays[f"ids_{i}"].tolist()), tuple(arrays[f"types_{i}"].tolist())),
            arrays[f"hidden_{i}"],
            arrays.get(f"logits_{i}"),
        )
        for i in range(count)
    ]


@functools.cache
def checkpoint(name: str) -> EncoderCheckpoint:
    return open_encoder(FOLDER / name)


@functools.cache
def params(name: str) -> dict[str, jax.Array]:
    """float32 parameters as the device has them."""
    specs = encoder_specs(checkpoint(name).config, np.dtype(np.float32))
    return checkpoint(name).load(specs, lambda key, array: jax.device_put(array.reshape(specs[key].device_shape)))
