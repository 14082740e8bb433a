"""Quantized Hugging Face folders kept packed: the format's numbers to the bit, its logits, and the promised bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from engine.errors import ModelError
from engine.model.packing import Packing
from engine.model.params import param_specs
from engine.model.weights import open_checkpoint
from pallas_kernels.quantized import Quantized, tree_bytes
from tests.model.models import relative_error
from tests.model.quantized_folders import (
    Linear,
    awq,
    compressed_int8,
    compressed_packed,
    float8,
    gptq,
    requantize_fixture,
    write_folder,
    write_gpt_oss,
)
from tests.model.test_packed_gguf import FLOAT32, Both, by_hand, load_both
from tests.oracle import naive_logits

MATRICES = ("qkv", "o", "gate_up", "down")
Config = dict[str, Any]


def gptq_config(bits: int, group: int, **changes: Any) -> Config:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True,
            "damp_percent": 0.01, **changes}  # fmt: skip


def awq_config(group: int, **changes: Any) -> Config:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", **changes}


def compressed_config(form: str, weights: Config, activations: Config | None = None, **changes: Any) -> Config:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "quantization_status": "compressed", "kv_cache_scheme": None, **changes}  # fmt: skip


def int_weights(bits: int, **changes: Any) -> Config:
    strategy = "group" if "group_size" in changes else "channel"
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False, **changes}


FLOAT_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TOKEN_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
TOKEN_FLOAT8 = {**TOKEN_INT8, "type": "float"}
BF16 = jax.numpy.bfloat16

# name -> (quantization_config, how a linear layer is written, packing, bits a weight without scales of a whole column)
EXACT: dict[str, tuple[Config, Linear, Packing, float]] = {
    "gptq 128": (gptq_config(4, 128), gptq(4, 128, sym=True), Packing("int4", 128), 4.25),
    "gptq 32 v2": (
        gptq_config(4, 32, checkpoint_format="gptq_v2"), gptq(4, 32, sym=True, version=2), Packing("int4", 32), 5),
    "gptq 64 asym": (
        gptq_config(4, 64, sym=False), gptq(4, 64, sym=False), Packing("int4", 64, symmetric=False), 5),
    "gptq a column": (gptq_config(4, -1), gptq(4, -1, sym=True), Packing("int4"), 4),
    "gptq act-order, one group": (
        gptq_config(4, -1, desc_act=True), gptq(4, -1, sym=True, order=True), Packing("int4"), 4),
    "gptq act-order that is none": (
        gptq_config(4, 128, desc_act=True), gptq(4, 128, sym=True), Packing("int4", 128), 4.25),
    "gptq 2 bits": (gptq_config(2, 64), gptq(2, 64, sym=True), Packing("int4", 64), 4.5),
    "gptq 8 bits": (gptq_config(8, 128), gptq(8, 128, sym=True), Packing("int8", 128), 8.25),
    "gptq 8 bits asym": (
        gptq_config(8, 32, sym=False), gptq(8, 32, sym=False), Packing("int8", 32, symmetric=False), 10),
    "awq 128": (awq_config(128), awq(128), Packing("int4", 128, symmetric=False), 4.5),
    "awq 32": (awq_config(32), awq(32), Packing("int4", 32, symmetric=False), 6),
    "compressed int4": (
        compressed_config("pack-quantized", int_weights(4, group_size=128)), compressed_packed(4, 128, symmetric=True),
        Packing("int4", 128, scale_dtype="bfloat16"), 4.125),
    "compressed int4 asym": (
        compressed_config("pack-quantized", int_weights(4, group_size=32, symmetric=False)),
        compressed_packed(4, 32, symmetric=False), Packing("int4", 32, symmetric=False), 6),
    "compressed int4 a column": (
        compressed_config("pack-quantized", int_weights(4)), compressed_packed(4, None, symmetric=True),
        Packing("int4"), 4),
    "compressed int8 packed": (
        compressed_config("pack-quantized", int_weights(8, group_size=64)), compressed_packed(8, 64, symmetric=True),
        Packing("int8", 64, scale_dtype="bfloat16"), 8.25),
    "compressed w8a16": (compressed_config("int-quantized", int_weights(8)), compressed_int8(), Packing("int8"), 8),
    "compressed float8 a tensor": (
        compressed_config("float-quantized", {**FLOAT_WEIGHTS, "strategy": "tensor"}),
        float8("weight_scale", per="one"), Packing("float8_e4m3fn"), 8),
    "fp8 blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"},
        float8("weight_scale_inv", block=(128, 128)), Packing("float8_e4m3fn", 128), 8.25),
    "fp8 blocks that do not divide": (
        {"quant_method": "fp8", "weight_block_size": [80, 160]}, float8("weight_scale_inv", block=(80, 160)),
        Packing("float8_e4m3fn", 32), 9),
}  # fmt: skip
DYNAMIC: dict[str, tuple[Config, Linear, Packing, str]] = {
    "compressed w8a8": (
        compressed_config("int-quantized", int_weights(8), TOKEN_INT8), compressed_int8(),
        Packing("int8", activations="dynamic"), ""),
    "compressed w8a8 static": (
        compressed_config("int-quantized", {**int_weights(8), "strategy": "tensor"},
                          {**TOKEN_INT8, "dynamic": False, "strategy": "tensor"}),
        compressed_int8(per="tensor", static=True), Packing("int8", activations="dynamic"), "static input scales"),
    "compressed float8": (
        compressed_config("float-quantized", FLOAT_WEIGHTS, TOKEN_FLOAT8),
        float8("weight_scale", per="channel", dtype=BF16), Packing("float8_e4m3fn", activations="dynamic"), ""),
    "fp8 static": (
        {"quant_method": "fp8", "activation_scheme": "static"}, float8("weight_scale", static=True),
        Packing("float8_e4m3fn", activations="dynamic"), "static input scales"),
    "fp8 a tensor": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"}, float8("weight_scale_inv"),
        Packing("float8_e4m3fn", activations="dynamic"), ""),
}  # fmt: skip


def load_twins(folder: Path) -> Both:
    """The folder's parameters, dequantized and packed; the former are the twin's to the bit."""
    both, twin = load_both(open_checkpoint(folder)), open_checkpoint(folder.with_name(f"{folder.name}-float"))
    for name, array in twin.load(param_specs(twin.config, FLOAT32), lambda _, array: array).items():
        np.testing.assert_array_equal(both.wide[name], array, err_msg=name)
    return both


def check_weights(both: Both) -> None:
    for name in both.packings:
        np.testing.assert_array_equal(by_hand(both.packed[name]).reshape(-1), both.wide[name].reshape(-1), err_msg=name)


def check_logits(both: Both, tolerance: float) -> None:
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, both.opened.config.vocab_size, 40)]
    want = naive_logits(both.opened.config, both.wide, tokens)
    error = relative_error(naive_logits(both.opened.config, both.packed, tokens), want)
    assert np.isfinite(want).all()
    assert error < tolerance, error


# One of each format; a program is compiled for each, so the rest are slow tests.
QUICK = ("gptq 64 asym", "awq 128", "compressed int4", "fp8 blocks", "compressed w8a8", "fp8 static")


def named(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", EXACT)
def test_kept_packed_without_loss(name: str, tmp_path: Path) -> None:
    config, linear, packing, bits = EXACT[name]
    both = load_twins(write_folder(tmp_path / "model", config, linear))
    assert both.packings == {f"layers.0.{matrix}": packing for matrix in MATRICES}
    for key in both.packings:
        weight, columns = both.packed[key], both.packed[key].shape[1]
        a_column = 4 * columns if packing.group is None else 0
        assert tree_bytes(weight) == bits * both.wide[key].size / 8 + a_column
    check_weights(both)


@pytest.mark.parametrize("name", named(EXACT))
def test_logits(name: str, tmp_path: Path) -> None:
    config, linear, _, _ = EXACT[name]
    check_logits(load_twins(write_folder(tmp_path / "model", config, linear)), 1e-4)


@pytest.mark.parametrize("name", named(DYNAMIC))
def test_rounded_activations(name: str, tmp_path: Path) -> None:
    """The weights are exact; rows of x are rounded to 8 bits, which moves the logits by a few percent at most."""
    config, linear, packing, reason = DYNAMIC[name]
    both = load_twins(write_folder(tmp_path / "model", config, linear))
    assert both.packings == {f"layers.0.{matrix}": packing for matrix in MATRICES}
    check_weights(both)
    check_logits(both, 0.1)
    stored = both.opened.stored(param_specs(both.opened.config, FLOAT32))
    assert all(reason in weight.reason and bool(reason) == bool(weight.reason) for weight in stored.values())


@pytest.mark.parametrize(
    ("config", "linear", "reason"),
    [
        (gptq_config(4, 32, desc_act=True), gptq(4, 32, sym=True, order=True), "act-order"),
        (gptq_config(4, 32, desc_act=True, sym=False), gptq(4, 32, sym=False, order=True), "act-order"),
        (gptq_config(4, 32, sym=False), gptq(4, 32, sym=False, scale_dtype=np.float32), "float32 scales"),
        (compressed_config("pack-quantized", int_weights(4, group_size=128, actorder="group")),
         compressed_packed(4, 128, symmetric=True, order=True), "act-order"),
    ],
    ids=["gptq act-order", "gptq act-order asym", "float32 scales", "compressed act-order"],
)  # fmt: skip
def test_what_cannot_stay_packed_is_dequantized_and_said(
    config: Config, linear: Linear, reason: str, tmp_path: Path
) -> None:
    both = load_twins(write_folder(tmp_path / "model", config, linear))  # compares the dequantized weights
    assert not both.packings
    stored = both.opened.stored(param_specs(both.opened.config, FLOAT32))
    assert len(stored) == 4
    assert all(reason in weight.reason for weight in stored.values())


EXPERTS, MLP, SHARED = {"experts_gate_up", "experts_down"}, {"gate_up", "down"}, {"shared_gate_up", "shared_down"}
PACKABLE = {
    "mixtral": {"qkv", "o"} | EXPERTS,
    "deepseek_v3": {"q_a", "q", "kv_a", "o"} | MLP | SHARED | EXPERTS,
    "granitemoehybrid_dense": {"qkv", "o", "ssm_in", "ssm_out"},
    "qwen3_next": {"qkv", "attn_gate", "o", "delta_in", "delta_out"} | MLP | SHARED | EXPERTS,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "deepseek_v3" else [pytest.mark.slow]) for name in PACKABLE]
)
def test_every_kind_of_layer_in_float8_blocks(name: str, tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    linear = float8("weight_scale_inv", block=(16, 16))
    both = load_twins(requantize_fixture(name, tmp_path / "model", config, linear))
    assert {key.split(".")[-1] for key in both.packings} == PACKABLE[name]
    check_weights(both)
    check_logits(both, 1e-4)


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    both = load_twins(write_gpt_oss(tmp_path / "model"))
    layers = range(both.opened.config.num_layers)
    groups = {"experts_gate_up": None, "experts_down": 32}  # a row of gate_up is one block
    assert both.packings == {
        f"layers.{i}.{name}": Packing("int8", group, scale_dtype="bfloat16")
        for i in layers
        for name, group in groups.items()
    }
    for key in both.packings:
        assert tree_bytes(both.packed[key]) == 8.5 * both.wide[key].size / 8
    check_weights(both)
    check_logits(both, 1e-4)


def test_layers_that_stay_float(tmp_path: Path) -> None:
    config, linear, packing, _ = EXACT["awq 128"]
    config = {**config, "modules_to_not_convert": ["down_proj", "v_proj"]}
    floats = ("self_attn.v_proj", "mlp.down_proj")
    both = load_twins(write_folder(tmp_path / "model", config, linear, floats))
    assert both.packings == {"layers.0.o": packing, "layers.0.gate_up": packing}
    check_weights(both)
    check_logits(both, 1e-4)
    stored = both.opened.stored(param_specs(both.opened.config, FLOAT32))
    assert set(stored) == {"layers.0.qkv", "layers.0.o", "layers.0.gate_up"}
    assert stored["layers.0.qkv"].reason == "a part of it is stored as float"


def test_a_wrong_nibble_would_be_seen(tmp_path: Path) -> None:
    config, linear, _, _ = EXACT["gptq 128"]
    both = load_twins(write_folder(tmp_path / "model", config, linear))
    down = both.packed["layers.0.down"]
    values = np.array(down.values)
    values[0, 0] ^= 1
    both.packed["layers.0.down"] = Quantized(jax.device_put(values), down.scales, down.offsets, down.format)
    with pytest.raises(AssertionError, match=r"layers\.0\.down"):
        check_weights(both)


REFUSED: list[tuple[Config, str]] = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method = 'bitsandbytes'.*known: gptq, awq, fp8"),
    ({"bits": 4}, "quant_method = None"),
    (gptq_config(3, 128), "bits = 3"),
    (gptq_config(4, 31), r"group_size = 31"),
    (gptq_config(4, 128, checkpoint_format="marlin"), "checkpoint_format = 'marlin'"),
    (gptq_config(4, 128, dynamic={"-:lm_head": {}}), "dynamic = "),
    (gptq_config(4, 128, sym="yes"), "sym = 'yes'"),
    (awq_config(128, version="gemv"), "version = 'gemv'"),
    (awq_config(128, zero_point=False), "zero_point = False"),
    ({"quant_method": "fp8", "fmt": "e3m4"}, "fmt = 'e3m4'"),
    ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size = 128"),
    (compressed_config("nvfp4-pack-quantized", int_weights(4)), "format = 'nvfp4-pack-quantized'"),
    (compressed_config("int-quantized", int_weights(6)), r"config_groups\.group_0\.weights\.num_bits = 6"),
    (compressed_config("int-quantized", int_weights(8), kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    (compressed_config("int-quantized", int_weights(8, rounding="up")), "weights.rounding = 'up'"),
    (compressed_config("int-quantized", int_weights(8), config_groups={}), "config_groups = {}"),
    ([4], "must be an object"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("config", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_is_not_supported_is_named(config: Config, named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: quantization_config.*{named}"):
        open_checkpoint(write_folder(tmp_path / "model", config, gptq(4, 128, sym=True)))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    linear = gptq(4, 128, sym=True)
    folder = write_folder(tmp_path / "model", gptq_config(4, 128), linear)
    set_config(folder, gptq_config(4, 64))
    with pytest.raises(ModelError, match=r"q_proj\.qzeros has shape \[2, 32\].*quantization_config need \[4, 32\]"):
        open_checkpoint(folder)
    set_config(folder, None)
    with pytest.raises(ModelError, match=r"q_proj\.weight is missing"):
        open_checkpoint(folder)
    set_config(folder, gptq_config(4, 128))
    opened = open_checkpoint(folder)
    asymmetric = write_folder(tmp_path / "asymmetric", gptq_config(4, 128), gptq(4, 128, sym=False))
    with pytest.raises(ModelError, match=r"q_proj\.weight: sym = true, but not every zero point is 8"):
        open_checkpoint(asymmetric).load(param_specs(opened.config, FLOAT32), lambda _, array: array)


def test_a_float8_folder_without_its_config(tmp_path: Path) -> None:
    config, linear, _, _ = EXACT["fp8 blocks"]
    folder = write_folder(tmp_path / "model", config, linear)
    set_config(folder, None)
    with pytest.raises(ModelError, match=r"q_proj\.weight has dtype F8_E4M3; supported: BF16"):
        open_checkpoint(folder)


def set_config(folder: Path, quantization: Config | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
