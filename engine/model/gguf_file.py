"""The GGUF container: metadata, the table of tensors, and dequantized rows of one tensor.

Knows nothing about models or tokenizers. Every count, length and offset is checked against the
file's size before it is used, so a truncated or lying file is a ModelError and never a crash.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.errors import ModelError

MAGIC = b"GGUF"
MAX_ENTRIES = 1 << 17  # metadata keys or tensors; the largest real models have a few thousand
MAX_DIMS = 4
MAX_ARRAY_DEPTH = 2
CHUNK_ELEMENTS = 1 << 18  # that are dequantized at once: their intermediate results stay in a core's cache

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
_PLAIN: dict[GGMLQuantizationType, np.dtype] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.F64: np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` is outermost first (the reverse of the file's order)."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    row_bytes: int

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def num_cols(self) -> int:
        return self.shape[-1]


@dataclass(frozen=True)
class GgufFile:
    """An opened (parsed, then closed) GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}")


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of `path`. Raises ModelError that names the file and what is wrong in it."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise ModelError(f"{path}: {size} bytes are too few for a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data, size).parse()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Parser:
    """A cursor over the header. Every step checks that the bytes it wants exist."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.pos = path, data, size, 0

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}")

    def need(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.size - self.pos:
            raise self.fail(f"is truncated or lies about its sizes: {what} at byte {self.pos} needs {num_bytes} bytes, "
                            f"{self.size - self.pos} are left")  # fmt: skip

    def number(self, fmt: str, what: str) -> int:
        num_bytes = struct.calcsize(fmt)
        self.need(num_bytes, what)
        (value,) = struct.unpack_from(fmt, self.data, self.pos)
        self.pos += num_bytes
        return value

    def string(self, what: str) -> str:
        length = self.number("<Q", f"length of {what}")
        self.need(length, what)
        raw = self.data[self.pos : self.pos + length]
        self.pos += length
        return raw.decode("utf-8", "replace")

    def parse(self) -> GgufFile:
        if self.data[:4] != MAGIC:
            raise self.fail("is not a GGUF file (wrong magic bytes)")
        self.pos = 4
        version = self.number("<I", "version")
        if version & 0xFFFF == 0:
            raise self.fail("is a big-endian GGUF file, which is not supported")
        if version not in (2, 3):
            raise self.fail(f"has GGUF version {version}; supported: 2, 3")
        num_tensors, num_keys = self.number("<Q", "tensor count"), self.number("<Q", "metadata count")
        if max(num_tensors, num_keys) > MAX_ENTRIES:
            raise self.fail(f"claims {num_tensors} tensors and {num_keys} metadata keys; at most {MAX_ENTRIES} of each")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string("a metadata key")
            if key in metadata:
                raise self.fail(f"metadata key {key!r} appears twice")
            metadata[key] = self.value(self.number("<I", f"type of {key}"), key)
        return GgufFile(self.path, metadata, self.tensor_table(num_tensors, metadata))

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key, depth)
        if kind not in _SCALARS:
            raise self.fail(f"metadata key {key!r} has unknown type {kind}")
        (value,) = self.scalars(kind, 1, key)
        return value

    def scalars(self, kind: int, count: int, key: str) -> list[Any]:
        dtype = _SCALARS[kind]
        self.need(count * dtype.itemsize, key)
        raw = self.data[self.pos : self.pos + count * dtype.itemsize]
        self.pos += len(raw)
        values = np.frombuffer(raw, dtype).tolist()
        return [bool(value) for value in values] if kind == _BOOL else values

    def array(self, key: str, depth: int) -> list[Any]:
        kind = self.number("<I", f"element type of {key}")
        count = self.number("<Q", f"length of {key}")
        if kind in _SCALARS:
            return self.scalars(kind, count, key)
        self.need(count * 8, key)  # a string or an array takes at least its own length
        if kind == _STRING:
            return self.strings(count, key)
        if kind != _ARRAY or depth >= MAX_ARRAY_DEPTH:
            raise self.fail(f"metadata key {key!r} has unknown or too deeply nested element type {kind}")
        return [self.value(_ARRAY, key, depth + 1) for _ in range(count)]

    def strings(self, count: int, key: str) -> list[str]:
        """As `string`, in one loop: vocabularies have 10**5 of them."""
        data, size, pos, unpack = self.data, self.size, self.pos, struct.Struct("<Q").unpack_from
        result: list[str] = []
        for _ in range(count):
            if pos + 8 > size:
                break
            start = pos + 8
            pos = start + unpack(data, pos)[0]
            if pos > size:
                break
            result.append(data[start:pos].decode("utf-8", "replace"))
        if len(result) < count:
            raise self.fail(f"is truncated or lies about its sizes: {key} has {count} strings, "
                            f"the file ends after {len(result)}")  # fmt: skip
        self.pos = pos
        return result

    def tensor_table(self, count: int, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
        entries = [self.tensor_entry() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment must be a power of two, got {alignment!r}")
        data_start = -(-self.pos // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self.fail(f"tensor {name!r} appears twice")
            tensors[name] = self.tensor_info(name, shape, kind, data_start + offset)
        return tensors

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor name")
        num_dims = self.number("<I", f"dimensions of {name}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.fail(f"tensor {name!r} has {num_dims} dimensions; 1 to {MAX_DIMS} are possible")
        dims = [self.number("<Q", f"shape of {name}") for _ in range(num_dims)]
        return name, tuple(reversed(dims)), self.number("<I", f"type of {name}"), self.number("<Q", f"offset of {name}")

    def tensor_info(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        try:
            quant = GGMLQuantizationType(kind)
        except ValueError:
            raise self.fail(f"tensor {name!r} has unknown type {kind}") from None
        block, block_bytes = GGML_QUANT_SIZES[quant]
        if min(shape) < 1 or shape[-1] % block:
            raise self.fail(f"tensor {name!r} of shape {list(shape)} cannot hold blocks of {block} ({quant.name})")
        info = TensorInfo(name, shape, quant, offset, shape[-1] // block * block_bytes)
        end = offset + info.num_rows * info.row_bytes
        if end > self.size:
            raise self.fail(f"is truncated or lies about its sizes: tensor {name!r} ends at byte {end}, "
                            f"the file at {self.size}")  # fmt: skip
        return info


def dequantizer(file: GgufFile, kind: GGMLQuantizationType) -> Callable[[np.ndarray], np.ndarray]:
    """The function from raw rows uint8 [rows, row_bytes] to float32 [rows, cols] for `kind`."""
    if kind in _PLAIN:
        return lambda raw: raw.view(_PLAIN[kind]).astype(np.float32, copy=False)
    block_bytes = GGML_QUANT_SIZES[kind][1]
    try:
        quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)  # makes the tables that some types look up in
    except (NotImplementedError, KeyError):
        raise file.fail(f"holds tensors of type {kind.name}, which cannot be dequantized") from None
    # `quants.dequantize` takes 16 rows at a time, which costs as much again.
    return getattr(quants, kind.name).dequantize_rows


class TensorReader:
    """Rows of tensors as float32, read with `pread`: thread-safe, and no file page stays mapped."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._fd = os.open(file.path, os.O_RDONLY)
        self._dequantize = {kind: dequantizer(file, kind) for kind in {t.kind for t in file.tensors.values()}}

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, cols] of tensor `name`; quantized values are expanded exactly."""
        info = self._file.tensors[name]
        dequantize, step = self._dequantize[info.kind], max(1, CHUNK_ELEMENTS // info.num_cols)
        if stop - start <= step:
            return dequantize(self.raw_rows(name, start, stop))
        out = np.empty((stop - start, info.num_cols), np.float32)
        for row in range(start, stop, step):
            end = min(row + step, stop)
            out[row - start : end - start] = dequantize(self.raw_rows(name, row, end))
        return out

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """uint8 [stop - start, row_bytes] of tensor `name`, as stored."""
        info = self._file.tensors[name]
        num_bytes = (stop - start) * info.row_bytes
        raw = os.pread(self._fd, num_bytes, info.offset + start * info.row_bytes)
        if len(raw) != num_bytes:
            raise self._file.fail(f"tensor {name!r}: the file ended while reading (did it change?)")
        return np.frombuffer(raw, np.uint8).reshape(stop - start, info.row_bytes)

    def tensor(self, name: str) -> np.ndarray:
        info = self._file.tensors[name]
        return self.rows(name, 0, info.num_rows).reshape(info.shape)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
