"""Encoders against transformers, that each feature is what makes them agree, and their files' faults by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.errors import ModelError
from engine.model import encoder
from engine.model.encoder_config import EncoderConfig
from engine.model.families.bert import encoder_config
from engine.model.weights.encoder import open_encoder
from engine.pooling.batch import positions
from engine.pooling.steps import Rows, attend
from pallas_kernels.target import CPU
from tests.model.encoders import FOLDER, NAMES, cases, checkpoint, params
from tests.model.models import relative_error

TOLERANCE = 1e-4
WIDTH = 64  # of a row: the longest text of the fixtures is shorter


def hidden_states(name: str, config: EncoderConfig, causal: bool = False, types: bool = True) -> list[np.ndarray]:
    """Every text of the fixture in one call, one behind the other."""
    texts = [case.text for case in cases(name)]
    ids = [np.asarray(text.token_ids, np.int32) for text in texts]
    lengths = np.asarray([len(part) for part in ids], np.int32)
    start = np.cumsum(lengths, dtype=np.int32) - lengths
    rows = Rows(jnp.asarray(np.repeat(np.arange(len(ids), dtype=np.int32), lengths)), jnp.asarray(start),
                jnp.asarray(lengths))  # fmt: skip
    where = np.concatenate([positions(part, config.padding_id) for part in ids])
    segments = np.concatenate([np.asarray(text.type_ids, np.int32) for text in texts]) * types

    @jax.jit
    def forward(weights: dict, tokens: jax.Array, where: jax.Array, segments: jax.Array) -> jax.Array:
        see = partial(attend, rows, WIDTH, config.head_dim**-0.5, causal=causal)
        return encoder.hidden_states(config, weights, tokens, where, segments, see, CPU)

    found = np.asarray(forward(params(name), np.concatenate(ids), where, segments))
    return np.split(found, start[1:])


def error(name: str, found: list[np.ndarray]) -> float:
    return max(relative_error(got, case.hidden) for got, case in zip(found, cases(name), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_logits(name: str) -> None:
    found = hidden_states(name, checkpoint(name).config)
    assert error(name, found) < TOLERANCE
    if checkpoint(name).config.num_labels:
        first = jnp.stack([part[0] for part in found])
        logits = np.asarray(encoder.label_logits(params(name), first, CPU))
        want = np.stack([case.logits for case in cases(name) if case.logits is not None])
        assert np.abs(logits - want).max() < TOLERANCE * np.abs(want).max()


REMOVALS: list[tuple[str, str, Callable[[EncoderConfig], EncoderConfig]]] = [
    ("bert", "eps", lambda c: dataclasses.replace(c, norm_eps=1e-12)),
    ("bert_classifier", "gelu_new", lambda c: dataclasses.replace(c, activation="gelu")),
    ("xlm_roberta_classifier", "positions behind the padding id", lambda c: dataclasses.replace(c, padding_id=None)),
    ("xlm_roberta_classifier", "padding inside a text", lambda c: dataclasses.replace(c, padding_id=0)),
]


@pytest.mark.parametrize(("name", "change"), [(n, c) for n, _, c in REMOVALS], ids=[f"{n}-{f}" for n, f, _ in REMOVALS])
def test_every_feature_matters(name: str, change: Callable[[EncoderConfig], EncoderConfig]) -> None:
    assert error(name, hidden_states(name, change(checkpoint(name).config))) > 2 * TOLERANCE


def test_seeing_what_follows_and_segments_matter() -> None:
    config = checkpoint("bert").config
    assert error("bert", hidden_states("bert", config, causal=True)) > 2 * TOLERANCE
    assert error("bert", hidden_states("bert", config, types=False)) > 2 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_of_the_config(name: str) -> None:
    new, old = (json.loads((FOLDER / name / file).read_text()) for file in ("config.json", "config.old.json"))
    assert new != old and encoder_config(new) == encoder_config(old) == checkpoint(name).config


def test_a_minimal_config_has_transformers_defaults() -> None:
    config = encoder_config({"model_type": "bert", "architectures": ["BertModel"]})
    assert (config.hidden_size, config.num_layers, config.num_positions, config.num_types) == (768, 12, 512, 2)
    roberta = encoder_config({"model_type": "roberta", "architectures": ["RobertaModel"]})
    assert roberta.padding_id == 1 and roberta.max_position == 510


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "is_decoder = True is not known"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"num_attention_heads": 5}, "hidden_size 32 must be a multiple"),
        ({"rope_theta": 10000.0}, "rope_theta = 10000.0 is not known for bert"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM.*known: BertModel"),
        ({"architectures": None}, "architectures = None"),
        ({"sentence_transformers": {"activation_fn": "mine.Relu"}}, "sentence_transformers.*not supported"),
        ({"id2label": []}, r"id2label = \[\]"),
        ({"layer_norm_eps": 0}, "layer_norm_eps = 0 must be greater"),
    ],
)
def test_configs_that_are_refused(changes: dict, message: str) -> None:
    hf = json.loads((FOLDER / "bert_classifier" / "config.json").read_text())
    with pytest.raises(ModelError, match=message):
        encoder_config(hf | changes)


def test_what_a_cross_encoders_score_is() -> None:
    hf = json.loads((FOLDER / "bert_classifier" / "config.json").read_text())
    assert encoder_config(hf).score == "sigmoid"
    identity = "torch.nn.modules.linear.Identity"
    assert encoder_config(hf | {"sbert_ce_default_activation_function": identity}).score == "identity"
    newer = {"sentence_transformers": {"activation_fn": identity, "version": "5.0.0"}}
    assert encoder_config(hf | newer).score == "identity"


def rewritten(name: str, folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    copy = shutil.copytree(FOLDER / name, folder / "model")
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), f"tensor {QUERY} is missing"),
        (lambda t: t.update({QUERY: np.zeros((32, 31), np.float32)}), rf"{QUERY} has shape \[32, 31\].*\[32, 32\]"),
        (lambda t: t.update({QUERY: np.zeros((32, 32), np.int32)}), f"{QUERY} has dtype I32"),
        (lambda t: t.update({"encoder.layer.9.odd": np.zeros(3, np.float32)}), "tensor encoder.layer.9.odd is not a"),
        (lambda t: t.pop("embeddings.LayerNorm.bias"), "tensor embeddings.LayerNorm.bias is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Callable, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        open_encoder(rewritten("bert", tmp_path, change))


def test_a_pooler_nobody_reads_and_buffers_are_passed_over(tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        assert "pooler.dense.weight" in tensors  # transformers saved one
        tensors["embeddings.position_ids"] = np.arange(64)[None]

    assert open_encoder(rewritten("bert", tmp_path, add)).config == checkpoint("bert").config


def test_a_classifiers_pooler_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tensor bert\.pooler\.dense\.weight is missing"):
        open_encoder(rewritten_bfloat16("bert_classifier", tmp_path))


def rewritten_bfloat16(name: str, folder: Path) -> Path:
    """Without its pooler. numpy's safetensors has no bfloat16, so the parameters are written out in float32."""
    copy = shutil.copytree(FOLDER / name, folder / "model")
    found = checkpoint(name)
    tensors = {key: np.zeros(t.shape, np.float32) for key, t in found.tensors.items() if "pooler" not in key}
    save_file(tensors, copy / "model.safetensors")
    return copy


def test_a_quantized_encoder_is_refused(tmp_path: Path) -> None:
    copy = shutil.copytree(FOLDER / "bert", tmp_path / "model")
    hf = json.loads((copy / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (copy / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ModelError, match="quantization_config is not supported for encoders"):
        open_encoder(copy)
