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
from engine.model.weights.gguf_packed import PACKINGS, unpacked_rows
from engine.model.weights.names import Piece, View, of_experts, pieces
from engine.model.weights.packed import QuantizedTensor, blocks, empty, stored_weight
from sharding.params import ParamSpec

NUM_THREADS = 2  # numpy releases the lock while it expands a block
FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F64)

# Architectures whose files keep each head's rotary pairs side by side (0, d/2, 1, d/2 + 1, ...).
INTERLEAVED = frozenset({"llama", "smollm3", "granite", "granitemoe"})

# Hugging Face's name within a layer -> GGUF's. Families with norms after the blocks differ, below.
_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_POST_NORM_NAMES = {**_LAYER_NAMES, "post_attention_layernorm": "post_attention_norm"}
_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _expert_pieces(config: ModelConfig, name: str) -> tuple[Piece, ...]:
    """One tensor for all experts' matrices of a kind; names within a layer are GGUF's."""
    experts, hidden = config.experts, config.hidden_size
    if experts is None:
        raise ValueError("the config has no experts")
    count, size, shared = experts.num_experts, experts.intermediate_size, experts.shared_size

    def transposed(array: np.ndarray) -> np.ndarray:
        return np.swapaxes(array, -1, -2)

    def half(index: int) -> View:  # [..., embed, blocks, 2, block] seen as [..., blocks, block, embed]
        return lambda array: np.moveaxis(array[..., index, :], -3, -1)

    def piece(stem: str, view: View, *shape: int) -> Piece:
        return Piece(f"{stem}.weight", (view,), shape=shape)

    return {
        "router": (piece("ffn_gate_inp", transposed, count, hidden),),
        "experts_gate_up": (
            piece("ffn_gate_exps", half(0), count, size, hidden),
            piece("ffn_up_exps", half(1), count, size, hidden),
        ),
        "experts_down": (piece("ffn_down_exps", transposed, count, hidden, size),),
        "shared_gate_up": (
            piece("ffn_gate_shexp", half(0), shared, hidden),
            piece("ffn_up_shexp", half(1), shared, hidden),
        ),
        "shared_down": (piece("ffn_down_shexp", transposed, hidden, shared),),
        "shared_gate": (piece("ffn_gate_inp_shexp", transposed, hidden),),
    }[name]


def gguf_name(config: ModelConfig, name: str) -> str:
    """GGUF's name of the tensor that Hugging Face calls `name` ("model.layers.0.mlp.up_proj.weight")."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    if name.startswith("blk."):
        return name
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    stem, kind = rest.rsplit(".", 1)
    table = _LAYER_NAMES if config.norm_place == "pre" else _POST_NORM_NAMES
    return f"blk.{layer}.{table[stem]}.{kind}"


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
        info = self.file.tensors[gguf_name(self.config, piece.name)]
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
                        self._fill_packed(reader, threads, piece, jax.tree.leaves(packed), packings[param])
                    out[param] = put(param, packed)
                    continue
                array = np.empty(spec.shape, spec.dtype)
                for piece in self.pieces(param):
                    self._fill(reader, threads, piece, array)
                out[param] = put(param, array)
        return out

    def _fill_packed(
        self, reader: TensorReader, threads: Executor, piece: Piece, leaves: list[np.ndarray], packing: Packing
    ) -> None:
        name = gguf_name(self.config, piece.name)
        kind, order = self.file.tensors[name].kind, self._row_order(piece.name)

        def fill(block: tuple[int, list[np.ndarray]]) -> None:
            start, targets = block
            raw = reader.raw_rows(name, start, start + len(targets[0]))
            parts = unpacked_rows(raw if order is None else raw[order], kind).leaves(packing)
            for target, part in zip(targets, parts, strict=True):
                target[...] = part

        list(threads.map(fill, blocks(piece, leaves)))

    def pieces(self, param: str) -> Iterator[Piece]:
        """The stored tensors of `param`, still under their Hugging Face names but for experts."""
        layer, _, name = param.removeprefix("layers.").partition(".")
        if not of_experts(name):
            yield from pieces(self.config, param, "model.", "lm_head.weight")
            return
        for piece in _expert_pieces(self.config, name):
            yield replace(piece, name=f"blk.{layer}.{piece.name}")

    def _fill(self, reader: TensorReader, threads: Executor, piece: Piece, array: np.ndarray) -> None:
        name = gguf_name(self.config, piece.name)
        order = self._row_order(piece.name)
        if len(self.file.tensors[name].shape) == 1:
            values = reader.tensor(name)
            values = values if order is None else values.reshape(-1, len(order))[:, order].reshape(-1)
            Piece(piece.name, piece.views).fill(array, values)  # Gemma's offset is in the file already
            return

        def fill(block: tuple[int, list[np.ndarray]]) -> None:
            start, (target,) = block
            rows = reader.rows(name, start, start + len(target))
            _assign(target, rows if order is None else rows[order])

        # A block is one head where rows must be put in order, so that each order is complete in it.
        list(threads.map(fill, blocks(piece, [array])))

    def _row_order(self, name: str) -> np.ndarray | None:
        """Which stored row of a head comes first, second, ...: undoes interleaved rotary pairs."""
        interleaved = self.file.metadata["general.architecture"] in INTERLEAVED
        if not interleaved or not name.rsplit(".", 1)[0].endswith(("q_proj", "k_proj")):
            return None
        return np.arange(self.config.head_dim).reshape(-1, 2).T.reshape(-1)


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
            name = gguf_name(config, piece.name)
            stored = file.tensors.get(name)
            if stored is None:
                raise file.fail(f"tensor {name!r} is missing")
            expected = piece.stored_shape(shape_only)
            if stored.shape != expected:
                raise file.fail(f"tensor {name!r} has shape {list(stored.shape)}, the metadata needs {list(expected)}")
            used.add(name)
    left = [name for name in file.tensors if name not in used]
    if left:
        raise file.fail(f"tensor {left[0]!r} is not a part of a {config.family} model with this metadata")


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
