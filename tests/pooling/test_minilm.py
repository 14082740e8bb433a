"""all-MiniLM-L6-v2 against transformers in float64 (fixtures/make_minilm.py), through text and batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import LLM

FIXTURE = Path(__file__).parent.parent / "fixtures" / "minilm.npz"
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 128}  # fewer programs than the default's
COSINE = 1e-5  # how far from one; the goal. In float32 it is a hundred times closer

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURE))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("all-minilm-l6-v2", **OPTIONS) as model:
        yield model


def cosines(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    return (got.astype(np.float64) * want).sum(-1) / np.linalg.norm(got.astype(np.float64), axis=-1)


def test_embeddings_are_transformers(llm: LLM, expected: dict[str, np.ndarray]) -> None:
    texts = expected["texts"].tolist()
    out = llm.embed(texts, truncate_prompt_tokens=-1)
    ids = np.split(expected["tokens"], np.cumsum(expected["lengths"])[:-1])
    assert [one.prompt_token_ids for one in out] == [part.tolist() for part in ids]
    got = np.stack([one.outputs.embedding for one in out])
    assert got.shape == (len(texts), 384)
    assert (1 - cosines(got, expected["embeddings"])).max() < COSINE / 10
    # The comparison can fail: one token left out is far outside of it.
    short = llm.embed([ids[6][:-2].tolist()])[0].outputs.embedding
    assert 1 - cosines(short, expected["embeddings"][6]) > 10 * COSINE


def test_each_text_alone_is_the_same(llm: LLM, expected: dict[str, np.ndarray]) -> None:
    texts = expected["texts"].tolist()
    together = np.stack([one.outputs.embedding for one in llm.embed(texts, truncate_prompt_tokens=-1)])
    alone = np.stack([llm.embed(text, truncate_prompt_tokens=-1)[0].outputs.embedding for text in texts])
    assert np.abs(together - alone).max() < 1e-6
    assert llm.pooling_engine.stats().compiles_after_ready == 0


def test_similarity_finds_what_belongs_together(llm: LLM) -> None:
    others = ["Steps to recover access to an account", "Stock prices fell sharply on Monday", "Whales are mammals."]
    scores = [out.outputs.score for out in llm.score("How do I reset my password?", others)]
    assert scores[0] > 0.4 > max(scores[1:]) + 0.2
