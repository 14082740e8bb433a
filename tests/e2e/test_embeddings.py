"""The `openai` package against a real server of all-MiniLM-L6-v2; numbers are transformers' (fixtures/minilm.npz)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from tests.e2e.serving import Served, flags, octavo, running
from tests.pooling.test_minilm import COSINE, FIXTURE, OPTIONS, cosines

pytestmark = pytest.mark.model

MODEL = "all-minilm-l6-v2"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The options of test_minilm.py: equal options are equal programs, and those are compiled once."""
    folder = tmp_path_factory.mktemp("embeddings")
    with running(folder, MODEL, max_num_seqs=None, **OPTIONS) as served:
        yield served


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURE))


def test_the_clients_own_default_and_floats_are_the_same(server: Served, expected: dict[str, np.ndarray]) -> None:
    """The client asks for base64 and decodes it, unless it is told otherwise."""
    short = expected["lengths"] < 100
    texts, want = expected["texts"][short].tolist(), expected["embeddings"][short]
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        packed = client.embeddings.create(model=MODEL, input=texts)
        floats = client.embeddings.create(model=MODEL, input=texts, encoding_format="float", user="me")
        single = client.embeddings.create(model=MODEL, input=texts[2])
        with pytest.raises(openai.BadRequestError, match="dimensions") as refused:
            client.embeddings.create(model=MODEL, input="x", dimensions=64)
        with pytest.raises(openai.BadRequestError, match="It embeds texts"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
    assert refused.value.param == "dimensions"
    got = np.asarray([item.embedding for item in floats.data])
    assert np.allclose(np.asarray([item.embedding for item in packed.data]), got, atol=1e-6)
    assert (1 - cosines(got, want)).max() < COSINE and [item.index for item in floats.data] == list(range(len(texts)))
    assert floats.usage.prompt_tokens == floats.usage.total_tokens == int(expected["lengths"][short].sum())
    assert np.allclose(single.data[0].embedding, got[2], atol=1e-6)


def test_many_clients_at_once(server: Served, expected: dict[str, np.ndarray]) -> None:
    """Requests of one text share steps, and each gets its own."""
    texts, want = expected["texts"].tolist()[2:14], expected["embeddings"][2:14]

    async def all_of_them() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=120) as client:
            calls = (client.embeddings.create(model=MODEL, input=text) for text in texts * 5)
            return [answer.data[0].embedding for answer in await asyncio.gather(*calls)]

    before = server.metrics()
    got = np.asarray(asyncio.run(all_of_them()))
    assert (1 - cosines(got, np.tile(want, (5, 1)))).max() < COSINE
    after = server.wait(lambda m: m["vllm:num_requests_running"] == 0, "an idle engine")
    steps = after["octavo_steps_total"] - before["octavo_steps_total"]
    assert after["octavo_texts_total"] - before["octavo_texts_total"] == 60 and steps < 60
    assert after["octavo_compiles_after_ready_total"] == 0


def test_rerank_and_score(server: Served) -> None:
    documents = ["Stock prices fell sharply.", "Steps to recover access to an account", "Whales are mammals."]
    body = {"query": "How do I reset my password?", "documents": documents, "top_n": 2, "model": MODEL}
    ranked = httpx.post(server.url + "/v1/rerank", json=body, timeout=60).json()
    assert ranked["results"][0]["index"] == 1 and len(ranked["results"]) == 2
    scored = httpx.post(
        server.url + "/v1/score", json={"text_1": body["query"], "text_2": documents}, timeout=60
    ).json()
    assert np.isclose(scored["data"][1]["score"], ranked["results"][0]["relevance_score"], atol=1e-6)


def test_a_batch_file(tmp_path: Path, server: Served) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = '{"custom_id": "%s", "method": "POST", "url": "/v1/embeddings", "body": {"input": "hello"}}\n'
    source.write_text("".join(line % i for i in range(3)))
    done = octavo("batch", "-i", str(source), "-o", str(target), "--model", MODEL, *flags(**OPTIONS))
    assert done.returncode == 0, done.stderr
    assert target.read_text().count('"status_code":200') == 3
