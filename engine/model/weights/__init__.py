"""Opening a model's files, whatever their format: a GGUF file, a Hugging Face or an Orbax folder.

`open_checkpoint` looks at the path and chooses; the formats know nothing of each other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.errors import ModelError
from engine.model.config import ModelConfig
from engine.model.params import param_specs
from engine.model.weights.checkpoint import Checkpoint, Dtype
from engine.model.weights.gguf import open_gguf
from engine.model.weights.hf import open_hf
from engine.model.weights.manifest import MANIFEST
from sharding.params import init_array

__all__ = ["Checkpoint", "Dtype", "open_checkpoint", "open_gguf", "open_hf", "random_params"]


def open_checkpoint(path: Path, max_model_len: int | None = None) -> Checkpoint:
    """The checkpoint at `path`, checked, with no weights read yet.

    max_model_len: tokens the engine will serve; None is the model's own limit. Raises ModelError.
    """
    if path.is_file():
        with path.open("rb") as opened:
            magic = opened.read(4)
        if magic == b"GGUF" or path.suffix == ".gguf":
            return open_gguf(path, max_model_len)
        raise ModelError(f"{path}: not a GGUF file; other checkpoints are named by their folder")
    if not path.is_dir():
        raise ModelError(f"{path}: no such file or folder")
    if (path / MANIFEST).exists():
        # Imported here: Orbax costs 0.2 s and 26 MB of start-up, which the other formats need not pay.
        from engine.model.weights.orbax import open_orbax

        return open_orbax(path, max_model_len)
    if (path / "config.json").exists():
        return open_hf(path, max_model_len)
    raise ModelError(f"{path}: no model here; looked for {MANIFEST} (Orbax), config.json with *.safetensors "
                     "(Hugging Face), or name a .gguf file")  # fmt: skip


def random_params(config: ModelConfig, dtype: Dtype, seed: int) -> dict[str, np.ndarray]:
    """Host arrays with random weights for every parameter of `config`, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return {name: init_array(spec, rng) for name, spec in param_specs(config, np.dtype(dtype)).items()}
