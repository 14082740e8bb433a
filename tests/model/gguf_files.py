"""The tiny Hugging Face checkpoints of the fixtures, written as GGUF the way llama.cpp's converter does."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

from engine.model.weights.hf import read_json
from tests.model.models import FOLDER

F32 = gguf.GGMLQuantizationType.F32
PERMUTED = {"llama", "mistral", "mixtral", "smollm3", "granite", "granitemoe"}
LAYER_NAMES = {
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
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.output_linear": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def hf_tensors(name: str) -> dict[str, np.ndarray]:
    """float32 arrays under their Hugging Face names."""
    found = {}
    for path in sorted((FOLDER / name).glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            found.update({key: file.get_tensor(key).astype(np.float32) for key in file.keys()})  # noqa: SIM118
    return found


def write_fixture(name: str, path: Path, kind: gguf.GGMLQuantizationType = F32, **metadata: Any) -> Path:
    """`name` of tests/fixtures/models as a GGUF file; `metadata` adds keys of the architecture."""
    hf = json.loads((FOLDER / name / "config.json").read_text())
    family = hf["model_type"]
    arch = str({"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen2_moe": "qwen2moe",
                "qwen3_moe": "qwen3moe"}.get(family, family))  # fmt: skip
    writer = gguf.GGUFWriter(path, arch)
    _add_metadata(writer, arch, hf, metadata)
    for tensor, values in merged_experts(hf_tensors(name)).items():
        add_tensor(writer, *converted(family, hf, tensor, values), kind)
    for tensor, values in _rope_tensors(hf).items():
        writer.add_tensor(tensor, values)
    close(writer)
    return path


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    if values.ndim == 1 or kind == F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def converted(family: str, hf: dict[str, Any], name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    stem, ending = name.rsplit(".", 1)
    if family.startswith("gemma") and name.endswith("norm.weight"):
        values = values + 1
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{ending}", values
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    if rest == "post_attention_layernorm":
        after = family.startswith("gemma") or family == "olmo2"
        return f"blk.{layer}.{'post_attention_norm' if after else 'ffn_norm'}.{ending}", values
    if family in PERMUTED and rest.endswith(("q_proj", "k_proj")):
        heads = hf["num_attention_heads"] if rest.endswith("q_proj") else hf["num_key_value_heads"]
        values = interleaved(values, heads)
    if rest == "mlp.shared_expert_gate":
        values = values.reshape(-1)
    return f"blk.{layer}.{LAYER_NAMES.get(rest, rest)}.{ending}", np.ascontiguousarray(values)


def merged_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts' matrices stacked, [experts, out, in], under the names of GGUF's; Granite's cut in gate and up."""
    out: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, values in tensors.items():  # sorted names: experts 0 to 9 are in order
        layer = ".".join(name.split(".")[:3])
        expert = re.search(r"\.experts\.(\d+)\.(\w+)\.weight$", name)
        if expert:
            kind = {"w1": "gate", "w3": "up", "w2": "down"}.get(expert[2], expert[2].removesuffix("_proj"))
            stack = stacks.setdefault(f"{layer}.ffn_{kind}_exps.weight", [])
            assert int(expert[1]) == len(stack)
            stack.append(values)
        elif name.endswith("input_linear.weight"):
            gate, up = np.split(values, 2, axis=1)
            out |= {f"{layer}.ffn_gate_exps.weight": gate, f"{layer}.ffn_up_exps.weight": up}
        else:
            out[name] = values
    return out | {name: np.stack(stack) for name, stack in stacks.items()}


def interleaved(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rotary halves of each head, put side by side."""
    halves = values.reshape(num_heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _rope_tensors(hf: dict[str, Any]) -> dict[str, np.ndarray]:
    rope = hf["rope_parameters"]
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    original, low, high = (rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"])
    factors = []
    for i in range(hf["head_dim"] // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / hf["head_dim"])
        blend = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - blend) / rope["factor"] + blend))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def _add_metadata(writer: gguf.GGUFWriter, arch: str, hf: dict[str, Any], extra: dict[str, Any]) -> None:
    rope = hf["rope_parameters"]
    base = rope.get("full_attention", rope)
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    numbers: dict[str, Any] = {
        "block_count": hf["num_hidden_layers"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]),
        "rope.freq_base": float(base["rope_theta"]),
        "rope.dimension_count": int(head_dim * hf.get("partial_rotary_factor", 1.0)),
        "vocab_size": hf["vocab_size"],
    }
    if base["rope_type"] in ("linear", "yarn"):
        numbers |= {"rope.scaling.type": base["rope_type"], "rope.scaling.factor": float(base["factor"])}
    if "original_max_position_embeddings" in base and base["rope_type"] != "llama3":
        numbers["rope.scaling.original_context_length"] = base["original_max_position_embeddings"]
    if base["rope_type"] == "longrope":
        factor = hf["max_position_embeddings"] / base["original_max_position_embeddings"]
        scale = math.sqrt(1 + math.log(factor) / math.log(base["original_max_position_embeddings"]))
        numbers["rope.scaling.attn_factor"] = scale
    if hf.get("sliding_window") and arch in ("llama", "phi3", "gemma2", "gemma3"):
        numbers["attention.sliding_window"] = hf["sliding_window"]
    renamed = {"attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
               "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
               "attn_logit_softcapping": "attn_logit_softcapping",
               "final_logit_softcapping": "final_logit_softcapping"}  # fmt: skip
    numbers |= {new: float(hf[old]) for old, new in renamed.items() if hf.get(old) is not None}
    if arch == "gemma3":
        numbers["attention.sliding_window_pattern"] = hf["sliding_window_pattern"]
    experts = {"expert_count": hf.get("num_experts") or hf.get("num_local_experts"),
               "expert_used_count": hf.get("num_experts_per_tok"),
               "expert_feed_forward_length": hf.get("moe_intermediate_size"),
               "expert_shared_feed_forward_length": hf.get("shared_expert_intermediate_size")}  # fmt: skip
    numbers |= {key: value for key, value in experts.items() if value is not None}
    add: dict[type, Callable] = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in {**numbers, **extra}.items():
        add[type(value)](f"{arch}.{key}", value)
    writer.add_uint32("tokenizer.ggml.eos_token_id", read_json(FOLDER / "llama" / "config.json")["eos_token_id"])
