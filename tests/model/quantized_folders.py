"""Tiny quantized Hugging Face folders, written by each format's public layout with plain loops and shifts.

Every writer returns the tensors of one linear layer and the float32 weight [out, K] that the format
says they stand for. Nothing here knows the engine's packing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.model.gguf_files import hf_tensors
from tests.model.models import hf_config

HIDDEN, MLP, VOCAB, LAYERS = 256, 384, 80, 1
LINEARS = {"self_attn.q_proj": (256, HIDDEN), "self_attn.k_proj": (128, HIDDEN), "self_attn.v_proj": (128, HIDDEN),
           "self_attn.o_proj": (HIDDEN, 256), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
           "mlp.down_proj": (HIDDEN, MLP)}  # fmt: skip
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
          "I8": np.int8, "U8": np.uint8, "I32": np.int32, "I64": np.int64}  # fmt: skip
Tensors = dict[str, np.ndarray]
Linear = Callable[[np.random.Generator, int, int], tuple[Tensors, np.ndarray]]


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """The format in full: length, JSON header, data."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header, start = {}, 0
    for name, array in tensors.items():
        end = start + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_folder(folder: Path, quantization: dict[str, Any] | None, linear: Linear, floats: Iterable[str] = ()) -> Path:
    """A Llama of one layer; `floats` are the linear layers that stay bfloat16. Also writes `folder`-float, its twin."""
    rng = np.random.default_rng(17)
    config = {**hf_config("llama"), "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": VOCAB,
              "tie_word_embeddings": True}  # fmt: skip
    common: Tensors = {"model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN)).astype(ml_dtypes.bfloat16)}
    for norm in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        common[f"{norm}.weight"] = rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
    quantized, wide = dict(common), dict(common)
    for name, (rows, k) in LINEARS.items():
        stem = f"model.layers.0.{name}"
        if name in floats:
            weight = (rng.standard_normal((rows, k)) / 16).astype(ml_dtypes.bfloat16)
            quantized[f"{stem}.weight"] = wide[f"{stem}.weight"] = weight
            continue
        parts, weight = linear(rng, rows, k)
        quantized |= {f"{stem}.{part}": array for part, array in parts.items()}
        wide[f"{stem}.weight"] = weight.astype(np.float32)
    return write_twins(folder, config, quantization, quantized, wide)


def write_twins(
    folder: Path, config: dict[str, Any], quantization: dict[str, Any] | None, quantized: Tensors, wide: Tensors
) -> Path:
    """`folder`, and beside it `folder`-float with the float weights that it stands for."""
    extra = {} if quantization is None else {"quantization_config": quantization}
    twin = folder.with_name(f"{folder.name}-float")
    for place, tensors, keys in ((folder, quantized, extra), (twin, wide, {})):
        place.mkdir()
        (place / "config.json").write_text(json.dumps({**config, **keys}))
        write_safetensors(place / "model.safetensors", tensors)
    return folder


def requantize_fixture(name: str, folder: Path, quantization: dict[str, Any], linear: Linear) -> Path:
    """A fixture whose projections are random and quantized, routers and all else as they are; and its float twin."""
    rng = np.random.default_rng(23)
    quantized: Tensors = {}
    wide: Tensors = {}
    for tensor, values in hf_tensors(name).items():
        if values.ndim == 2 and tensor.endswith(
            ("_proj.weight", "_qkvz.weight", "_with_mqa.weight", ".w1.weight", ".w2.weight", ".w3.weight")
        ):
            parts, weight = linear(rng, *values.shape)
            quantized |= {f"{tensor.removesuffix('weight')}{part}": array for part, array in parts.items()}
            wide[tensor] = weight.astype(np.float32)
        else:
            quantized[tensor] = wide[tensor] = values
    return write_twins(folder, hf_config(name), quantization, quantized, wide)


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., n * bits / 32]: the numbers of the last axis, the first in the lowest bits."""
    per_word = 32 // bits
    wide = numbers.astype(np.int64).reshape(*numbers.shape[:-1], -1, per_word)
    out = np.zeros(wide.shape[:-1], np.int64)
    for i in range(per_word):
        out |= wide[..., i] << (bits * i)
    return out.astype(np.uint32).view(np.int32)


def scales_for(rng: np.random.Generator, shape: tuple[int, ...], bits: int, dtype: Any) -> np.ndarray:
    return (rng.uniform(0.5, 1.5, shape) * 0.3 / 2**bits).astype(dtype)


def gptq(
    bits: int, group: int, *, sym: bool, version: int = 1, order: bool = False, scale_dtype: Any = np.float16
) -> Linear:
    """qweight packs K, qzeros packs outputs; version 1 stores zero points minus one."""

    def linear(rng: np.random.Generator, rows: int, k: int) -> tuple[Tensors, np.ndarray]:
        size = k if group == -1 else group
        g_idx = np.arange(k) // size
        if order:
            g_idx = rng.permutation(g_idx)
        numbers = rng.integers(0, 2**bits, (k, rows))
        zeros = np.full((k // size, rows), 2 ** (bits - 1)) if sym else rng.integers(1, 2**bits, (k // size, rows))
        scales = scales_for(rng, zeros.shape, bits, scale_dtype)
        weight = (numbers - zeros[g_idx]).astype(np.float32) * scales.astype(np.float32)[g_idx]
        stored = zeros - 1 if version == 1 else zeros
        tensors = {"qweight": np.ascontiguousarray(words(numbers.T, bits).T), "qzeros": words(stored, bits),
                   "scales": scales, "g_idx": g_idx.astype(np.int32)}  # fmt: skip
        return tensors, weight.T

    return linear


def awq(group: int) -> Linear:
    """Words hold eight outputs in the order 0 2 4 6 1 3 5 7."""

    def linear(rng: np.random.Generator, rows: int, k: int) -> tuple[Tensors, np.ndarray]:
        size = k if group == -1 else group
        numbers, zeros = rng.integers(0, 16, (k, rows)), rng.integers(0, 16, (k // size, rows))
        scales = scales_for(rng, zeros.shape, 4, np.float16)

        def packed(values: np.ndarray) -> np.ndarray:
            out = np.zeros((len(values), rows // 8), np.int64)
            for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                out |= values[:, column::8].astype(np.int64) << (4 * place)
            return out.astype(np.uint32).view(np.int32)

        groups = np.arange(k) // size
        weight = (numbers - zeros[groups]).astype(np.float32) * scales.astype(np.float32)[groups]
        return {"qweight": packed(numbers), "qzeros": packed(zeros), "scales": scales}, weight.T

    return linear


def compressed_packed(
    bits: int, group: int | None, *, symmetric: bool, order: bool = False, scale_dtype: Any = ml_dtypes.bfloat16
) -> Linear:
    """Numbers plus half their range, packed along K; zero points the same along the outputs."""

    def linear(rng: np.random.Generator, rows: int, k: int) -> tuple[Tensors, np.ndarray]:
        half, size = 2 ** (bits - 1), group or k
        numbers, shape = rng.integers(-half, half, (rows, k)), (rows, k // size)
        scales = scales_for(rng, shape, bits, scale_dtype)
        zeros = np.zeros(shape, np.int64) if symmetric else rng.integers(-half, half, shape)
        groups = np.arange(k) // size
        tensors = {"weight_packed": words(numbers + half, bits), "weight_scale": scales,
                   "weight_shape": np.array([rows, k], np.int64)}  # fmt: skip
        if order:
            groups = rng.permutation(groups)
            tensors["weight_g_idx"] = groups.astype(np.int32)
        if not symmetric:
            tensors["weight_zero_point"] = np.ascontiguousarray(words((zeros + half).T, bits).T)
        return tensors, (numbers - zeros[:, groups]).astype(np.float32) * scales.astype(np.float32)[:, groups]

    return linear


def compressed_int8(*, per: str = "channel", static: bool = False) -> Linear:
    def linear(rng: np.random.Generator, rows: int, k: int) -> tuple[Tensors, np.ndarray]:
        numbers = rng.integers(-128, 128, (rows, k)).astype(np.int8)
        shape = {"channel": (rows, 1), "tensor": (1,)}[per]
        scales = scales_for(rng, shape, 8, np.float32)
        tensors = {"weight": numbers, "weight_scale": scales}
        if static:
            tensors["input_scale"] = np.full(1, 0.05, np.float32)
        return tensors, numbers.astype(np.float32) * scales.reshape(-1, 1)

    return linear


def float8(
    scale: str,
    *,
    block: tuple[int, int] | None = None,
    per: str = "tensor",
    static: bool = False,
    dtype: Any = np.float32,
) -> Linear:
    """float8 numbers with `scale` (a tensor's name): one, one a row, or one a block, with ragged last blocks."""

    def linear(rng: np.random.Generator, rows: int, k: int) -> tuple[Tensors, np.ndarray]:
        numbers = rng.uniform(-400, 400, (rows, k)).astype(ml_dtypes.float8_e4m3fn)
        if block is None:
            scales = scales_for(rng, {"tensor": (), "one": (1,), "channel": (rows, 1)}[per], 10, dtype)
            spread = scales.astype(np.float32).reshape(-1, 1)
        else:
            scales = scales_for(rng, (-(-rows // block[0]), -(-k // block[1])), 10, dtype)
            spread = np.array(
                [[scales[i // block[0], j // block[1]] for j in range(k)] for i in range(rows)], np.float32
            )
        tensors = {"weight": numbers, scale: scales}
        if static:
            tensors["input_scale"] = np.array(0.1, np.float32).reshape(scales.shape if block is None else ())
        return tensors, numbers.astype(np.float32) * spread

    return linear


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def write_gpt_oss(folder: Path) -> Path:
    """The gpt-oss fixture with wider experts in mxfp4, whose blocks are 32 numbers of a row; and its float twin."""
    rng = np.random.default_rng(29)
    config = {**hf_config("gpt_oss"), "intermediate_size": 96}
    experts, hidden, mlp = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    sizes = {"gate_up_proj": (2 * mlp, hidden), "down_proj": (hidden, mlp)}
    quantized: Tensors = {}
    wide: Tensors = {}
    for name, values in hf_tensors("gpt_oss").items():
        kind = name.rsplit(".", 1)[1]
        if kind in sizes:
            blocks, scales, weight = mxfp4(rng, experts, *sizes[kind])
            quantized |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            wide[name] = np.ascontiguousarray(weight.swapaxes(1, 2))
        elif kind == "gate_up_proj_bias":
            quantized[name] = wide[name] = rng.standard_normal((experts, 2 * mlp)).astype(np.float32)
        else:
            quantized[name] = wide[name] = values
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return write_twins(folder, config, method, quantized, wide)


def mxfp4(rng: np.random.Generator, experts: int, rows: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """blocks, scales, and the float32 weights [experts, rows, k]."""
    blocks = rng.integers(0, 256, (experts, rows, k // 32, 16)).astype(np.uint8)
    scales = rng.integers(120, 127, (experts, rows, k // 32)).astype(np.uint8)
    weight = np.zeros((experts, rows, k), np.float32)
    for expert, row, block in np.ndindex(experts, rows, k // 32):
        factor = 2.0 ** (int(scales[expert, row, block]) - 127)
        for i, byte in enumerate(blocks[expert, row, block].tolist()):
            at = block * 32 + 2 * i
            weight[expert, row, at : at + 2] = E2M1[byte & 15] * factor, E2M1[byte >> 4] * factor
    return blocks, scales, weight
