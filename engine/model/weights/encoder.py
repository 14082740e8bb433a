"""An encoder's Hugging Face folder: where its parameters come from, and the folder as a checkpoint.

Files, headers and sizes are `hf.py`'s business. Quantized encoders are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ModelError
from engine.json_file import read_json
from engine.model.encoder import encoder_specs
from engine.model.encoder_config import EncoderConfig
from engine.model.families.bert import ENCODERS, encoder_config
from engine.model.weights.checkpoint import Dtype, Put, T
from engine.model.weights.hf import StoredTensor, check_stored, native_dtype, read_tensor, read_tensors
from engine.model.weights.names import Piece, View
from sharding.params import ParamSpec

PREFIXES = ("", "bert.", "roberta.")
# No parameters of ours: buffers, the pooler where nothing reads it, heads of pretraining.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_UNREAD = ("pooler.", "cls.", "lm_head.")


@dataclass(frozen=True)
class EncoderCheckpoint:
    """A checked folder. Its arrays have the shapes of `encoder_specs`."""

    config: EncoderConfig
    source: Path
    dtype: Dtype
    tensors: Mapping[str, StoredTensor]
    prefix: str  # of the encoder's tensor names

    def pieces(self, param: str) -> list[Piece]:
        return [
            Piece(f"{'' if name.startswith('classifier') else self.prefix}{name}", (view,), shape=shape)
            for name, view, shape in _stored(self.config, param)
        ]

    def load(self, specs: Mapping[str, ParamSpec], put: Put[T]) -> dict[str, T]:
        """Every parameter of `specs` as `put(name, array)` returned it, one in flight at a time."""
        out = {}
        for param, spec in specs.items():
            target = np.empty(spec.shape, spec.dtype)
            for piece in self.pieces(param):
                piece.fill(target, read_tensor(self.tensors[piece.name], piece.name))
            out[param] = put(param, target)
        return out


def is_encoder(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an encoder."""
    return hf.get("model_type") in ENCODERS


def open_encoder(folder: Path) -> EncoderCheckpoint:
    """Check a folder's config.json and safetensors headers. Raises ModelError."""
    hf = read_json(folder / "config.json")
    if hf.get("quantization_config"):
        raise ModelError(f"{folder}: config.json: quantization_config is not supported for encoders")
    config, tensors = encoder_config(hf), read_tensors(folder)
    prefix = next((p for p in PREFIXES if f"{p}embeddings.word_embeddings.weight" in tensors), "")
    checkpoint = EncoderCheckpoint(config, folder, native_dtype(tensors.values()), tensors, prefix)
    specs = encoder_specs(config, np.dtype(np.float32))
    used = set()
    for param, spec in specs.items():
        for piece in checkpoint.pieces(param):
            check_stored(folder, tensors, piece, spec)
            used.add(piece.name)
    for name, stored in tensors.items():
        if name not in used and not _ignored(config, name.removeprefix(prefix)):
            raise ModelError(f"{stored.file}: tensor {name} is not a part of a {config.family} model "
                             f"with head {config.head}")  # fmt: skip
    return checkpoint


def _ignored(config: EncoderConfig, name: str) -> bool:
    return name in _BUFFERS or (config.head != "pooler" and name.startswith(_UNREAD))


def _whole(array: np.ndarray) -> np.ndarray:
    return array


def _transposed(array: np.ndarray) -> np.ndarray:  # our [in, out]
    return array.T


def _third(index: int) -> View:
    """Of qkv [embed, 3, heads, head_dim], seen [heads, head_dim, embed], or of its bias."""
    return lambda array: array[index] if array.ndim == 3 else np.moveaxis(array[:, index], 0, -1)


def _out(array: np.ndarray) -> np.ndarray:  # our [heads, head_dim, embed]; stored [embed, heads * head_dim]
    return array.reshape(-1, array.shape[-1]).T


Stored = tuple[str, View, tuple[int, ...]]  # name, the view of our array that it fills, its shape


def _stored(config: EncoderConfig, param: str) -> list[Stored]:
    """The stored tensors of `param`, names without the prefix."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    tables = {
        "embed": ("embeddings.word_embeddings.weight", config.vocab_size),
        "positions": ("embeddings.position_embeddings.weight", config.num_positions),
        "types": ("embeddings.token_type_embeddings.weight", config.num_types),
    }
    if param in tables:
        name, rows = tables[param]
        return [(name, _whole, (rows, hidden))]
    layer, _, name = param.removeprefix("layers.").rpartition(".")
    stem = f"encoder.layer.{layer}."
    name, is_bias = name.removesuffix("_bias"), name.endswith("_bias")
    end = "bias" if is_bias else "weight"
    norms = {
        "embed_norm": "embeddings.LayerNorm",
        "attn_norm": f"{stem}attention.output.LayerNorm",
        "mlp_norm": f"{stem}output.LayerNorm",
    }
    if name in norms:
        return [(f"{norms[name]}.{end}", _whole, (hidden,))]
    if name == "qkv":
        shape = (hidden,) if is_bias else (hidden, hidden)
        return [
            (f"{stem}attention.self.{part}.{end}", _third(i), shape) for i, part in enumerate(("query", "key", "value"))
        ]
    pooler = config.head == "pooler"
    matrices = {
        "o": (f"{stem}attention.output.dense", _out, (hidden, hidden)),
        "up": (f"{stem}intermediate.dense", _transposed, (mlp, hidden)),
        "down": (f"{stem}output.dense", _transposed, (hidden, mlp)),
        "head_dense": ("pooler.dense" if pooler else "classifier.dense", _transposed, (hidden, hidden)),
        "head_out": ("classifier" if pooler else "classifier.out_proj", _transposed, (config.num_labels, hidden)),
    }
    stored, view, shape = matrices[name]
    return [(f"{stored}.{end}", _whole if is_bias else view, shape[:1] if is_bias else shape)]
