"""What every opened checkpoint offers, whatever its file format.

Knows nothing about formats (`hf.py`, `gguf.py`, `orbax.py`) or devices: `put` decides where arrays go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np

from engine.model.config import ModelConfig
from sharding.params import ParamSpec

Dtype = Literal["bfloat16", "float32"]
T = TypeVar("T")


class Checkpoint(Protocol):
    """Checked metadata of a model's files, and its weights on demand.

    `dtype` is what the weights are stored in, as far as the engine can compute in it: float16
    counts as bfloat16 (same size; ask for float32 to keep every bit). `end_token_ids` end a turn.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def source(self) -> Path: ...

    @property
    def dtype(self) -> Dtype: ...

    @property
    def end_token_ids(self) -> tuple[int, ...]: ...

    def load(self, specs: Mapping[str, ParamSpec], put: Callable[[str, np.ndarray], T]) -> dict[str, T]:
        """Every parameter of `specs`, in its order, as `put(name, array)` returned it.

        Each array has its spec's shape and dtype. One parameter is in flight at a time, so that
        the host never holds a second copy of the weights. Raises ModelError.
        """
        ...
