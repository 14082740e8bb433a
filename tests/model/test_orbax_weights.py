"""Converted checkpoints: exact round trip of arrays and configs, and damage that is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from engine.errors import ModelError
from engine.model.params import param_specs
from engine.model.weights import open_checkpoint, random_params
from engine.model.weights.manifest import Manifest, manifest_from_dict, manifest_to_dict
from engine.model.weights.orbax import save_orbax
from tests.model.models import FOLDER, NAMES, checkpoint, max_model_len

ROOT = Path(__file__).parent.parent.parent
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_manifest_round_trip_is_exact(name: str) -> None:
    manifest = Manifest(checkpoint(name).config, "bfloat16", (2, 5))
    data = json.loads(json.dumps(manifest_to_dict(manifest)))
    assert manifest_from_dict(data, "octavo.json") == manifest


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phi3 fixture, converted with its short LongRoPE factors; module-wide because writing takes a second."""
    folder = tmp_path_factory.mktemp("orbax") / "phi3"
    opened = checkpoint("phi3")
    arrays = opened.load(param_specs(opened.config, BF16), lambda _, array: jax.device_put(array))
    save_orbax(folder, opened.config, arrays, end_token_ids=(2, 3), source=FOLDER / "phi3")
    return folder


def test_round_trip(converted: Path) -> None:
    opened = open_checkpoint(converted, max_model_len("phi3"))
    assert opened.config == checkpoint("phi3").config
    assert opened.dtype == "bfloat16"
    assert opened.end_token_ids == (2, 3)
    assert (converted / "generation_config.json").read_bytes() == (FOLDER / "phi3/generation_config.json").read_bytes()
    for dtype in (BF16, np.dtype(np.float32)):
        specs = param_specs(opened.config, dtype)
        want = checkpoint("phi3").load(specs, lambda _, array: array)
        got = opened.load(specs, lambda _, array: array)
        assert list(got) == list(specs)
        for name, spec in specs.items():
            assert type(got[name]) is np.ndarray
            assert got[name].dtype == spec.dtype
            np.testing.assert_array_equal(got[name], want[name])


def test_longrope_is_chosen_again_when_opened(converted: Path) -> None:
    short, long = (open_checkpoint(converted, length).config for length in (192, 193))
    assert short.layers[0].rope != long.layers[0].rope


def test_without_a_source_folder(tmp_path: Path) -> None:
    """As from a GGUF file: numpy arrays, no config.json; the folder may hold a tokenizer already."""
    config = checkpoint("gemma3_text").config
    arrays = random_params(config, "float32", seed=0)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_orbax(tmp_path, config, arrays)
    opened = open_checkpoint(tmp_path)
    assert (opened.config, opened.dtype, opened.end_token_ids) == (config, "float32", ())
    got = opened.load(param_specs(config, np.dtype(np.float32)), lambda _, array: array)
    assert all(np.array_equal(got[name], arrays[name]) for name in arrays)
    with pytest.raises(ModelError, match="already exists"):
        save_orbax(tmp_path, config, arrays)


def test_damage_is_named(converted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(converted, tmp_path / "broken")
    manifest = json.loads((folder / "octavo.json").read_text())
    (folder / "config.json").unlink()

    def write(**changes: object) -> None:
        (folder / "octavo.json").write_text(json.dumps({**manifest, **changes}))

    write(version=2)
    with pytest.raises(ModelError, match="version 2"):
        open_checkpoint(folder)
    write(dtype="int4")
    with pytest.raises(ModelError, match="int4"):
        open_checkpoint(folder)
    write(config={**manifest["config"], "new_field": 1})
    with pytest.raises(ModelError, match="new_field"):
        open_checkpoint(folder)
    write(config={**manifest["config"], "vocab_size": 255})
    with pytest.raises(ModelError, match="embed has shape"):
        open_checkpoint(folder)
    write(config={**manifest["config"], "qkv_bias": True})
    with pytest.raises(ModelError, match=r"layers.0.qkv_bias"):
        open_checkpoint(folder)
    write()
    shutil.rmtree(folder / "params")
    with pytest.raises(ModelError, match="no Orbax arrays"):
        open_checkpoint(folder)


LOAD_EACH = """
import sys, pathlib, numpy
from engine.errors import ModelError
from engine.model.params import param_specs
from engine.model.weights import open_checkpoint
for folder in sys.argv[1:]:
    try:
        opened = open_checkpoint(pathlib.Path(folder))
        opened.load(param_specs(opened.config, numpy.dtype("float32")), lambda _, array: array)
        print("loaded")
    except ModelError as error:
        print("refused" if folder in str(error) else error)
"""


def test_truncated_arrays(converted: Path, tmp_path: Path) -> None:
    """Found when opened or when loaded, depending on what is cut; never loaded as something else.

    In a process of its own: Orbax leaves threads behind that complain after a failed read.
    """
    folders = []
    for keep in (10, 1000, 20_000, -100, None):  # bytes; None cuts nothing
        folders.append(shutil.copytree(converted, tmp_path / f"truncated{keep}"))
        for file in (folders[-1] / "params").glob("**/d/*"):
            file.write_bytes(file.read_bytes()[:keep])
    command = [sys.executable, "-c", LOAD_EACH, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)
    assert done.stdout.split("\n")[:-1] == ["refused"] * 4 + ["loaded"]


def test_a_config_that_contradicts_the_manifest(converted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(converted, tmp_path / "contradiction")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ModelError, match=r"config\.json and octavo\.json"):
        open_checkpoint(folder)
