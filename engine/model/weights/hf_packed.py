"""GPTQ, AWQ (gemm) and fp8 checkpoints of Hugging Face: what their config means and how their tensors unpack.

A scheme says which tensors stand for one weight [out, K] of the model, which packing holds it, and
reads it. Knows no files: tensors are read through a function. Every key of the config is applied or
refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from engine.errors import ModelError
from engine.model.packing import Packing
from engine.model.weights.packed import TWICE_E2M1, PackedRows
from pallas_kernels.quantized import Activations

Read = Callable[[str], np.ndarray]  # a tensor by the end of its name
Shapes = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]  # end of a name -> allowed dtypes, shape
SCALES = ("F16", "BF16", "F32")
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the first, second, ... column stands
# Ends of the names of tensors that stand for a weight.
ENDINGS = ("weight", "qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "input_scale",
           "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "input_zero_point",
           "blocks")  # fmt: skip
# How GPTQ found the numbers, and where its libraries keep or compute with them.
GPTQ_IGNORED = """
    damp_percent damp_auto_increment true_sequential static_groups model_seqlen meta use_exllama exllama_config
    disable_exllama use_cuda_fp16 max_input_length backend dataset tokenizer block_name_to_quantize
    module_name_preceding_first_block modules_in_block_to_quantize batch_size pad_token_id cache_block_outputs lm_head
    is_marlin_format model_name_or_path model_file_base_name quantizer mse version modules_to_not_convert
"""
DYNAMIC_NOTE = "static input scales become one a row, dynamic"


class Scheme(Protocol):
    """How one quantized weight [rows, k] is stored. `dtypes`: its tensors' dtypes by the end of their names."""

    # All experts' weights are one tensor [experts, out, in], and "_" stands before the end of a name, not ".".
    merged: ClassVar[bool] = False

    def tensors(self, stem: str, rows: int, k: int, dtypes: Mapping[str, str]) -> Shapes | None:
        """The tensors that stand for the weight `stem`; None: it is not quantized."""
        ...

    def packing(self, stem: str, k: int, dtypes: Mapping[str, str], read: Read) -> tuple[str, Packing | str, str]:
        """(what the format calls it, its packing or why there is none, what is not as the format has it)."""
        ...

    def read(self, stem: str, k: int, dtypes: Mapping[str, str], read: Read) -> PackedRows: ...


class Config:
    """An object inside quantization_config whose reads are counted."""

    def __init__(self, values: Mapping[str, Any], path: str = "quantization_config") -> None:
        self._values, self._path = values, path
        self._read: set[str] = set()

    @property
    def names(self) -> list[str]:
        return list(self._values)

    def value(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def choice(self, key: str, allowed: Sequence[Any], default: Any = None) -> Any:
        value = self.value(key, default)
        if not any(value == a and type(value) is type(a) for a in allowed):
            raise self.wrong(key, f"is not supported; known: {', '.join(map(repr, allowed))}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return self.choice(key, (False, True), default)

    def inner(self, key: str) -> Config | None:
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "must be an object")
        return Config(value, f"{self._path}.{key}")

    def group(self, key: str) -> int | None:
        """A group's size; None where a scale has a whole row (-1)."""
        value = self.value(key, -1)
        if type(value) is not int or (value != -1 and (value < 2 or value % 2)):
            raise self.wrong(key, "must be -1 or an even number of rows")
        return None if value == -1 else value

    def pair(self, key: str, default: list[int] | None = None) -> tuple[int, int] | None:
        """A block's rows and numbers of a row."""
        value = self.value(key, default)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(type(b) is int and b > 0 for b in value):
            raise self.wrong(key, "must be two numbers")
        return value[0], value[1]

    def ignore(self, *keys: str) -> None:
        """How the weights were found or are computed with elsewhere, or names that the tensors show themselves."""
        self._read.update(keys)

    def finish(self) -> None:
        for key, value in self._values.items():
            if key not in self._read and value not in (None, False, [], {}):
                raise self.wrong(key, "is not known and could change the results")

    def wrong(self, key: str, why: str) -> ModelError:
        return ModelError(f"config.json: {self._path}.{key} = {self._values.get(key)!r} {why}")


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., 32 / bits]: the numbers in int32 words, from the lowest bits on."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((octets[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(*words.shape, -1)


def integers(numbers: np.ndarray, zeros: np.ndarray | None, scales: np.ndarray, bits: int) -> PackedRows:
    """(numbers - zeros) * scales, of unsigned numbers [out, K], zeros and scales [out, groups] (zeros None: half)."""
    scales, half = scales.astype(np.float32), 2 ** (bits - 1)
    if zeros is None and bits < 8:
        numbers = numbers + np.uint8(8 - half)  # a nibble counts from -8
    if bits == 8:
        numbers = (numbers ^ np.uint8(128)).view(np.int8)
    if zeros is None:
        return PackedRows(numbers, scales)
    start = np.float32(half if bits == 8 else 0)
    return PackedRows(numbers, scales, zeros=zeros.astype(np.float32) - start)


def spread_blocks(stored: np.ndarray, block: tuple[int, int], rows: int, k: int) -> np.ndarray:
    """[rows, groups] of what is stored once a block of so many rows and columns; the last blocks may be ragged."""
    group = math.gcd(k, block[1])
    spread = np.repeat(np.repeat(stored, block[0], axis=0), block[1] // group, axis=1)
    return spread[:rows, : k // group]


def act_order(group_of: np.ndarray, group: int) -> np.ndarray | None:
    """The group [K] of each number of a row; None where the groups are runs."""
    k, order = len(group_of), group_of.astype(np.int64)
    if order.min() < 0 or order.max() >= -(-k // group):
        raise ModelError(f"g_idx names group {order.max()}, there are {-(-k // group)}")
    return None if np.array_equal(order, np.arange(k) // group) else order


def integer_packing(
    bits: int, group: int | None, k: int, symmetric: bool, scale_dtype: str, activations: Activations = "float"
) -> Packing | str:
    """How `integers` are held exactly, or why they are not."""
    if not symmetric and scale_dtype == "F32":
        return "zero points times float32 scales would be rounded"
    size = k if group is None else group
    if k % size:
        return f"{k} numbers a row do not divide into groups of {size}"
    short = scale_dtype == "BF16" and symmetric and size < k
    packed_format: Literal["int8", "int4"] = "int8" if bits == 8 else "int4"
    return Packing(
        format=packed_format,
        group=None if size == k else size,
        symmetric=symmetric,
        activations=activations,
        scale_dtype="bfloat16" if short else "float32",
    )


@dataclass(frozen=True)
class Gptq(Scheme):
    """qweight [K * bits / 32, out], qzeros [groups, out * bits / 32], scales [groups, out], g_idx [K]."""

    bits: int
    group: int | None
    symmetric: bool
    act_order: bool
    zero_shift: int  # version 1 stores zero points minus one

    def tensors(self, stem: str, rows: int, k: int, dtypes: Mapping[str, str]) -> Shapes | None:
        if "qweight" not in dtypes:
            return None
        groups, per_word = -(-k // (self.group or k)), 32 // self.bits
        found: Shapes = {
            "qweight": (("I32",), (k // per_word, rows)),
            "qzeros": (("I32",), (groups, rows // per_word)),
            "scales": (SCALES, (groups, rows)),
        }
        return found | ({"g_idx": (("I32", "I64"), (k,))} if "g_idx" in dtypes else {})

    def packing(self, stem: str, k: int, dtypes: Mapping[str, str], read: Read) -> tuple[str, Packing | str, str]:
        kind = f"gptq int{self.bits}"
        if self.act_order and self._order(k, dtypes, read) is not None:
            return kind, "act-order: its groups are not runs of rows", ""
        return kind, integer_packing(self.bits, self.group, k, self.symmetric, dtypes["scales"]), ""

    def _order(self, k: int, dtypes: Mapping[str, str], read: Read) -> np.ndarray | None:
        return act_order(read("g_idx"), self.group) if "g_idx" in dtypes and self.group else None

    def read(self, stem: str, k: int, dtypes: Mapping[str, str], read: Read) -> PackedRows:
        numbers = np.moveaxis(fields(read("qweight"), self.bits), 1, 0)
        zeros = fields(read("qzeros"), self.bits).reshape(-1, len(numbers)).T.astype(np.int32) + self.zero_shift
        if self.symmetric and (zeros != 2 ** (self.bits - 1)).any():
            raise ModelError(f"sym = true, but not every zero point is {2 ** (self.bits - 1)}")
        found = integers(
            numbers.reshape(len(numbers), -1), None if self.symmetric else zeros, read("scales").T, self.bits
        )
        return replace(found, group_of=self._order(k, dtypes, read))


def gptq(keys: Config) -> Gptq:
    keys.ignore(*GPTQ_IGNORED.split())
    keys.choice("pack_dtype", ("int32",), "int32")
    version = keys.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    return Gptq(
        bits=keys.choice("bits", (2, 4, 8)),
        group=keys.group("group_size"),
        symmetric=keys.flag("sym", True),
        act_order=keys.flag("desc_act", True),
        zero_shift=1 if version == "gptq" else 0,
    )


@dataclass(frozen=True)
class Awq(Scheme):
    """qweight [K, out / 8], qzeros [groups, out / 8], scales [groups, out]; words hold columns 0 2 4 6 1 3 5 7."""

    group: int | None

    def tensors(self, stem: str, rows: int, k: int, dtypes: Mapping[str, str]) -> Shapes | None:
        if "qweight" not in dtypes:
            return None
        groups = -(-k // (self.group or k))
        return {
            "qweight": (("I32",), (k, rows // 8)),
            "qzeros": (("I32",), (groups, rows // 8)),
            "scales": (SCALES, (groups, rows)),
        }

    def packing(self, stem: str, k: int, dtypes: Mapping[str, str], read: Read) -> tuple[str, Packing | str, str]:
        return "awq int4", integer_packing(4, self.group, k, False, dtypes["scales"]), ""

    def read(self, stem: str, k: int, dtypes: Mapping[str, str], read: Read) -> PackedRows:
        numbers, zeros = (
            np.ascontiguousarray(fields(read(name), 4)[..., AWQ_ORDER].reshape(rows, -1).T)
            for name, rows in (("qweight", k), ("qzeros", k // (self.group or k)))
        )
        return integers(numbers, zeros, read("scales").T, 4)


def awq(keys: Config) -> Awq:
    keys.ignore("modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config")
    keys.choice("version", ("gemm", "GEMM"), "gemm")
    keys.choice("bits", (4,))
    keys.choice("zero_point", (True,), True)
    return Awq(keys.group("group_size"))


@dataclass(frozen=True)
class Fp8(Scheme):
    """weight float8 [out, K] with weight_scale or weight_scale_inv: one, one a row, or one a block."""

    block: tuple[int, int] | None
    activations: Activations
    note: str

    def tensors(self, stem: str, rows: int, k: int, dtypes: Mapping[str, str]) -> Shapes | None:
        if dtypes.get("weight") not in ("F8_E4M3", "F8_E5M2"):
            return None
        name = "weight_scale" if "weight_scale" in dtypes else "weight_scale_inv"
        shape = () if self.block is None else (-(-rows // self.block[0]), -(-k // self.block[1]))
        found: Shapes = {"weight": (("F8_E4M3", "F8_E5M2"), (rows, k)), name: (SCALES, shape)}
        return found | ({"input_scale": (SCALES, ())} if "input_scale" in dtypes else {})

    def packing(self, stem: str, k: int, dtypes: Mapping[str, str], read: Read) -> tuple[str, Packing | str, str]:
        kind = "fp8" if self.block is None else f"fp8 in blocks of {self.block[0]} x {self.block[1]}"
        group = None if self.block is None else math.gcd(k, self.block[1])
        form = "float8_e4m3fn" if dtypes["weight"] == "F8_E4M3" else "float8_e5m2"
        return kind, Packing(form, None if group == k else group, activations=self.activations), self.note

    def read(self, stem: str, k: int, dtypes: Mapping[str, str], read: Read) -> PackedRows:
        numbers = read("weight")
        scales = read("weight_scale" if "weight_scale" in dtypes else "weight_scale_inv").astype(np.float32)
        if self.block is None:
            return PackedRows(numbers, np.broadcast_to(scales.reshape(-1, 1), (len(numbers), 1)))
        return PackedRows(numbers, spread_blocks(scales, self.block, len(numbers), k))


def fp8(keys: Config) -> Fp8:
    keys.ignore("modules_to_not_convert", "ignored_layers", "dequantize", "scale_fmt", "is_checkpoint_fp8_serialized")
    keys.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    scheme = keys.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    block = keys.pair("weight_block_size")
    if block is None:
        return Fp8(None, "dynamic", DYNAMIC_NOTE if scheme == "static" else "")
    return Fp8(block, "float", "activations are not rounded to float8")


@dataclass(frozen=True)
class Mxfp4(Scheme):
    """gpt-oss's experts (OCP microscaling formats, 2023): blocks [experts, out, K / 32, 16], two e2m1 numbers a
    byte, the first in the low bits, and scales [experts, out, K / 32], powers of two biased by 127.

    Twice an e2m1 number is an integer, so int8 in groups of 32 holds them exactly, and bfloat16 the scales.
    """

    merged = True

    def tensors(self, stem: str, rows: int, k: int, dtypes: Mapping[str, str]) -> Shapes | None:
        if "blocks" not in dtypes:
            return None
        return {"blocks": (("U8",), (rows, k // 32, 16)), "scales": (("U8",), (rows, k // 32))}

    def packing(self, stem: str, k: int, dtypes: Mapping[str, str], read: Read) -> tuple[str, Packing | str, str]:
        return "mxfp4", Packing("int8", None if k == 32 else 32, scale_dtype="bfloat16"), ""

    def read(self, stem: str, k: int, dtypes: Mapping[str, str], read: Read) -> PackedRows:
        blocks, scales = read("blocks").reshape(-1, k // 2), read("scales").reshape(-1, k // 32)
        if (scales == 255).any():
            raise ModelError("a block's scale is NaN")
        numbers = np.empty((len(blocks), k), np.int8)
        numbers[:, ::2], numbers[:, 1::2] = TWICE_E2M1[blocks & 15], TWICE_E2M1[blocks >> 4]
        return PackedRows(numbers, np.ldexp(np.float32(1), scales.astype(np.int32) - 128))


def mxfp4(keys: Config) -> Mxfp4:
    keys.ignore("modules_to_not_convert", "dequantize")
    return Mxfp4()
