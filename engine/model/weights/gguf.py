"""A GGUF file as a `Checkpoint`: names, the order of rotary dimensions, dequantized or repacked weights.

Knows no devices. A tensor is expanded or repacked block by block into its place, so the host holds
one parameter and a few blocks, never a second copy of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType

from engine.model.config import ModelConfig
from engine.model.gguf_file import GgufFile, TensorReader, dequantizer, read_gguf
from engine.model.packing import Packing
from engine.model.params import param_specs
from engine.model.weights.checkpoint import NO_PACKINGS, Dtype, Put, StoredWeight, T
from engine.model.weights.gguf_config import ROPE_FACTORS, ROPE_FREQS, gguf_model_config
from engine.model.weights.gguf_names import gguf_name, gguf_pieces
from engine.model.weights.gguf_packed import PACKINGS, unpacked_rows
from engine.model.weights.names import Piece
from engine.model.weights.packed import QuantizedTensor, blocks, empty, fill, stored_weight
from pallas_kernels.quantized import Quantized
from sharding.params import ParamSpec

NUM_THREADS = 2  # numpy releases the lock while it expands a block
FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F64)

# Architectures whose files keep each head's rotary pairs side by side (0, d/2, 1, d/2 + 1, ...).
INTERLEAVED = frozenset({"llama", "smollm3", "granite", "granitemoe", "granitehybrid"})


@dataclass(frozen=True)
class GgufCheckpoint:
    """A checked file; see `Checkpoint`."""

    config: ModelConfig
    source: Path
    dtype: Dtype
    end_token_ids: tuple[int, ...]
    file: GgufFile

    def stored(self, specs: Mapping[str, ParamSpec]) -> dict[str, StoredWeight]:
        found = {
            param: stored_weight(spec, [self._stored_tensor(piece) for piece in self.pieces(param)])
            for param, spec in specs.items()
        }
        return {param: weight for param, weight in found.items() if weight is not None}

    def _stored_tensor(self, piece: Piece) -> QuantizedTensor | None:
        info = self.file.tensors[piece.name]
        if info.kind in FLOATS:
            return None
        packing = PACKINGS.get(info.kind, "a type that is only dequantized")
        return QuantizedTensor(info.kind.name, info.num_rows * info.row_bytes, packing)

    def load(
        self, specs: Mapping[str, ParamSpec], put: Put[T], packings: Mapping[str, Packing] = NO_PACKINGS
    ) -> dict[str, T]:
        out = {}
        with TensorReader(self.file) as reader, ThreadPoolExecutor(NUM_THREADS) as threads:
            for param, spec in specs.items():
                if param in packings:
                    packed = empty(spec, packings[param])
                    for piece in self.pieces(param):
                        self._fill_packed(reader, threads, piece, packed, packings[param])
                    out[param] = put(param, packed)
                    continue
                array = np.empty(spec.shape, spec.dtype)
                for piece in self.pieces(param):
                    self._fill(reader, threads, piece, array)
                out[param] = put(param, array)
        return out

    def _fill_packed(
        self, reader: TensorReader, threads: Executor, piece: Piece, packed: Quantized, packing: Packing
    ) -> None:
        info, order = self.file.tensors[piece.name], self._row_order(piece.name)
        if piece.select is not None:
            fill(packed, piece, unpacked_rows(reader.raw_rows(piece.name, 0, info.num_rows), info.kind), packing)
            return

        def fill_block(block: tuple[int, list[np.ndarray]]) -> None:
            start, targets = block
            raw = reader.raw_rows(piece.name, start, start + len(targets[0]))
            parts = unpacked_rows(raw if order is None else raw[order], info.kind).leaves(packing)
            for target, part in zip(targets, parts, strict=True):
                target[...] = part

        list(threads.map(fill_block, blocks(piece, jax.tree.leaves(packed))))

    def pieces(self, param: str) -> Iterator[Piece]:
        """The stored tensors of `param`, under their names in the file."""
        for piece in gguf_pieces(self.config, param, self.file.tensors):
            yield replace(piece, name=gguf_name(self.config, piece.name))

    def _fill(self, reader: TensorReader, threads: Executor, piece: Piece, array: np.ndarray) -> None:
        order = self._row_order(piece.name)
        if not _by_rows(piece, array, self.file.tensors[piece.name].num_cols):
            values = reader.tensor(piece.name)
            values = values if order is None else values.reshape(-1, len(order))[:, order].reshape(-1)
            replace(piece, offset=0.0).fill(array, values)  # Gemma's offset is in the file already
            return

        def fill_block(block: tuple[int, list[np.ndarray]]) -> None:
            start, (target,) = block
            rows = reader.rows(piece.name, start, start + len(target))
            _assign(target, rows if order is None else rows[order])

        # A block is one head where rows must be put in order, so that each order is complete in it.
        list(threads.map(fill_block, blocks(piece, [array])))

    def _row_order(self, name: str) -> np.ndarray | None:
        """Which stored row of a head comes first, second, ...: undoes interleaved rotary pairs."""
        interleaved = self.file.metadata["general.architecture"] in INTERLEAVED
        if not interleaved or not name.rsplit(".", 1)[0].endswith(("attn_q", "attn_k")):
            return None
        return np.arange(self.config.head_dim).reshape(-1, 2).T.reshape(-1)


def _by_rows(piece: Piece, array: np.ndarray, columns: int) -> bool:
    """Whether the stored rows are those of the views, so that a matrix can be read block by block."""
    views = [view(array) for view in piece.views]
    return piece.select is None and all(view.ndim > 1 and view.shape[-1] == columns for view in views)


def _assign(target: np.ndarray, values: np.ndarray) -> None:
    if target.dtype == ml_dtypes.bfloat16:  # numpy moves integers much faster than bfloat16
        target.view(np.uint16)[...] = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    else:
        target[...] = values


def open_gguf(path: Path, max_model_len: int | None = None) -> GgufCheckpoint:
    """Check a GGUF file's metadata and tensor table; no weights are read but rope factors.

    `max_model_len` (tokens) picks LongRoPE's factors. Raises ModelError that names file and tensor or key.
    """
    file = read_gguf(path)
    for kind in {tensor.kind for tensor in file.tensors.values()}:
        dequantizer(file, kind)  # refuses types that cannot be expanded, before any weight is read
    with TensorReader(file) as reader:
        config = gguf_model_config(file, reader.tensor, max_model_len)
    checkpoint = GgufCheckpoint(config, path, _native_dtype(file), _end_token_ids(file), file)
    _check_tensors(checkpoint)
    return checkpoint


def _check_tensors(checkpoint: GgufCheckpoint) -> None:
    """Every parameter has its tensors in the right shape, and nothing is left over."""
    file, config = checkpoint.file, checkpoint.config
    used = {ROPE_FREQS, *ROPE_FACTORS.values()}
    for param, spec in param_specs(config, np.dtype(np.float32)).items():
        shape_only = _shape_only(file, spec)
        for piece in checkpoint.pieces(param):
            stored = file.tensors.get(piece.name)
            if stored is None:
                raise file.fail(f"tensor {piece.name!r} is missing")
            expected = piece.stored_shape(shape_only)
            if _core(stored.shape) != _core(expected):
                raise file.fail(f"tensor {piece.name!r} has shape {list(stored.shape)}, "
                                f"the metadata needs {list(expected)}")  # fmt: skip
            used.add(piece.name)
    left = [name for name in file.tensors if name not in used and not _speculates(file, config, name)]
    if left:
        raise file.fail(f"tensor {left[0]!r} is not a part of a {config.family} model with this metadata")


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading ones, which mean nothing to ggml."""
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]


def _speculates(file: GgufFile, config: ModelConfig, name: str) -> bool:
    """True for tensors of the layers that predict further tokens, behind those of the model."""
    count = file.metadata.get(f"{file.metadata['general.architecture']}.nextn_predict_layers", 0)
    return any(name.startswith(f"blk.{config.num_layers + i}.") for i in range(count))


def _shape_only(file: GgufFile, spec: ParamSpec) -> np.ndarray:
    """An array of the spec's shape that takes no memory: one element, repeated."""
    try:
        return np.broadcast_to(np.float32(0), spec.shape)
    except ValueError as error:  # more elements than an address space holds
        raise file.fail(f"a weight of shape {spec.shape} is impossible") from error


def _native_dtype(file: GgufFile) -> Dtype:
    """float32 if most values are stored so; else bfloat16."""
    counts = dict.fromkeys(GGMLQuantizationType, 0)
    for tensor in file.tensors.values():
        counts[tensor.kind] += math.prod(tensor.shape)
    return "float32" if 2 * counts[GGMLQuantizationType.F32] > sum(counts.values()) else "bfloat16"


def _end_token_ids(file: GgufFile) -> tuple[int, ...]:
    """What the metadata names; the tokenizer may know more (by spelling)."""
    found = {file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
    return tuple(sorted(token_id for token_id in found if isinstance(token_id, int) and token_id >= 0))
