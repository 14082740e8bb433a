"""What every opened checkpoint offers, whatever its file format.

Knows nothing about formats (`hf.py`, `gguf.py`, `orbax.py`) or devices: `put` decides where arrays go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from engine.model.config import ModelConfig
from engine.model.packing import Packing
from sharding.params import ParamSpec

Dtype = Literal["bfloat16", "float32"]
T = TypeVar("T")
Put = Callable[[str, Any], T]  # of a parameter's name and its numpy array, or `Quantized` of them
NO_PACKINGS: Mapping[str, Packing] = {}


@dataclass(frozen=True)
class StoredWeight:
    """A parameter that the files hold quantized."""

    kind: str  # as its format calls it: "Q4_K", "gptq int4"
    num_bytes: int  # in the files
    packing: Packing | None  # how `Quantized` holds it without loss
    reason: str = ""  # why it cannot, or what is not as the format has it


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

    def stored(self, specs: Mapping[str, ParamSpec]) -> dict[str, StoredWeight]:
        """Those parameters of `specs` that the files hold quantized. Reads no weights."""
        ...

    def load(
        self, specs: Mapping[str, ParamSpec], put: Put[T], packings: Mapping[str, Packing] = NO_PACKINGS
    ) -> dict[str, T]:
        """Every parameter of `specs`, in its order, as `put(name, array)` returned it.

        Each array has its spec's shape and dtype. A parameter of `packings`, which must be as
        `stored` says, is a `Quantized` of numpy arrays [lead, rows, columns] instead, where lead and
        columns are the spec's dimensions. One parameter is in flight at a time, so that the host
        never holds a second copy of the weights. Raises ModelError.
        """
        ...
