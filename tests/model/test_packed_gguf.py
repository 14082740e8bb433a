"""Quantized GGUF files kept packed: the same numbers to the bit, the same logits, in the bytes that are promised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from engine.model.packing import Packing
from engine.model.params import param_specs
from engine.model.quantization import pack, packed_shape
from engine.model.weights.gguf import GgufCheckpoint, open_gguf
from engine.model.weights.packed import summary
from pallas_kernels.quantized import Quantized, tree_bytes
from pallas_kernels.target import Target
from tests.model.gguf_files import close
from tests.model.models import relative_error
from tests.oracle import naive_logits

FLOAT32 = np.dtype(np.float32)
GPT_OSS = Path(__file__).parent.parent / "fixtures" / "gguf" / "gpt_oss" / "model.gguf"
HIDDEN, MLP, VOCAB = 256, 512, 96
SHAPES = {"attn_q": (256, HIDDEN), "attn_k": (128, HIDDEN), "attn_v": (128, HIDDEN), "attn_output": (HIDDEN, 256),
          "ffn_gate": (MLP, HIDDEN), "ffn_up": (MLP, HIDDEN), "ffn_down": (HIDDEN, MLP)}  # fmt: skip
# Bytes of a block at which float16 scales stand; a block's other bytes may be anything.
HALVES = {Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,), Kind.Q4_K: (0, 2),
          Kind.Q5_K: (0, 2), Kind.Q6_K: (208,), Kind.Q2_K: (80, 82)}  # fmt: skip
BITS = {Kind.Q4_0: 5, Kind.Q4_1: 6, Kind.Q5_0: 9, Kind.Q5_1: 10, Kind.Q8_0: 9, Kind.Q4_K: 6, Kind.Q5_K: 10,
        Kind.Q6_K: 10}  # fmt: skip


def random_blocks(rng: np.random.Generator, kind: Kind, shape: tuple[int, int]) -> np.ndarray:
    """Raw rows of arbitrary bits, scaled so that the weights are near 1 / sqrt(K)."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (shape[0], shape[1] // block, block_bytes), np.uint8)
    typical = 0.05 / {Kind.Q4_K: 250, Kind.Q5_K: 500, Kind.Q6_K: 2000, Kind.Q2_K: 20}.get(kind, 16)
    typical /= 8 if kind == Kind.Q8_0 else 1
    for start in HALVES[kind]:
        scales = (typical * rng.uniform(0.5, 1.5, raw.shape[:2])).astype("<f2")
        scales *= -8 if start == 2 and kind in (Kind.Q4_1, Kind.Q5_1) else 1
        raw[:, :, start : start + 2] = scales.view(np.uint8).reshape(*raw.shape[:2], 2)
    return raw.reshape(shape[0], -1)


def write(path: Path, kinds: dict[str, Kind], default: Kind, arch: str = "llama", vocab: int = VOCAB) -> Path:
    """A model of one layer; `kinds` names the tensors whose type is not the default."""
    rng = np.random.default_rng(11)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (("block_count", 1), ("context_length", 128), ("embedding_length", HIDDEN),
                       ("feed_forward_length", MLP), ("attention.head_count", 4),
                       ("attention.head_count_kv", 2)):  # fmt: skip
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    embed = gguf.quants.quantize(rng.standard_normal((vocab, HIDDEN), np.float32), Kind.Q8_0)
    writer.add_tensor("token_embd.weight", embed, raw_dtype=Kind.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32))
    for name, shape in SHAPES.items():
        kind = kinds.get(name, default)
        if kind == Kind.F32:
            writer.add_tensor(f"blk.0.{name}.weight", rng.standard_normal(shape, np.float32) / 16)
        else:
            writer.add_tensor(f"blk.0.{name}.weight", random_blocks(rng, kind, shape), raw_dtype=kind)
    close(writer)
    return path


@dataclass
class Both:
    """A checkpoint's float32 parameters, and the packed ones as they are on the device."""

    opened: GgufCheckpoint
    packings: dict[str, Packing]
    wide: dict[str, np.ndarray]
    packed: dict[str, Any]


def load_both(opened: Any, laid_for: Target | None = None) -> Both:
    """The float32 parameters and the packed ones, of the shapes that were promised."""
    specs = param_specs(opened.config, FLOAT32)
    stored = opened.stored(specs)
    packings = {name: weight.packing for name, weight in stored.items() if weight.packing}
    wide = opened.load(specs, lambda _, array: array)
    packed = opened.load(specs, lambda name, array: jax.device_put(pack(specs[name], array, None, laid_for)), packings)
    for name, array in packed.items():
        assert jax.tree.map(lambda a: (a.shape, a.dtype), array) == jax.tree.map(
            lambda a: (a.shape, a.dtype), packed_shape(specs[name], packings.get(name), laid_for)
        )
    return Both(opened, packings, wide, packed)


def by_hand(w: Quantized) -> np.ndarray:
    """float32 [..., K, N], by the layout that `pallas_kernels.quantized` describes, without its code."""
    *lead, rows, columns = w.shape
    values = np.asarray(w.values)
    if w.format == "int4":
        halves = values.reshape(*lead, rows // w.group, w.group // 2, columns)
        numbers = np.concatenate([halves & 15, halves >> 4], axis=-2).astype(np.float32)
        numbers -= 0 if w.offsets is not None else 8
    else:
        numbers = values.astype(np.float32).reshape(*lead, rows // w.group, w.group, columns)
    numbers *= np.asarray(w.scales, np.float32)[..., None, :]
    if w.offsets is not None:
        numbers += np.asarray(w.offsets, np.float32)[..., None, :]
    return numbers.reshape(*lead, rows, columns)


def check_equal(both: Both) -> None:
    """Every packed weight is, bit for bit, what the file's own dequantization gives."""
    assert both.packings
    for name in both.packings:
        np.testing.assert_array_equal(by_hand(both.packed[name]).reshape(-1), both.wide[name].reshape(-1), err_msg=name)


def check_logits(both: Both) -> None:
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, both.opened.config.vocab_size, 40)]
    want = naive_logits(both.opened.config, both.wide, tokens)
    assert np.isfinite(want).all()
    assert relative_error(naive_logits(both.opened.config, both.packed, tokens), want) < 1e-4


def weights_in(both: Both, name: str) -> int:
    return both.wide[name].size


@pytest.mark.parametrize("kind", BITS, ids=lambda kind: kind.name)
def test_kept_packed_without_loss(kind: Kind, tmp_path: Path) -> None:
    both = load_both(open_gguf(write(tmp_path / "model.gguf", {}, kind)))
    if kind == Kind.Q8_0:  # a program is compiled; the others' weights are of the same kinds or in the equality net
        check_logits(both)
    assert set(both.packings) == {f"layers.0.{name}" for name in ("qkv", "o", "gate_up", "down")}
    for name in both.packings:
        assert tree_bytes(both.packed[name]) * 8 == BITS[kind] * weights_in(both, name)
    check_equal(both)


@pytest.mark.parametrize(
    ("kinds", "default", "qkv", "bits"),
    [
        ({"attn_v": Kind.Q6_K, "ffn_down": Kind.Q6_K}, Kind.Q4_K, Packing("int8", 16, symmetric=False), 12),
        ({"attn_v": Kind.Q8_0}, Kind.Q4_0, Packing("int8", 32), 9),
        ({"attn_v": Kind.Q4_1}, Kind.Q4_0, Packing("int4", 32, symmetric=False), 6),
        ({"attn_v": Kind.Q5_1, "attn_k": Kind.Q4_0}, Kind.Q4_1, Packing("int8", 32, symmetric=False), 10),
    ],
)
def test_mixed_types_share_a_wider_packing(
    kinds: dict[str, Kind], default: Kind, qkv: Packing, bits: int, tmp_path: Path
) -> None:
    both = load_both(open_gguf(write(tmp_path / "model.gguf", kinds, default)))
    assert both.packings["layers.0.qkv"] == qkv
    assert tree_bytes(both.packed["layers.0.qkv"]) * 8 == bits * weights_in(both, "layers.0.qkv")
    check_equal(both)


def test_the_order_of_other_architectures(tmp_path: Path) -> None:
    """A file whose rows of q and k stand as they are computed with."""
    path = write(tmp_path / "model.gguf", {}, Kind.Q4_0)
    both, opened = load_both(open_gguf(path)), open_gguf(path)
    opened.file.metadata["general.architecture"] = "qwen2"
    other = load_both(opened)
    check_equal(other)
    assert not np.array_equal(other.packed["layers.0.qkv"].values, both.packed["layers.0.qkv"].values)


def test_rows_in_whole_tiles() -> None:
    """Where accelerators have columns of zeros behind a row's own, a model computes the same."""
    both = load_both(open_gguf(GPT_OSS), Target("tpu", "v6e"))
    name = "layers.0.experts_down"
    assert both.wide["embed"].shape[1] == both.wide[name].shape[2] == 32
    assert both.packed["embed"].shape[1] == both.packed[name].shape[2] == 128
    model = replace(both.opened.config, layers=both.opened.config.layers[:1], tie_embeddings=True)
    tokens = [5, 7, 5, 250]
    assert relative_error(naive_logits(model, both.packed, tokens), naive_logits(model, both.wide, tokens)) < 1e-4


def test_a_wrong_scale_would_be_seen(tmp_path: Path) -> None:
    both = load_both(open_gguf(write(tmp_path / "model.gguf", {}, Kind.Q4_K)))
    down = both.packed["layers.0.down"]
    scales = np.array(down.scales)
    scales[0, 0] = np.nextafter(scales[0, 0], np.float32(np.inf))
    both.packed["layers.0.down"] = Quantized(down.values, jax.device_put(scales), down.offsets, down.format)
    with pytest.raises(AssertionError, match=r"layers\.0\.down"):
        check_equal(both)


def test_what_is_not_kept_packed_is_said(tmp_path: Path) -> None:
    kinds = {"attn_k": Kind.F32, "ffn_down": Kind.Q2_K}
    opened = open_gguf(write(tmp_path / "model.gguf", kinds, Kind.Q4_1))
    specs = param_specs(opened.config, np.dtype(jax.numpy.bfloat16))
    stored = opened.stored(specs)
    packings = {name: weight.packing for name, weight in stored.items() if weight.packing}
    assert set(packings) == {"layers.0.o", "layers.0.gate_up"}
    lines = summary(stored, packings, specs)
    size = HIDDEN * 256 + 2 * MLP * HIDDEN
    assert lines == [
        "Q8_0: embed made bfloat16 (only matrices of the layers are kept packed): 49,152 bytes, 26,112 in the files",
        "Q4_1: layers.0.qkv made bfloat16 (a part of it is stored as float): 262,144 bytes, 61,440 in the files",
        f"Q4_1: layers.0.o and 1 more kept packed as int4 in groups of 32, offsets, float32 scales: "
        f"{size * 6 // 8:,} bytes, {size * 5 // 8:,} in the files",
        "Q2_K: layers.0.down made bfloat16 (a type that is only dequantized): 262,144 bytes, 43,008 in the files",
    ]
    unpacked = summary(stored, {}, specs)
    assert unpacked[2].startswith("Q4_1: layers.0.o and 1 more made bfloat16 (as --quantization says): 655,360 bytes")
