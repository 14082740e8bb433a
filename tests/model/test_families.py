"""config.json -> ModelConfig: both spellings, defaults of checkpoints on the hub, and keys that must be refused."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import ModelError
from engine.model.families import FAMILIES, model_config
from tests.model.models import NAMES, hf_config, max_model_len


@pytest.mark.parametrize("name", NAMES)
def test_old_and_new_spelling_are_equal(name: str) -> None:
    new, old = hf_config(name), hf_config(name, "config.old.json")
    assert "rope_parameters" in new or model_config(new).num_recurrent_layers
    assert "rope_parameters" not in old and "torch_dtype" not in new
    length = max_model_len(name)
    assert model_config(new, length) == model_config(old, length)


def test_every_family_has_a_fixture() -> None:
    covered = {hf_config(name)["model_type"] for name in NAMES} | {"gemma3"}  # gemma3 wraps gemma3_text
    assert covered == set(FAMILIES)


def llama(**changes: Any) -> dict[str, Any]:
    return {**hf_config("llama"), **changes}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; known: llama, mistral"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": [["x"]]}, "architectures"),
        ({"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
        ({"sliding_window": 128}, "sliding_window = 128"),
        ({"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"some_new_multiplier": 0}, "some_new_multiplier"),
        ({"per_layer_config": {"1": {"hidden_size": 3}}}, "per_layer_config"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": [1.0]}, "rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "both rope_parameters and rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": "32"}, "hidden_size = '32'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"attention_bias": 1}, "attention_bias"),
    ],
)
def test_what_cannot_be_honoured_is_named(changes: dict, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        model_config(llama(**changes))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ModelError, match=key):
        model_config({k: v for k, v in llama().items() if k != key})


@pytest.mark.parametrize(
    "changes",
    [
        {"unknown_flag": False, "unknown_option": None, "unknown_list": []},
        {"attention_dropout": 0.1, "initializer_range": 7, "torch_dtype": "float64", "use_cache": False},
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
        {"temperature": 0.6, "auto_map": {"AutoModel": "code.Model"}},
    ],
)
def test_keys_without_effect_pass(changes: dict) -> None:
    assert model_config(llama(**changes)) == model_config(llama())


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"use_sliding_window": False}, "use_sliding_window"),
        ("qwen2", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"mlp_bias": True}, "mlp_bias"),
        ("mistral", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"sliding_window_size": 99}, "sliding_window_size"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters"),
        ("phi3", {"full_attn_mod": 2}, "full_attn_mod"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
        ("granite", {"logits_scaling": 0}, "logits_scaling"),
    ],
)
def test_keys_of_the_wrong_family_are_named(name: str, changes: dict, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        model_config({**hf_config(name), **changes})


def test_gemma3_inside_a_multimodal_config() -> None:
    text = hf_config("gemma3_text")
    outer = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "vision_config": {"hidden_size": 1152},
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "text_config": text,
    }
    assert model_config(outer) == model_config(text)
    with pytest.raises(ModelError, match="audio_config"):
        model_config({**outer, "audio_config": {"hidden_size": 3}})
    with pytest.raises(ModelError, match="text_config"):
        model_config({**outer, "text_config": None})


# The keys of config.json files as published, where they lean on defaults or say unusual things.
HUB = {
    "gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 1024},
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": None, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
        "torch_dtype": "bfloat16", "use_cache": False, "use_sliding_window": False, "vocab_size": 128256,
    },
    "Phi-4-mini-instruct": {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0, "full_attn_mod": 1,
        "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "interpolate_factor": 1,
        "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3",
        "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05, "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48,
                                                "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064,
    },
    "Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "gemma-2-2b-it": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
    },
}  # fmt: skip


def test_published_configs() -> None:
    gemma3 = model_config(HUB["gemma-3-4b-it"])
    assert (gemma3.vocab_size, gemma3.num_q_heads, gemma3.num_kv_heads, gemma3.head_dim) == (262208, 8, 4, 256)
    assert gemma3.max_position == 131072
    assert gemma3.tie_embeddings
    assert [s.window for s in gemma3.layers[:7]] == [1024] * 5 + [None, 1024]
    local, full = gemma3.layers[0].rope, gemma3.layers[5].rope
    assert local is not None
    assert full is not None
    assert local.inv_freq[1] == pytest.approx(1e4 ** (-1 / 128))
    assert full.inv_freq[1] == pytest.approx(1e6 ** (-1 / 128) / 8)

    smollm3 = model_config(HUB["SmolLM3-3B"])
    assert smollm3.tie_embeddings
    assert [s.rope is None for s in smollm3.layers[:4]] == [False, False, False, True]

    qwen2 = model_config(HUB["Qwen2.5-0.5B-Instruct"])
    assert qwen2.qkv_bias
    assert not qwen2.output_bias
    assert {s.window for s in qwen2.layers} == {None}

    gemma2 = model_config(HUB["gemma-2-2b-it"])
    assert [s.window for s in gemma2.layers[:3]] == [4096, None, 4096]
    assert gemma2.tie_embeddings


def test_longrope_takes_its_factors_from_max_model_len() -> None:
    def first(max_model_len: int | None) -> float:
        rope = model_config(HUB["Phi-4-mini-instruct"], max_model_len).layers[0].rope
        assert rope is not None
        assert len(rope.inv_freq) == 48  # three quarters of head_dim 128
        return rope.inv_freq[0]

    assert first(4096) == 1.0
    assert first(4097) == 0.5
    assert first(None) == 0.5
    old_name = {**HUB["Phi-4-mini-instruct"]}
    old_name["rope_scaling"] = {**old_name["rope_scaling"], "type": "su"}
    assert model_config(old_name) == model_config(HUB["Phi-4-mini-instruct"])
