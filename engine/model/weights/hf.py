"""A Hugging Face folder as a `Checkpoint`: config.json, safetensors (one file or shards).

Headers are checked against file sizes and the config before any weight is read. Knows no
devices and executes nothing that a folder contains; pickled weights are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from engine.errors import ModelError
from engine.json_file import read_json
from engine.model.config import ModelConfig
from engine.model.families import model_config
from engine.model.packing import Packing
from engine.model.params import param_specs
from engine.model.weights.checkpoint import NO_PACKINGS, Dtype, Put, StoredWeight, T
from engine.model.weights.hf_packed import ENDINGS, Scheme
from engine.model.weights.names import HEADS, PREFIXES, Piece, end_names, ignored, pieces
from engine.model.weights.packed import QuantizedTensor, empty, fill, stored_weight
from engine.model.weights.schemes import scheme_of
from pallas_kernels.quantized import Quantized
from sharding.params import ParamSpec

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Stored dtypes that hold weights; float16 is served as bfloat16 unless float32 is asked for.
DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
# Read by hand: safetensors has no numpy type for them.
FLOAT8: dict[str, Any] = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
              "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file's header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0  # byte of the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class HfCheckpoint:
    """A checked folder; see `Checkpoint`."""

    config: ModelConfig
    source: Path
    dtype: Dtype
    end_token_ids: tuple[int, ...]
    tensors: Mapping[str, StoredTensor]
    prefix: str  # of the decoder's tensor names
    scheme: Scheme | None = None  # of a quantized folder

    def pieces(self, param: str) -> list[Piece]:
        head = next((name for name in HEADS if name in self.tensors), HEADS[0])
        return list(pieces(self.config, param, self.prefix, head, by_rows=self._merged))

    def stored(self, specs: Mapping[str, ParamSpec]) -> dict[str, StoredWeight]:
        found = {
            param: stored_weight(spec, [self._quantized(piece, spec) for piece in self.pieces(param)])
            for param, spec in specs.items()
        }
        return {param: weight for param, weight in found.items() if weight is not None}

    def _quantized(self, piece: Piece, spec: ParamSpec) -> QuantizedTensor | None:
        names = self.scheme_tensors(piece, spec)
        if names is None or self.scheme is None:
            return None
        with self._naming(piece):
            kind, packing, note = self.scheme.packing(*self._at(piece, spec))
        return QuantizedTensor(kind, sum(self.tensors[name].num_bytes for name in names), packing, note)

    def scheme_tensors(
        self, piece: Piece, spec: ParamSpec
    ) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]] | None:
        """name -> (allowed dtypes, shape) of the tensors that stand for `piece`; None: it is not quantized."""
        if self.scheme is None or not piece.name.endswith(".weight"):
            return None
        *lead, k = piece.stored_shape(_shape_only(spec))
        if not lead:
            return None
        stem, rows = piece.name.removesuffix(".weight"), math.prod(lead)
        found = self.scheme.tensors(stem, rows, k, self._dtypes(stem))
        if found is None:
            return None
        return {  # experts in one tensor keep their dimension in all of its parts
            self._part(stem, name): (dtypes, (*lead, *shape[1:]) if len(lead) > 1 else shape)
            for name, (dtypes, shape) in found.items()
        }

    def _at(self, piece: Piece, spec: ParamSpec) -> tuple[str, int, dict[str, str], Callable[[str], np.ndarray]]:
        """stem, numbers a row, dtypes and reader of a quantized weight."""
        stem = piece.name.removesuffix(".weight")
        k = piece.stored_shape(_shape_only(spec))[-1]
        return stem, k, self._dtypes(stem), lambda name: self._read(self._part(stem, name))

    def _dtypes(self, stem: str) -> dict[str, str]:
        names = {name: self.tensors.get(self._part(stem, name)) for name in ENDINGS}
        return {name: tensor.dtype for name, tensor in names.items() if tensor is not None}

    @property
    def _merged(self) -> bool:
        return self.scheme is not None and self.scheme.merged

    def _part(self, stem: str, name: str) -> str:
        """The whole name of one of the tensors that stand for a quantized weight."""
        return f"{stem}{'_' if self._merged else '.'}{name}"

    @contextmanager
    def _naming(self, piece: Piece) -> Iterator[None]:
        """Errors of a scheme name the folder and the weight."""
        try:
            yield
        except ModelError as error:
            raise ModelError(f"{self.source}: {piece.name}: {error}") from error

    def load(
        self, specs: Mapping[str, ParamSpec], put: Put[T], packings: Mapping[str, Packing] = NO_PACKINGS
    ) -> dict[str, T]:
        out = {}
        for param, spec in specs.items():
            packing = packings.get(param)
            target = np.empty(spec.shape, spec.dtype) if packing is None else empty(spec, packing)
            for piece in self.pieces(param):
                self._fill(target, piece, spec, packing)
            out[param] = put(param, target)
        return out

    def _fill(self, target: np.ndarray | Quantized, piece: Piece, spec: ParamSpec, packing: Packing | None) -> None:
        rows = None
        if self.scheme is not None and self.scheme_tensors(piece, spec) is not None:
            with self._naming(piece):
                rows = self.scheme.read(*self._at(piece, spec))
        if isinstance(target, Quantized):
            if rows is None or packing is None:
                raise ModelError(f"{self.source}: {piece.name} is not quantized and cannot stay packed")
            fill(target, piece, rows, packing)
        else:
            piece.fill(target, self._read(piece.name) if rows is None else rows.float32())

    def _read(self, name: str) -> np.ndarray:
        return read_tensor(self.tensors[name], name)


def read_tensor(tensor: StoredTensor, name: str) -> np.ndarray:
    """The tensor as it is stored. Raises ModelError that names its file."""
    file = tensor.file
    try:
        if tensor.dtype in FLOAT8:
            with file.open("rb") as raw:
                raw.seek(tensor.start)
                found = np.frombuffer(raw.read(tensor.num_bytes), FLOAT8[tensor.dtype])
            return found.reshape(tensor.shape)
        # Opened for each tensor: closing unmaps the file, so pages read stay out of the peak RSS.
        with safe_open(file, framework="numpy") as opened:
            return opened.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot read tensor {name}: {error}") from error


def open_hf(folder: Path, max_model_len: int | None = None, with_head: bool = True) -> HfCheckpoint:
    """Check a folder's config.json and safetensors headers. Raises ModelError.

    with_head: False reads a model whose files may have no LM head, as those of embeddings; a stored one is passed by.
    """
    hf = read_json(folder / "config.json")
    if with_head:
        config = model_config(hf, max_model_len)
    else:
        config = replace(model_config(hf | {"architectures": None}, max_model_len), tie_embeddings=True)
    tensors = read_tensors(folder)
    embedding, _ = end_names(config)
    prefix = next((p for p in PREFIXES if f"{p}{embedding}" in tensors), PREFIXES[0])
    dtype = native_dtype(tensors.values())
    checkpoint = HfCheckpoint(config, folder, dtype, _end_token_ids(folder, hf), tensors, prefix, scheme_of(hf))
    _check_tensors(checkpoint)
    return checkpoint


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The headers of a folder's safetensors, one file or shards. Raises ModelError."""
    tensors: dict[str, StoredTensor] = {}
    for file, names in _files(folder).items():
        header = read_header(file)
        missing = [name for name in names if name not in header]
        if missing:
            raise ModelError(f"{file}: tensor {missing[0]} is missing, though {INDEX} says that it is here")
        tensors.update(header)
    return tensors


def _files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files to read, each with the tensors that the index promises in it."""
    index = folder / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise ModelError(f"{index}: weight_map must map tensor names to file names")
        files: dict[Path, list[str]] = {}
        for tensor, name in weight_map.items():
            if Path(name).name != name:
                raise ModelError(f"{index}: {name!r} is not the name of a file in this folder")
            files.setdefault(folder / name, []).append(tensor)
        for file in files:
            if not file.exists():
                raise ModelError(f"{index}: shard {file.name} is missing from {folder}")
        return files
    single = sorted(folder.glob("*.safetensors"))
    if len(single) == 1:
        return {single[0]: []}
    if single:
        raise ModelError(f"{folder}: {len(single)} safetensors files and no {INDEX} that says which belong together")
    pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern))
    if pickled:
        raise ModelError(f"{folder}: {pickled[0]} is a pickle, which can execute code when read; "
                         "convert the weights to safetensors first")  # fmt: skip
    raise ModelError(f"{folder}: no *.safetensors and no {INDEX}")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, with every size checked against the file's length."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(f"{file}: not a safetensors file: header of {length} bytes in a file of {size}")
        raw = opened.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file}: the safetensors header is not a JSON object")
    tensors, spans = {}, []
    for name, entry in header.items():
        if name != "__metadata__":
            tensor, span = _tensor_entry(file, name, entry, size - 8 - length)
            tensors[name] = replace(tensor, start=8 + length + span[0])
            spans.append((*span, name))
    _check_spans(file, spans, size - 8 - length)
    return tensors


def _tensor_entry(file: Path, name: str, entry: Any, data_bytes: int) -> tuple[StoredTensor, tuple[int, int]]:
    def natural(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ModelError(f"{file}: tensor {name} has unknown dtype {dtype!r}")
    if not natural(shape) or not natural(offsets) or len(offsets) != 2:
        raise ModelError(f"{file}: tensor {name} has shape {shape!r} and data_offsets {offsets!r}")
    tensor, (begin, end) = StoredTensor(file, dtype, tuple(shape)), offsets
    if end > data_bytes:
        raise ModelError(f"{file}: truncated: tensor {name} ends at byte {end} of {data_bytes} bytes of data")
    if end - begin != tensor.num_bytes:
        raise ModelError(f"{file}: tensor {name}: {dtype} {shape} takes {tensor.num_bytes} bytes, "
                         f"but its data_offsets hold {end - begin}")  # fmt: skip
    return tensor, (begin, end)


def _check_spans(file: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Tensors must lie one after the other: no gap, no overlap, nothing after the last."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ModelError(f"{file}: tensor {name} starts at byte {begin} of the data, expected {position}")
        position = end
    if position != data_bytes:
        raise ModelError(f"{file}: {data_bytes} bytes of data, but the tensors end at {position}")


def _check_tensors(checkpoint: HfCheckpoint) -> None:
    """Every parameter has its tensors in the right shape, and nothing is left over."""
    where, tensors, used = checkpoint.source, checkpoint.tensors, set()
    for param, spec in param_specs(checkpoint.config, np.dtype(np.float32)).items():
        for piece in checkpoint.pieces(param):
            quantized = checkpoint.scheme_tensors(piece, spec)
            if quantized is not None:
                _check_quantized(checkpoint, quantized)
                used.update(quantized)
                continue
            check_stored(where, tensors, piece, spec)
            used.add(piece.name)
    for name, stored in tensors.items():
        if name not in used and not ignored(checkpoint.config, name):
            raise ModelError(f"{stored.file}: tensor {name} is not a part of a {checkpoint.config.family} model "
                             "with this config")  # fmt: skip


def check_stored(where: Path, tensors: Mapping[str, StoredTensor], piece: Piece, spec: ParamSpec) -> None:
    """The tensor of `piece` is there, in the shape that `spec` needs and in a dtype of weights."""
    stored = tensors.get(piece.name)
    if stored is None:
        raise ModelError(f"{where}: tensor {piece.name} is missing")
    expected = piece.stored_shape(_shape_only(spec))
    if stored.shape != expected:
        raise ModelError(f"{stored.file}: tensor {piece.name} has shape {list(stored.shape)}, "
                         f"the config needs {list(expected)}")  # fmt: skip
    if stored.dtype not in DTYPES:
        raise ModelError(f"{stored.file}: tensor {piece.name} has dtype {stored.dtype}; "
                         f"supported: {', '.join(DTYPES)}")  # fmt: skip


def _check_quantized(checkpoint: HfCheckpoint, wanted: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]) -> None:
    for name, (dtypes, shape) in wanted.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            raise ModelError(f"{checkpoint.source}: tensor {name} is missing")
        if stored.shape != shape:
            raise ModelError(f"{stored.file}: tensor {name} has shape {list(stored.shape)}, the config and its "
                             f"quantization_config need {list(shape)}")  # fmt: skip
        if stored.dtype not in dtypes:
            raise ModelError(f"{stored.file}: tensor {name} has dtype {stored.dtype}; supported: {', '.join(dtypes)}")


def _shape_only(spec: ParamSpec) -> np.ndarray:
    """An array of the spec's shape that takes no memory: one element, repeated."""
    try:
        return np.broadcast_to(np.float32(0), spec.shape)
    except ValueError as error:  # more elements than an address space holds
        raise ModelError(f"config.json: a weight of shape {spec.shape} is impossible") from error


def native_dtype(tensors: Iterable[StoredTensor]) -> Dtype:
    """float32 if most bytes are; else bfloat16."""
    tensors = list(tensors)
    wide = sum(t.num_bytes for t in tensors if t.dtype == "F32")
    return "float32" if 2 * wide > sum(t.num_bytes for t in tensors) else "bfloat16"


def _end_token_ids(folder: Path, hf: Mapping[str, Any]) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, else of config.json (or its text_config)."""
    generation = folder / "generation_config.json"
    sources = [(generation, read_json(generation))] if generation.exists() else []
    sources += [(folder / "config.json", hf), (folder / "config.json", hf.get("text_config") or {})]
    for file, config in sources:
        value = config.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ModelError(f"{file}: eos_token_id must be a token id or a list of them, got {value!r}")
        return tuple(ids)
    return ()
