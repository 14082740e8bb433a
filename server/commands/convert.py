"""`octavo convert`: any model that Octavo reads, as an Orbax checkpoint in Octavo's own layout."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from engine.config import EngineOptions, cache_root
from engine.errors import ModelError
from engine.model.params import param_specs
from engine.model.weights import open_checkpoint
from engine.model.weights.orbax import save_orbax
from engine.registry import resolve_model
from engine.text import load_tokenizer
from server.commands.options import ConvertOptions

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


def run(engine_options: EngineOptions, options: ConvertOptions) -> int:
    """Weights go out in the dtype asked for, else in the one they are stored in."""
    target = Path(options.out)
    if target.exists():
        raise ModelError(f"{target} exists already; name a new folder")
    root = cache_root(engine_options.cache_dir)
    path = resolve_model(engine_options.model, cache_dir=root, revision=engine_options.revision)
    checkpoint = open_checkpoint(path, max_model_len=engine_options.max_model_len)
    dtype = checkpoint.dtype if engine_options.dtype == "auto" else engine_options.dtype
    specs = param_specs(checkpoint.config, DTYPES[dtype])
    with tqdm(total=sum(spec.num_bytes for spec in specs.values()), unit="B", unit_scale=True, desc="read") as bar:

        def keep(name: str, array: np.ndarray) -> np.ndarray:
            bar.update(array.nbytes)
            return array

        params = checkpoint.load(specs, keep)
    if not engine_options.skip_tokenizer_init:
        template = Path(engine_options.chat_template) if engine_options.chat_template else None
        source = Path(engine_options.tokenizer) if engine_options.tokenizer else path
        load_tokenizer(source, template).save(target)
    save_orbax(target, checkpoint.config, params, end_token_ids=checkpoint.end_token_ids, source=path)
    print(f"octavo: {target} holds the model in {dtype}; serve it with: octavo serve {target}", file=sys.stderr)
    return 0
