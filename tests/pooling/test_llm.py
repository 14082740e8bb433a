"""`LLM.embed` and `LLM.score` over tiny checkpoints: the numbers are transformers', whoever shares the batch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.errors import ContextOverflow, InvalidParam, ModelError
from engine.pooling.offline import run
from engine.pooling.request import TextIds
from tests.model.encoders import FOLDER, cases
from tests.model.models import checkpoint, params
from tests.oracle import naive_logits
from tests.pooling.conftest import opened

TOLERANCE = 1e-4
TEXTS = ["the cat sat on the mat", "a dog", "the ship sails far away of the blue sea. " * 4, "fish, bread", "x y z"]


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def embeddings(llm: LLM, prompts: Any, **how: Any) -> np.ndarray:
    return np.stack([out.outputs.embedding for out in llm.embed(prompts, **how)])


def test_mean_pooling_is_transformers(bert: LLM) -> None:
    prompts = [list(case.text.token_ids) for case in cases("bert")]
    got = embeddings(bert, prompts[:2])  # one token and two: the second segment would begin behind them
    want = unit(np.stack([case.hidden.mean(0) for case in cases("bert")[:1]]))
    assert np.abs(got[:1] - want).max() < TOLERANCE and got.dtype == np.float32
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_last_token_of_a_decoder_is_transformers(qwen: LLM) -> None:
    """Every text in one call; causal attention over ragged rows, the last norm, no head."""
    got = embeddings(qwen, [list(case.text.token_ids) for case in cases("qwen3_embedding")])
    want = unit(np.stack([case.hidden[-1] for case in cases("qwen3_embedding")]))
    assert np.abs(got - want).max() < TOLERANCE
    assert np.abs(got - unit(np.stack([case.hidden.mean(0) for case in cases("qwen3_embedding")]))).max() > 0.01


@pytest.mark.parametrize(("kind", "pool"), [("mean", lambda h: h.mean(0)), ("cls", lambda h: h[0])])
def test_an_option_decides_pooling_and_length(kind: str, pool: Any) -> None:
    found = cases("qwen3_embedding")[:5]
    with opened("qwen3_embedding", pooling=kind, normalize=False, max_model_len=16, max_num_batched_tokens=16) as llm:
        got = embeddings(llm, [list(case.text.token_ids) for case in found])
    want = np.stack([pool(case.hidden) for case in found])
    assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


def test_a_cross_encoders_score_is_the_sigmoid_of_transformers_logit(cross_encoder: LLM) -> None:
    """Token by token, segments included, as the fixture has them; then through the tokenizer."""
    engine = cross_encoder.pooling_engine
    texts = [case.text for case in cases("bert_classifier")]
    want = np.concatenate([case.logits for case in cases("bert_classifier") if case.logits is not None])
    assert np.abs(np.concatenate(run(engine, texts)) - want).max() < TOLERANCE * np.abs(want).max()
    scores = [out.outputs.score for out in cross_encoder.score("the cat", ["sat on the mat", "sails far away"])]
    assert all(0 < score < 1 for score in scores) and scores[0] != scores[1]
    turned = cross_encoder.score("sat on the mat", "the cat")[0].outputs.score
    assert abs(turned - scores[0]) > 1e-3  # a pair has an order, and segments


def test_positions_behind_the_padding_id_reach_the_device() -> None:
    """XLM-R: positions counted from its padding id, one kind of segment, its own head."""
    found = [case for case in cases("xlm_roberta_classifier") if len(case.text.token_ids) <= 16]
    with opened("xlm_roberta_classifier", max_model_len=16) as llm:
        engine = llm.pooling_engine
        got = np.concatenate(run(engine, [TextIds(case.text.token_ids) for case in found]))
        assert llm.score("the cat", "sat")[0].outputs.score > 0
    want = np.concatenate([case.logits for case in found if case.logits is not None])
    assert len(want) == 5 and np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


def test_similarity_is_the_cosine_of_embeddings(bert: LLM) -> None:
    unit_vectors = embeddings(bert, TEXTS)
    scores = [out.outputs.score for out in bert.score(TEXTS[0], TEXTS[1:])]
    assert np.allclose(scores, unit_vectors[1:] @ unit_vectors[0], atol=1e-6)
    pairwise = [out.outputs.score for out in bert.score(TEXTS[:2], TEXTS[2:4])]
    assert np.allclose(pairwise, [unit_vectors[0] @ unit_vectors[2], unit_vectors[1] @ unit_vectors[3]], atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "qwen"])
def test_neighbours_do_not_matter(name: str, request: pytest.FixtureRequest) -> None:
    """In one program to the bit, in another to rounding."""
    llm: LLM = request.getfixturevalue(name)
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 100, length).tolist() for length in (9, 10, 11, 12, 16, 13)]
    alone = embeddings(llm, ids[0])[0]
    steps = llm.pooling_engine.stats().steps
    first = embeddings(llm, [rng.integers(5, 100, 20).tolist(), ids[0]])[1]  # rides in a step of longer texts
    second = embeddings(llm, [*ids[3:5], ids[0]])[-1]
    assert np.abs(first - alone).max() < 1e-6 and np.abs(second - alone).max() < 1e-6
    # The same program: another neighbour, another place on the token axis.
    one, other = embeddings(llm, [ids[0], ids[1]])[0], embeddings(llm, [ids[5], ids[0]])[1]
    assert (one == other).all()
    new = llm.pooling_engine.stats().steps
    assert {name for name, count in new.items() if count > steps.get(name, 0)} >= {"pool_16_32", "pool_32_32"}


def test_nothing_compiles_after_ready(bert: LLM) -> None:
    rng = np.random.default_rng(1)
    before = bert.pooling_engine.stats().compiles
    embeddings(bert, [rng.integers(5, 100, length).tolist() for length in (*range(1, 61), *[5] * 40)])
    assert bert.pooling_engine.stats().compiles == before


def test_dimensions(bert: LLM, qwen: LLM) -> None:
    whole, cut = embeddings(bert, TEXTS), embeddings(bert, TEXTS, dimensions=8)
    assert cut.shape == (5, 8) and np.allclose(cut, unit(whole[:, :8]), atol=1e-6)
    assert np.allclose(embeddings(qwen, TEXTS, dimensions=32), embeddings(qwen, TEXTS))
    with pytest.raises(InvalidParam, match="dimensions: this model's embeddings have 32 numbers; it was not trained"):
        qwen.embed(TEXTS, dimensions=16)
    for wrong in (0, 33):
        with pytest.raises(InvalidParam, match=f"dimensions: must be between 1 and 32, got {wrong}"):
            bert.embed(TEXTS, dimensions=wrong)


def test_normalize_of_a_call(bert: LLM) -> None:
    raw = embeddings(bert, TEXTS, normalize=False)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.01
    assert np.allclose(unit(raw), embeddings(bert, TEXTS), atol=1e-6)


def test_long_texts_are_refused_unless_they_may_be_cut(bert: LLM) -> None:
    long = "the cat sat on the mat " * 20
    with pytest.raises(ContextOverflow, match=r"prompts\[1\]: has 122 tokens; this model takes 60 \(truncate_prompt"):
        bert.embed(["a dog", long])
    [cut] = bert.embed(long, truncate_prompt_tokens=-1)
    tokenizer = bert.pooling_engine.tokenizer
    assert tokenizer is not None and len(cut.prompt_token_ids) == 60
    whole = tokenizer.encode(long)
    assert cut.prompt_token_ids == [*whole[:59], whole[-1]]  # [SEP] stays
    assert len(bert.embed([list(range(5, 95))], truncate_prompt_tokens=7)[0].prompt_token_ids) == 7
    with pytest.raises(InvalidParam, match="truncate_prompt_tokens: must be -1 or between 1 and 60, got 61"):
        bert.embed("x", truncate_prompt_tokens=61)


def test_pairs_that_do_not_match(bert: LLM) -> None:
    with pytest.raises(InvalidParam, match="text_1: has 2 texts for the 3 of text_2"):
        bert.score(TEXTS[:2], TEXTS[:3])
    with pytest.raises(InvalidParam, match="text_2: must not be empty"):
        bert.score(TEXTS[0], [])


def test_what_a_model_cannot_do_is_said(bert: LLM, cross_encoder: LLM) -> None:
    with pytest.raises(InvalidParam, match=r"bert does not generate: see LLM\.embed and LLM\.score"):
        bert.generate("x", SamplingParams())
    with pytest.raises(InvalidParam, match="scores pairs"):
        cross_encoder.embed("x")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bert", {"task": "generate"}, "task: .* is an encoder"),
        ("bert", {"task": "score"}, "task: .* is for embed, not for score"),
        ("bert", {"page_size": 16}, "page_size: is for models that generate"),
        ("bert", {"kv_cache_dtype": "int8"}, "kv_cache_dtype: is for models that generate"),
        ("bert", {"quantization": "stored"}, "quantization: stored is for models that generate"),
        ("bert", {"max_model_len": 65}, "max_model_len: 65 is more than the model's 64 positions"),
        ("bert_classifier", {"pooling": "mean"}, "pooling: is for embeddings"),
        ("bert_classifier", {"task": "embed"}, "task: .* is for score, not for embed"),
        ("bert", {"pooling": "max"}, "pooling: must be one of cls, mean, last"),
        ("../models/llama", {"pooling": "mean"}, "pooling: is for embeddings"),
        ("../models/llama", {"task": "score"}, "task: .* is no cross-encoder"),
    ],
)
def test_options_that_mean_nothing_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParam, match=message):
        opened(name, **options)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantization": "int8"}], ids=["bfloat16", "int8"])
def test_fewer_bits(bert: LLM, options: dict[str, Any]) -> None:
    """Near the float32 embedding, and not equal to it: the option does something."""
    with opened("bert", max_model_len=8, **options) as llm:
        got = embeddings(llm, TEXTS[1])
    want = embeddings(bert, TEXTS[1])
    assert 0 < 1 - float(got[0] @ want[0]) < 1e-3


def test_a_decoder_embeds_when_asked() -> None:
    """The same checkpoint that generates: sliding windows and all, by its last token; no sentence-transformers."""
    options = {"task": "embed", "max_model_len": 32, "max_num_batched_tokens": 32, "skip_tokenizer_init": True}
    with opened("../models/mistral", **options) as llm:
        config = llm.pooling_engine.config
        assert (config.pooling, config.normalize, config.task) == ("last", True, "embed")
        ids = np.random.default_rng(0).integers(5, 200, 30).tolist()
        got = embeddings(llm, [ids, ids[:5]])
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    weights: dict[str, Any] = dict(params("mistral"))
    weights["lm_head"] = np.eye(32, dtype=np.float32)  # the oracle's logits are then the normed hidden state
    narrow = dataclasses.replace(checkpoint("mistral").config, vocab_size=32)
    want = unit(np.stack([naive_logits(narrow, weights, part)[-1] for part in (ids, ids[:5])]))
    assert np.abs(got - want).max() < TOLERANCE < np.abs(got - want[::-1]).max()


@pytest.mark.parametrize("name", ["mamba2", "granitemoehybrid"])
def test_layers_that_keep_a_state_do_not_embed(name: str) -> None:
    with pytest.raises(ModelError, match=r"embeddings from layers that keep a state .* are not supported"):
        opened(f"../models/{name}", task="embed", skip_tokenizer_init=True)


def changed(name: str, folder: Path, file: str, change: Any) -> Path:
    copy = shutil.copytree(FOLDER / name, folder / "model")
    value = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(change(value)))
    return copy


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("modules.json", lambda m: [*m, {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}],
         r"modules\.json: the modules Transformer, Pooling, Normalize, Dense are not supported"),
        ("modules.json", lambda m: [m[0]], "the modules Transformer are not supported"),
        ("modules.json", lambda m: {"a": 1}, r"modules\.json: not a JSON array"),
        ("modules.json", lambda m: [{**m[0], "path": "../up"}, *m[1:]], "is not a folder in this one"),
        ("1_Pooling/config.json", lambda c: c | {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens is not"),
        ("1_Pooling/config.json", lambda c: {"pooling_mode": "max"}, "pooling_mode 'max' is not supported"),
        ("sentence_bert_config.json", lambda c: {"max_seq_length": 0}, "max_seq_length = 0 must be a positive"),
        ("config.json", lambda c: c | {"matryoshka_dimensions": "8"}, "matryoshka_dimensions = '8' must be"),
    ],
)  # fmt: skip
def test_files_of_sentence_transformers_that_are_refused(file: str, change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        LLM(str(changed("bert", tmp_path, file, change)), compile_cache=False)


def test_what_the_files_say_is_what_is_served(bert: LLM, qwen: LLM, cross_encoder: LLM) -> None:
    def said(llm: LLM) -> tuple:
        config = llm.pooling_engine.config
        return config.task, config.pooling, config.normalize, config.max_model_len

    assert said(bert) == ("embed", "mean", True, 60)
    assert said(qwen) == ("embed", "last", True, 64)
    assert said(cross_encoder) == ("score", "cls", True, 64)


def test_defaults_and_matryoshka_dimensions_of_the_files(tmp_path: Path) -> None:
    folder = changed("bert", tmp_path, "config.json", lambda c: c | {"matryoshka_dimensions": [8, 16]})
    options: dict[str, Any] = {"compile_cache": False, "max_num_batched_tokens": 32}
    with LLM(str(folder), **options) as llm:
        assert llm.pooling_engine.config.max_model_len == 48  # max_seq_length, not the 64 positions
        assert embeddings(llm, TEXTS[:2], dimensions=16).shape == (2, 16)
        with pytest.raises(InvalidParam, match="dimensions: must be one of 8, 16, got 12"):
            llm.embed(TEXTS[:2], dimensions=12)
