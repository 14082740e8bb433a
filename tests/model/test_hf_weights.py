"""Safetensors folders: layout of what is loaded, and every way in which files can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from engine.errors import ModelError
from engine.model.params import param_specs
from engine.model.weights import open_checkpoint, random_params
from engine.model.weights.hf import read_header
from tests.model.models import FOLDER, checkpoint, hf_config

BF16 = np.dtype(ml_dtypes.bfloat16)
Tensors = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the llama fixture to break."""
    shutil.copytree(FOLDER / "llama", tmp_path / "model")
    return tmp_path / "model"


def load(path: Path, dtype: Any = np.float32) -> Tensors:
    opened = open_checkpoint(path)
    return opened.load(param_specs(opened.config, np.dtype(dtype)), lambda _, array: array)


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_projections_are_grouped_by_kv_head() -> None:
    stored = load_file(FOLDER / "llama" / "model.safetensors")
    got = load(FOLDER / "llama", BF16)
    config = checkpoint("llama").config
    group, dim = config.q_per_kv, config.head_dim
    heads = {name: stored[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"}
    for kv in range(config.num_kv_heads):
        for g in range(group):
            rows = slice((kv * group + g) * dim, (kv * group + g + 1) * dim)
            np.testing.assert_array_equal(got["layers.1.qkv"][:, kv, g], heads["q"][rows].T)
            o = stored["model.layers.1.self_attn.o_proj.weight"][:, rows]
            np.testing.assert_array_equal(got["layers.1.o"][kv, g], o.T)
        rows = slice(kv * dim, (kv + 1) * dim)
        np.testing.assert_array_equal(got["layers.1.qkv"][:, kv, group], heads["k"][rows].T)
        np.testing.assert_array_equal(got["layers.1.qkv"][:, kv, group + 1], heads["v"][rows].T)
    np.testing.assert_array_equal(
        got["layers.1.gate_up"][:, :, 1].reshape(len(got["layers.1.gate_up"]), -1),
        stored["model.layers.1.mlp.up_proj.weight"].T,
    )


@pytest.mark.parametrize("name", ["llama", "llama_bias", "mistral", "gemma2"])  # stored bf16, f32, f16, 1 + w
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
def test_shapes_and_dtypes_are_those_of_the_specs(name: str, dtype: np.dtype) -> None:
    specs = param_specs(checkpoint(name).config, dtype)
    got = load(FOLDER / name, dtype)
    assert list(got) == list(specs)
    for key, spec in specs.items():
        assert (got[key].shape, got[key].dtype) == (spec.shape, spec.dtype)
        assert key.endswith("norm") <= (got[key].dtype == np.float32)


def test_native_dtype_and_end_tokens(folder: Path) -> None:
    assert checkpoint("llama").dtype == "bfloat16"
    assert checkpoint("mistral").dtype == "bfloat16"  # float16 is served as bfloat16
    assert checkpoint("llama_bias").dtype == "float32"
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert open_checkpoint(folder).end_token_ids == (7, 9)
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(folder).end_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id .*</s>"):
        open_checkpoint(folder)


def test_one_parameter_is_in_flight() -> None:
    """`put` sees the parameters in order, each in memory of its own that no later one reuses."""
    seen = []
    opened = checkpoint("llama")
    specs = param_specs(opened.config, np.dtype(np.float32))
    got = opened.load(specs, lambda name, array: seen.append((name, array, array.sum())) or name)
    assert [name for name, _, _ in seen] == list(specs)
    assert got == {name: name for name in specs}
    assert all(array.base is None and array.sum() == total for _, array, total in seen)


def test_names_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    tensors = load_file(FOLDER / "gemma3_text" / "model.safetensors")
    config = {"model_type": "gemma3", "text_config": hf_config("gemma3_text"), "vision_config": {"hidden_size": 8}}
    want = load(FOLDER / "gemma3_text")
    for index, prefix in enumerate(("language_model.model.", "model.language_model.")):
        path = tmp_path / str(index)
        path.mkdir()
        renamed = {name.replace("model.", prefix, 1): t for name, t in tensors.items()}
        vision = {"vision_tower.x.weight": np.zeros(3, np.float32)}
        save_file({**renamed, **vision}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config))
        got = load(path)
        assert all(np.array_equal(got[name], want[name]) for name in want)


def test_known_leftovers_are_ignored(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    open_checkpoint(folder)
    tied = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(tied))
    assert "lm_head" not in load(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.update({"model.layers.4.mlp.up_proj.weight": t["model.norm.weight"]}), "layers.4.mlp.up_proj"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}), "q_proj.bias"),
        (
            lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:-1].copy()}),
            r"model.safetensors: tensor model.embed_tokens.weight has shape \[255, 32\], the config needs \[256, 32\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.int32)}),
            "model.norm.weight has dtype I32",
        ),
    ],
)
def test_wrong_tensors_are_named(folder: Path, change: Callable[[Tensors], object], named: str) -> None:
    edit(folder, change)
    with pytest.raises(ModelError, match=named):
        open_checkpoint(folder)


def rewrite_header(file: Path, change: Callable[[dict], object]) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda h: h["model.norm.weight"].update(shape=[33]), "model.norm.weight.*takes 66 bytes.*hold 64"),
        (lambda h: h["model.norm.weight"].update(shape=[-32]), "model.norm.weight has shape"),
        (lambda h: h["model.norm.weight"].update(shape=[2**62, 2**62]), "model.norm.weight.*takes"),
        (lambda h: h["model.norm.weight"].update(dtype="F32"), "model.norm.weight.*takes 128 bytes"),
        (lambda h: h["model.norm.weight"].update(dtype="PICKLE"), "unknown dtype 'PICKLE'"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[10**12, 10**12 + 64]), "truncated.*model.norm.weight"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[0, 64]), "starts at byte"),
        (lambda h: h["model.norm.weight"].pop("data_offsets"), "data_offsets None"),
        (lambda h: h.update({"model.norm.weight": 3}), "unknown dtype None"),
        (lambda h: h.pop("lm_head.weight"), "expected|end at"),
    ],
)
def test_lying_headers(folder: Path, change: Callable[[dict], object], named: str) -> None:
    rewrite_header(folder / "model.safetensors", change)
    with pytest.raises(ModelError, match=rf"model\.safetensors.*{named}|{named}.*model\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_truncated_files(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        open_checkpoint(folder)


def test_trailing_bytes_and_garbage(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole + b"x")
    with pytest.raises(ModelError, match="tensors end at"):
        open_checkpoint(folder)
    file.write_bytes(whole[:8] + b"\xff" * (len(whole) - 8))
    with pytest.raises(ModelError, match="not JSON"):
        open_checkpoint(folder)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="header of 18446744073709551615 bytes in a file of 64"):
        open_checkpoint(folder)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_header_never_crashes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever byte of the header changes, reading it ends in ModelError or in a consistent header."""
    raw = bytearray((FOLDER / "llama_linear" / "model.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    file.write_bytes(raw)
    try:
        tensors = read_header(file)
    except ModelError as error:
        assert str(file) in str(error)
    else:
        assert sum(t.num_bytes for t in tensors.values()) <= len(raw)


def test_shards(tmp_path: Path) -> None:
    source = FOLDER / "llama_llama3"
    assert len(list(source.glob("*.safetensors"))) > 1
    folder = shutil.copytree(source, tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    promised = json.loads(index.read_text())
    shard = promised["weight_map"]["model.norm.weight"]

    elsewhere = {**promised["weight_map"], "model.norm.weight": promised["weight_map"]["model.embed_tokens.weight"]}
    index.write_text(json.dumps({"weight_map": elsewhere}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        open_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {**promised["weight_map"], "x": "../../etc/passwd"}}))
    with pytest.raises(ModelError, match="etc/passwd"):
        open_checkpoint(folder)
    index.write_text(json.dumps(promised))
    (folder / shard).unlink()
    with pytest.raises(ModelError, match=f"shard {shard} is missing"):
        open_checkpoint(folder)
    index.unlink()
    with pytest.raises(ModelError, match="safetensors"):
        open_checkpoint(folder)


def test_paths_that_hold_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"looked for octavo\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="not a GGUF file"):
        open_checkpoint(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle.*convert"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: not JSON"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json: not a JSON object"):
        open_checkpoint(folder)


def test_an_impossible_size_is_refused_before_allocation(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2**31 - 1, "hidden_size": 2**31 - 4}))
    with pytest.raises(ModelError):
        open_checkpoint(folder)


def test_random_params_repeat_with_the_seed() -> None:
    config = checkpoint("llama").config
    first, again, other = (random_params(config, "bfloat16", seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["embed"], other["embed"])
    assert {name: (a.shape, a.dtype) for name, a in first.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in param_specs(config, BF16).items()
    }
