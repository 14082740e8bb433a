"""GGUF files that llama.cpp's own converter wrote: the logits of transformers and of llama.cpp on the same weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from engine.errors import ModelError
from engine.model.config import ModelConfig
from engine.model.gguf_file import GgufFile, TensorReader, read_gguf
from engine.model.params import param_specs
from engine.model.rope import Context, make_rope
from engine.model.weights.gguf import GgufCheckpoint, open_gguf
from pallas_kernels.quantized import tree_bytes
from tests.model.gguf_files import close
from tests.model.models import relative_error
from tests.model.test_packed_gguf import check_equal, load_both, weights_in
from tests.oracle import naive_logits

FOLDER = Path(__file__).parent.parent / "fixtures" / "gguf"
NAMES = tuple(sorted(path.name for path in FOLDER.iterdir()))
TOLERANCE = 1e-4
Tensors = dict[str, np.ndarray]


def opened(name: str) -> GgufCheckpoint:
    return open_gguf(FOLDER / name / "model.gguf")


def weights(checkpoint: GgufCheckpoint) -> Tensors:
    return checkpoint.load(param_specs(checkpoint.config, np.dtype(np.float32)), lambda _, array: array)


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / name / "expected.npz"))


@functools.cache
def logits(name: str) -> list[np.ndarray]:
    return _logits(opened(name).config, name)


def _logits(config: ModelConfig, name: str) -> list[np.ndarray]:
    params = jax.device_put(weights(opened(name)))
    want = expected(name)
    texts = [[*want[f"prompt_{i}"].tolist(), *want[f"greedy_{i}"].tolist()] for i in range(2)]
    return [naive_logits(config, params, tokens) for tokens in texts]


# What is special in these the others have too, or only the config.
SELDOM = ("deepseek_v2", "granitehybrid_dense")


def kinds(*without: str) -> list[Any]:
    named = [name for name in NAMES if name not in without]
    return [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in named]


@pytest.mark.parametrize("name", kinds())
def test_logits_and_greedy_tokens_of_transformers(name: str) -> None:
    want = expected(name)
    for i, got in enumerate(logits(name)):
        assert relative_error(got[want[f"positions_{i}"]], want[f"logits_{i}"]) < TOLERANCE
        assert got[len(want[f"prompt_{i}"]) - 1 : -1].argmax(-1).tolist() == want[f"greedy_{i}"].tolist()


def apart_from_llama_cpp(name: str, got: list[np.ndarray]) -> float:
    """The largest difference of all logprobs, at its tokens for as long as they are transformers' as well."""
    want, apart = expected(name), 0.0
    for i, ours in enumerate(got):
        same = np.cumprod(want[f"llama_cpp_tokens_{i}"] == want[f"greedy_{i}"][: len(want[f"llama_cpp_tokens_{i}"])])
        count = min(int(same.sum()) + 1, len(same))
        ours = ours[len(want[f"prompt_{i}"]) - 1 :][:count].astype(np.float64)
        logprobs = ours - np.log(np.exp(ours).sum(-1, keepdims=True))
        apart = max(apart, float(np.abs(logprobs - want[f"llama_cpp_{i}"][:count]).max()))
    return apart


@pytest.mark.parametrize("name", kinds("deepseek_v2", "gpt_oss"))
def test_logprobs_of_llama_cpp(name: str) -> None:
    """It opens DeepSeek-V2 without a query rank only in the depths of the published models."""
    assert apart_from_llama_cpp(name, logits(name)) < TOLERANCE


def test_llama_cpp_rounds_the_ramp_of_gpt_oss() -> None:
    """YaRN's ramp ends between dimensions in the model, as transformers has it. Rounded, ours are its logprobs."""
    config = opened("gpt_oss").config
    fields = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    rope = make_rope(fields, config.head_dim, Context(512, 512))
    rounded = dataclasses.replace(config, layers=tuple(dataclasses.replace(s, rope=rope) for s in config.layers))
    assert apart_from_llama_cpp("gpt_oss", _logits(rounded, "gpt_oss")) < TOLERANCE
    assert apart_from_llama_cpp("gpt_oss", logits("gpt_oss")) > 100 * TOLERANCE


def test_mxfp4_stays_packed() -> None:
    both = load_both(opened("gpt_oss"))
    assert set(both.packings) == {f"layers.{i}.experts_{kind}" for i in range(2) for kind in ("gate_up", "down")}
    check_equal(both)
    name = "layers.0.experts_down"
    assert 2 * tree_bytes(both.packed[name]) * 8 == 17 * weights_in(both, name)  # 8.5 bits


def rewritten(name: str, path: Path, change: Callable[[Tensors], Tensors], **metadata: Any) -> GgufCheckpoint:
    """The fixture in float32 with other tensors, and metadata of the architecture (None: without the key)."""
    file = read_gguf(FOLDER / name / "model.gguf")
    arch = file.metadata["general.architecture"]
    changes = {f"{arch}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    writer = gguf.GGUFWriter(path, arch)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}  # fmt: skip
    for key, value in {**file.metadata, **changes}.items():
        if key.startswith(f"{arch}.") and value is not None:
            add[type(value)](key, value)
    for tensor, values in change(_tensors(file)).items():
        writer.add_tensor(tensor, np.ascontiguousarray(values))
    close(writer)
    return open_gguf(path)


def _tensors(file: GgufFile) -> Tensors:
    with TensorReader(file) as reader:
        return {name: reader.tensor(name) for name in file.tensors}


def check_same(one: GgufCheckpoint, other: GgufCheckpoint) -> None:
    assert one.config == other.config
    others = weights(other)
    for param, array in weights(one).items():
        np.testing.assert_array_equal(others[param], array, err_msg=param)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_an_older_file_has_keys_and_values_in_one(name: str, tmp_path: Path) -> None:
    """And a newer one may have gate and up of the experts in one."""
    found = opened(name)
    latent, heads = found.config.latent, found.config.num_q_heads
    assert latent is not None

    def change(tensors: Tensors) -> Tensors:
        for i in range(found.config.num_layers):
            k, v = (tensors.pop(f"blk.{i}.attn_{kind}_b.weight") for kind in "kv")
            both = np.concatenate([k.swapaxes(1, 2), v], axis=1)
            tensors[f"blk.{i}.attn_kv_b.weight"] = both.reshape(-1, latent.kv_rank)
        gate, up = (tensors.pop(f"blk.1.ffn_{kind}_exps.weight") for kind in ("gate", "up"))
        return {**tensors, "blk.1.ffn_gate_up_exps.weight": np.concatenate([gate, up], axis=1)}

    lengths = {"attention__key_length": latent.nope_dim + latent.rope_dim, "attention__key_length_mla": None,
               "attention__value_length": latent.value_dim, "attention__value_length_mla": None,
               "attention__head_count_kv": heads}  # fmt: skip
    check_same(found, rewritten(name, tmp_path / "model.gguf", change, **lengths))


def test_an_older_file_has_the_delta_rules_rows_by_heads(tmp_path: Path) -> None:
    found = opened("qwen3_next")
    rule = found.config.delta_rule
    assert rule is not None

    def change(tensors: Tensors) -> Tensors:
        both = np.concatenate([tensors.pop("blk.0.attn_qkv.weight"), tensors.pop("blk.0.attn_gate.weight")])
        keys, values = rule.key_heads * rule.key_dim, rule.value_heads * rule.value_dim
        parts = np.split(both, np.cumsum([keys, keys, values]))
        by_heads = np.concatenate([part.reshape(rule.key_heads, -1, both.shape[1]) for part in parts], axis=1)
        return {**tensors, "blk.0.ssm_in.weight": by_heads.reshape(both.shape)}

    changed = {"attention__recurrent_layers": None, "full_attention_interval": 2}
    check_same(found, rewritten("qwen3_next", tmp_path / "model.gguf", change, **changed))


def test_layers_for_speculation_are_passed_by(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {**tensors, "blk.2.nextn.enorm.weight": np.ones(32, np.float32)}

    path = tmp_path / "model.gguf"
    check_same(opened("deepseek_v3"), rewritten("deepseek_v3", path, change, block_count=3, nextn_predict_layers=1))
    with pytest.raises(ModelError, match=r"tensor 'blk\.2\.attn_norm\.weight' is missing"):
        rewritten("deepseek_v3", path, change, block_count=3)


@pytest.mark.parametrize(
    ("name", "key", "value", "error"),
    [
        ("deepseek_v3", "expert_gating_func", 4, r"expert_gating_func = 4 is not supported"),
        ("deepseek_v3", "expert_group_scale", 0.5, r"expert_group_scale = 0\.5 is not supported"),
        ("deepseek_v3", "expert_gating_func", 1, r"norm_topk_prob = True is not supported"),
        ("gpt_oss", "attention__sliding_window_pattern", 3, r"sliding_window_pattern must be 2"),
        ("granitehybrid", "attention__head_count_kv", [1, 2], r"head_count_kv differs between layers"),
        ("mamba2", "ssm__time_step_rank", 7, r"ssm\.inner_size 64 does not divide into ssm\.time_step_rank 7"),
        ("qwen3_next", "attention__recurrent_layers", [True], r"recurrent_layers must have an entry for each layer"),
    ],
)
def test_metadata_that_no_part_can_do_is_named(name: str, key: str, value: Any, error: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=error):
        rewritten(name, tmp_path / "model.gguf", lambda tensors: tensors, **{key: value})
