"""What a pooling model was made for, and the concrete configuration it is served with. Imports no JAX.

The files of sentence-transformers (modules.json, 1_Pooling/config.json) say how tokens become one
vector; options win over them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import InvalidParam, ModelError
from engine.json_file import read_json, read_json_array
from engine.model.packing import Quantization
from pallas_kernels.target import Target

PoolingKind = Literal["cls", "mean", "last"]
Task = Literal["embed", "score"]
MODULES = "modules.json"

# Keys of 1_Pooling/config.json, in its spelling of one flag a kind.
_KIND_OF_FLAG: dict[str, PoolingKind] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_KIND_OF_MODE: dict[str, PoolingKind] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_OTHER_FLAGS = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")


@dataclass(frozen=True)
class Pooling:
    """How the hidden states of a text become its embedding, as a model's files say it. None: they do not."""

    kind: PoolingKind | None = None
    normalize: bool | None = None  # to length one
    max_tokens: int | None = None  # of the texts that it was trained on
    prompt: str | None = None  # what the authors put in front of every text


@dataclass(frozen=True)
class Matryoshka:
    """Whether embeddings may be cut (arXiv 2205.13147), and the lengths that were trained; empty: any."""

    possible: bool = False
    dimensions: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """Concrete configuration: every number that shapes a program or bounds a queue."""

    task: Task
    dtype: Literal["bfloat16", "float32"]
    pooling: PoolingKind
    normalize: bool
    matryoshka: Matryoshka
    score: Literal["sigmoid", "identity"]  # of a cross-encoder's logit
    hidden_size: int  # numbers of an embedding
    max_model_len: int  # tokens of the longest text
    max_num_seqs: int  # texts a step
    max_num_batched_tokens: int  # a step; a longer text has a step of its own
    length_buckets: tuple[int, ...]  # tokens of a step's longest text, ascending
    token_buckets: tuple[int, ...]  # tokens a step, ascending
    quantization: Quantization | None
    target: Target
    overlap: bool
    max_queued_requests: int  # texts

    def summary(self) -> str:
        """Every field, on one line."""
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in dataclasses.fields(self))

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raises InvalidParam for a length that this model's embeddings do not have."""
        if dimensions is None or dimensions == self.hidden_size:
            return
        if not self.matryoshka.possible:
            raise InvalidParam("dimensions", f"this model's embeddings have {self.hidden_size} numbers; it was not "
                               "trained to be cut (or says so nowhere: see the option is_matryoshka)")  # fmt: skip
        allowed = self.matryoshka.dimensions
        if allowed and dimensions not in allowed:
            raise InvalidParam("dimensions", f"must be one of {', '.join(map(str, allowed))}, got {dimensions}")
        if not 0 < dimensions <= self.hidden_size:
            raise InvalidParam("dimensions", f"must be between 1 and {self.hidden_size}, got {dimensions}")


def read_pooling(folder: Path) -> Pooling:
    """What sentence-transformers' files in `folder` say. Raises ModelError that names file and field."""
    modules = folder / MODULES
    if not modules.is_file():
        return Pooling()
    kinds = [_module(entry, modules) for entry in read_json_array(modules)]
    names = [kind for kind, _ in kinds]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        raise ModelError(f"{modules}: the modules {', '.join(names)} are not supported; known: Transformer, Pooling, "
                         "and perhaps Normalize")  # fmt: skip
    sentence = folder / "sentence_bert_config.json"
    longest = read_json(sentence).get("max_seq_length") if sentence.is_file() else None
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ModelError(f"{sentence}: max_seq_length = {longest!r} must be a positive integer")
    return Pooling(_kind(folder / kinds[1][1] / "config.json"), "Normalize" in names, longest, _prompt(folder))


def _module(entry: Any, where: Path) -> tuple[str, str]:
    """The class and the folder of one module."""
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str) or not isinstance(entry.get("path"), str):
        raise ModelError(f"{where}: a module needs type and path, got {entry!r}")
    if Path(entry["path"]).name != entry["path"]:
        raise ModelError(f"{where}: {entry['path']!r} is not a folder in this one")
    return entry["type"].rsplit(".", 1)[-1], entry["path"]


def _kind(file: Path) -> PoolingKind:
    config = read_json(file)
    mode = config.get("pooling_mode")
    if isinstance(mode, str) and mode in _KIND_OF_MODE:
        return _KIND_OF_MODE[mode]
    wanted = [flag for flag in (*_KIND_OF_FLAG, *_OTHER_FLAGS) if config.get(flag)]
    if mode is not None or len(wanted) != 1 or wanted[0] not in _KIND_OF_FLAG:
        found = ", ".join(wanted) or f"pooling_mode {mode!r}"
        raise ModelError(f"{file}: {found} is not supported; known: one of {', '.join(_KIND_OF_FLAG)}")
    return _KIND_OF_FLAG[wanted[0]]


def _prompt(folder: Path) -> str | None:
    file = folder / "config_sentence_transformers.json"
    config = read_json(file) if file.is_file() else {}
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    return prompts.get(name) if name and isinstance(prompts, Mapping) else None
