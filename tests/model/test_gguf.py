"""GGUF weights: the same arrays and the same config as the Hugging Face checkpoint they were made from."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from engine.errors import ModelError
from engine.model.config import ModelConfig
from engine.model.gguf_file import read_gguf
from engine.model.params import param_specs
from engine.model.weights.gguf import GgufCheckpoint, open_gguf
from tests.model.gguf_files import add_tensor, close, converted, write_fixture
from tests.model.models import NAMES, checkpoint, max_model_len


def load(opened: GgufCheckpoint, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return opened.load(param_specs(opened.config, np.dtype(dtype)), lambda _, array: array)


def hf_params(name: str) -> dict[str, np.ndarray]:
    opened = checkpoint(name)
    return opened.load(param_specs(opened.config, np.dtype(np.float32)), lambda _, array: array)


def _what_gguf_can_say(name: str, config: ModelConfig) -> ModelConfig:
    """The fixtures set some fields to unusual values for which GGUF has no key."""
    if name.startswith("gemma"):
        return dataclasses.replace(config, attention_scale=config.head_dim**-0.5)
    if name == "qwen2":
        return dataclasses.replace(config, layers=tuple(dataclasses.replace(s, window=None) for s in config.layers))
    if name == "smollm3":  # llama.cpp: every fourth layer has no rope, and no layer a window
        rope = config.layers[0].rope
        layers = tuple(dataclasses.replace(config.layers[0], rope=rope if i % 4 != 3 else None) for i in range(4))
        return dataclasses.replace(config, layers=layers)
    return config


def _numbers(config: ModelConfig) -> tuple[dict, np.ndarray]:
    """Everything but floats, and the floats: metadata keeps them in float32."""
    fields = dataclasses.asdict(config)
    layers = fields.pop("layers")
    floats = {key: fields.pop(key) for key in [k for k, v in fields.items() if isinstance(v, float)]}
    ropes = [[*(s["rope"]["inv_freq"]), s["rope"]["scale"]] if s["rope"] else [] for s in layers]
    fields["windows"] = [s["window"] for s in layers]
    fields["ropes"] = [len(rope) for rope in ropes]
    fields["floats"] = sorted(floats)
    return fields, np.array([floats[key] for key in sorted(floats)] + [x for rope in ropes for x in rope])


# Whose files llama.cpp's own converter wrote: test_gguf_converted.py.
CONVERTED = (
    "gpt_oss", "deepseek_v2", "deepseek_v3", "mamba2", "granitemoehybrid", "granitemoehybrid_dense", "qwen3_next",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CONVERTED])
def test_equals_the_hugging_face_checkpoint(name: str, tmp_path: Path) -> None:
    opened = open_gguf(write_fixture(name, tmp_path / "model.gguf"), max_model_len(name))
    exact, floats = _numbers(opened.config)
    expected_exact, expected_floats = _numbers(_what_gguf_can_say(name, checkpoint(name).config))
    if name == "mistral":
        assert expected_exact["family"] == "mistral"  # a window makes a Llama file a Mistral
    assert exact == expected_exact
    np.testing.assert_allclose(floats, expected_floats, rtol=1e-6)
    params, expected = load(opened), hf_params(name)
    assert list(params) == list(expected)
    for key, array in expected.items():
        np.testing.assert_array_equal(params[key], array, err_msg=key)
    assert opened.dtype == "float32" and opened.end_token_ids == (2,)


def test_a_wrong_permutation_would_be_seen(tmp_path: Path) -> None:
    """The fixtures' q rows differ from their permuted selves, so equality above means something."""
    file = read_gguf(write_fixture("llama", tmp_path / "model.gguf"))
    assert file.metadata["general.architecture"] == "llama"
    file.metadata["general.architecture"] = "qwen2"  # an architecture whose rows are left as they are
    params = load(dataclasses.replace(open_gguf(file.path), file=file))
    assert (params["layers.0.qkv"] != hf_params("llama")["layers.0.qkv"]).any()


KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_quantized_types(kind: Kind, tmp_path: Path) -> None:
    """Rows are permuted, never cut, so a quantized value is that of the unpermuted original."""
    opened = open_gguf(_wide_llama(tmp_path / "model.gguf", kind))
    assert opened.dtype == ("float32" if kind == Kind.F32 else "bfloat16")
    tensors, params = _wide_tensors(), load(opened)
    bfloat = load(opened, ml_dtypes.bfloat16)

    def stored(name: str) -> np.ndarray:
        values = tensors[name]
        return values if kind == Kind.F32 else gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)

    q = stored("model.layers.0.self_attn.q_proj.weight").reshape(2, 2, 16, 64)  # kv heads, group, head_dim, hidden
    np.testing.assert_array_equal(params["layers.0.qkv"][:, :, :2], q.transpose(3, 0, 1, 2))
    down = stored("model.layers.0.mlp.down_proj.weight").T
    np.testing.assert_array_equal(params["layers.0.down"], down)
    np.testing.assert_array_equal(bfloat["layers.0.down"], down.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(params["embed"], stored("model.embed_tokens.weight"))
    assert bfloat["layers.0.attn_norm"].dtype == np.float32


def _wide_tensors() -> dict[str, np.ndarray]:
    """One Llama layer whose rows hold whole quantization blocks."""
    rng = np.random.default_rng(5)
    layer = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
             "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
             "mlp.down_proj": (64, 96), "input_layernorm": (64,), "post_attention_layernorm": (64,)}  # fmt: skip
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (64, 64), "model.norm.weight": (64,)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _wide_llama(path: Path, kind: Kind, metadata: dict[str, int | str] | None = None, extra: str | None = None) -> Path:
    hf = {"num_attention_heads": 4, "num_key_value_heads": 2}
    writer = gguf.GGUFWriter(path, "llama")
    counts: dict[str, int | str] = {"block_count": 1, "context_length": 128, "embedding_length": 64,
                                    "feed_forward_length": 96, "attention.head_count": 4,
                                    "attention.head_count_kv": 2}  # fmt: skip
    for key, value in {**counts, **(metadata or {})}.items():
        if isinstance(value, int):
            writer.add_uint32(f"llama.{key}", value)
        else:
            writer.add_string(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, values in _wide_tensors().items():
        add_tensor(writer, *converted("llama", hf, name, values), kind)
    if extra is not None:
        writer.add_tensor(extra, np.ones(4, np.float32))
    close(writer)
    return path


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"architecture 'mamba' is not supported; known: llama.*olmo2"):
        open_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_weights_scale", 2),
        ("attention.clamp_kqv", 3),
        ("rope.scaling.type", "dynamic"),
        ("attention.value_length", 8),
    ],
)
def test_a_key_that_changes_the_results_is_named(key: str, value: int | str, tmp_path: Path) -> None:
    path = _wide_llama(tmp_path / "model.gguf", Kind.F32, {key: value})
    with pytest.raises(ModelError, match=rf"model\.gguf: llama\.{key}"):
        open_gguf(path)


def test_a_zero_key_is_no_feature(tmp_path: Path) -> None:
    assert open_gguf(_wide_llama(tmp_path / "model.gguf", Kind.F32, {"expert_count": 0})).config.family == "llama"


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    """Cut at any byte of the header and at some of the data: always a ModelError that names the file."""
    whole = _wide_llama(tmp_path / "model.gguf", Kind.Q8_0).read_bytes()
    cut = tmp_path / "cut.gguf"
    lengths = [*range(0, 2500, 7), *range(2500, len(whole) - 32, 4001)]
    for length in lengths:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            open_gguf(cut)


def test_every_lie_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Overwrite 8 bytes anywhere in the header with huge or odd numbers: ModelError, or a file that still loads."""
    path = _wide_llama(tmp_path / "model.gguf", Kind.Q8_0)
    whole, lying = path.read_bytes(), tmp_path / "lying.gguf"
    header_bytes = min(info.offset for info in read_gguf(path).tensors.values())
    num_tried = num_errors = 0
    for value in (2**63 - 1, 2**64 - 1, 2**33, 0):
        for place in range(4, header_bytes - 8, 5):
            changed = bytearray(whole)
            changed[place : place + 8] = struct.pack("<Q", value)
            lying.write_bytes(changed)
            try:
                open_gguf(lying)
            except ModelError as error:
                assert "lying.gguf" in str(error)
                num_errors += 1
            num_tried += 1
    assert num_errors > num_tried / 2  # most places are a name, a length, a type or a number that matters


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    file = read_gguf(write_fixture("llama", tmp_path / "model.gguf"))
    info = file.tensors["blk.1.ffn_up.weight"]
    raw = file.path.read_bytes()
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(raw.replace(info.name.encode(), b"blk.1.ffn_xx.weight"))
    with pytest.raises(ModelError, match=r"tensor 'blk\.1\.ffn_up\.weight' is missing"):
        open_gguf(renamed)


def test_an_extra_tensor_is_named(tmp_path: Path) -> None:
    path = _wide_llama(tmp_path / "model.gguf", Kind.F32, extra="blk.0.attn_sinks.weight")
    with pytest.raises(ModelError, match=r"tensor 'blk\.0\.attn_sinks\.weight' is not a part of a llama model"):
        open_gguf(path)


@pytest.mark.model
def test_the_real_file(default_model_path: Path) -> None:
    """Some tensors of SmolLM2 against the gguf library's own reader, in the layout that rotates halves."""
    opened = open_gguf(default_model_path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(default_model_path).tensors}

    def library(name: str) -> np.ndarray:
        return gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)

    wanted = ("embed", "layers.3.qkv", "layers.29.down", "final_norm")
    specs = param_specs(opened.config, np.dtype(np.float32))
    params = opened.load({name: specs[name] for name in wanted}, lambda _, array: array)
    q = library("blk.3.attn_q.weight").reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(3, 3, 64, 576)
    np.testing.assert_array_equal(params["layers.3.qkv"][:, :, :3], q.transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(params["layers.29.down"], library("blk.29.ffn_down.weight").T)
    np.testing.assert_array_equal(params["embed"], library("token_embd.weight"))
    np.testing.assert_array_equal(params["final_norm"], library("output_norm.weight"))
    assert opened.config.num_layers == 30 and opened.config.tie_embeddings and opened.end_token_ids == (2,)
