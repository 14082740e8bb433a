"""The default model's weights as other engines read them: GGUF files of other types and a Hugging Face folder.

Every engine then computes with the same numbers: each quantized tensor is expanded once, to
float32, and rounded once, to bfloat16. Norm weights stay float32 in the GGUF, as llama.cpp wants them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

_HF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_HF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def dequantized(tensor: Any) -> np.ndarray:
    """float32 [rows, columns], in the order of the file."""
    return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


FILE_TYPES = {
    "bf16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
    "f16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
    "f32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
    "q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0),
}


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """Copies `source` with every matrix as one of FILE_TYPES. Writes beside the target first, then renames."""
    file_type, tensor_type = FILE_TYPES[kind]
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, architecture)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        value_type, *inner = entry.types
        writer.add_key_value(name, entry.contents(), value_type, inner[0] if inner else None)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = dequantized(tensor)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            if kind != "bf16":  # all start from the same rounded numbers
                values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
            writer.add_tensor(tensor.name, gguf.quantize(values, tensor_type), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)


def write_hf_folder(source: Path, target: Path) -> None:
    """A llama checkpoint that transformers opens: config.json and one safetensors file in bfloat16."""
    reader = gguf.GGUFReader(source)
    if reader.fields["general.architecture"].contents() != "llama":
        raise ValueError(f"{source}: only llama checkpoints are written as a Hugging Face folder")

    def number(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads = {"attn_q": number("attention.head_count"), "attn_k": number("attention.head_count_kv")}
    tensors = {}
    for tensor in reader.tensors:
        values = dequantized(tensor)
        if tensor.name in _HF_NAMES:
            name = _HF_NAMES[tensor.name]
        else:
            _, layer, part, kind = tensor.name.split(".")
            if part in heads:
                values = _halves_layout(values, heads[part])
            name = f"model.layers.{layer}.{_HF_LAYER_NAMES[part]}.{kind}"
        tensors[name] = values.astype(ml_dtypes.bfloat16)
    tied = "lm_head.weight" not in tensors
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base"),
        "vocab_size": number("vocab_size"),
        "bos_token_id": reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        "eos_token_id": reader.fields["tokenizer.ggml.eos_token_id"].contents(),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2))


def _halves_layout(values: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each head's rotary pairs; this puts them back."""
    rows, columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
