"""/v1/embeddings, /v1/rerank and /v1/score over the engine of tests/pooling: shapes, fields, bounds, endings."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from engine.pooling.config import Matryoshka
from engine.pooling.engine import PoolingEngine
from engine.pooling.request import TextIds
from server.app import build_app
from server.config import ServerOptions
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from tests.pooling.fakes import BAD, FakeRunner, config, vector_of
from tests.server.fakes import VOCAB, ByteTokenizer

OPTIONS = ServerOptions(max_choices=20)
NAME = "fake-embedder"


class PairTokenizer(ByteTokenizer):
    """A text is its bytes, a pair two texts with a 0 between them."""

    def encode_parts(
        self, text: str, pair: str | None = None, *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        ids = [*text.encode(), *([0, *pair.encode()] if pair is not None else [])]
        return ids[:max_tokens], [0] * len(ids[:max_tokens])


class Server:
    """The application around a pooling engine, called in process."""

    def __init__(self, **changes: Any) -> None:
        self.device = FakeRunner()
        self.engine = PoolingEngine(
            config(**changes), self.device, vocab_size=VOCAB, tokenizer=PairTokenizer(), model_name=NAME,  # type: ignore[arg-type]
        ).start()  # fmt: skip
        self.lifecycle = Lifecycle()
        self.lifecycle.ready(self.engine)
        app = build_app(self.lifecycle, Metrics(self.lifecycle), OPTIONS)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def ask(self, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
        answer = await self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def metrics(self) -> dict[str, float]:
        lines = (await self.http.get("/metrics")).text.splitlines()
        pairs = [line.rpartition(" ") for line in lines if line and not line.startswith("#")]
        return {key: float(value) for key, _, value in pairs}


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server(matryoshka=Matryoshka(True, (2,)))
    yield made
    made.engine.stop()


def vector(text: str) -> list[float]:
    return vector_of(TextIds(tuple(text.encode())))


async def test_embeddings_of_every_kind_of_input(server: Server) -> None:
    one = await server.ask("/v1/embeddings", input="abc", model=NAME, user="me", request_id="r1")
    assert one["object"] == "list" and one["model"] == NAME and one["id"] == "embd-r1"
    assert one["data"] == [{"object": "embedding", "index": 0, "embedding": vector("abc")}]
    assert one["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    many = await server.ask("/v1/embeddings", input=["abc", "z", "hello"])
    assert [item["embedding"] for item in many["data"]] == [vector("abc"), vector("z"), vector("hello")]
    assert [item["index"] for item in many["data"]] == [0, 1, 2] and many["usage"]["total_tokens"] == 9
    ids = await server.ask("/v1/embeddings", input=[97, 98, 99])
    assert [item["embedding"] for item in ids["data"]] == [vector("abc")]
    lists = await server.ask("/v1/embeddings", input=[[97, 98, 99], [122]])
    assert [item["embedding"] for item in lists["data"]] == [vector("abc"), vector("z")]


async def test_base64_is_little_endian_float32(server: Server) -> None:
    answer = await server.ask("/v1/embeddings", input=["abc", "z"], encoding_format="base64")
    found = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4").tolist() for item in answer["data"]]
    assert found == [vector("abc"), vector("z")]


async def test_dimensions_and_normalize(server: Server) -> None:
    cut = await server.ask("/v1/embeddings", input="abc", dimensions=2)
    assert cut["data"][0]["embedding"] == vector("abc")[:2]
    unit = await server.ask("/v1/embeddings", input="abc", normalize=True)
    assert np.isclose(np.linalg.norm(unit["data"][0]["embedding"]), 1)
    error = await server.ask("/v1/embeddings", 400, input="abc", dimensions=3)
    assert error["error"]["param"] == "dimensions" and "must be one of 2, got 3" in error["error"]["message"]


async def test_a_model_that_cannot_be_cut_says_so() -> None:
    server = Server()
    error = await server.ask("/v1/embeddings", 400, input="abc", dimensions=2)
    assert error["error"]["param"] == "dimensions" and "is_matryoshka" in error["error"]["message"]
    server.engine.stop()


async def test_score_by_similarity(server: Server) -> None:
    def cosine(a: str, b: str) -> float:
        left, right = np.asarray(vector(a)), np.asarray(vector(b))
        return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))

    one = await server.ask("/v1/score", text_1="abc", text_2=["z", "\x01\x01\x01"])
    assert one["object"] == "list" and [item["index"] for item in one["data"]] == [0, 1]
    wanted = [cosine("abc", "z"), cosine("abc", "\x01\x01\x01")]
    assert np.allclose([item["score"] for item in one["data"]], wanted, atol=1e-6)
    assert one["usage"]["prompt_tokens"] == 3 + 1 + 3
    pairs = await server.ask("/score", text_1=["abc", "z"], text_2=["abc", "q"])
    assert np.isclose(pairs["data"][0]["score"], 1, atol=1e-6)


async def test_rerank_is_sorted_and_cut(server: Server) -> None:
    body: dict[str, Any] = {"query": "abc", "documents": ["\x01\x01\x01", {"text": "abd"}, "\x02"]}
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        answer = await server.ask(path, **body)
        scores = [item["relevance_score"] for item in answer["results"]]
        assert scores == sorted(scores, reverse=True) and answer["results"][0]["index"] == 1
        assert answer["results"][0]["document"] == {"text": "abd"} and answer["model"] == NAME
    first = await server.ask("/v1/rerank", top_n=1, return_documents=False, **body)
    assert first["results"] == [{"index": 1, "relevance_score": scores[0]}]
    assert first["usage"] == {"prompt_tokens": 3 + 3 + 3 + 1, "total_tokens": 10}


async def test_a_cross_encoder_scores_pairs() -> None:
    """Its number for the pair as one text; a query and a document are never apart."""
    server = Server(task="score")
    answer = await server.ask("/v1/score", text_1="ab", text_2=["c", "de"])
    pairs = [TextIds((*b"ab", 0, *b"c")), TextIds((*b"ab", 0, *b"de"))]
    assert [item["score"] for item in answer["data"]] == [vector_of(pair)[0] for pair in pairs]
    ranked = await server.ask("/v1/rerank", query="ab", documents=["c", "de"])
    assert [item["index"] for item in ranked["results"]] == [1, 0]
    error = await server.ask("/v1/embeddings", 400, input="abc")
    assert error["error"]["code"] == "unsupported_model" and "/v1/rerank and /v1/score" in error["error"]["message"]
    server.engine.stop()


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/v1/embeddings", {}, "input", "invalid_value"),
        ("/v1/embeddings", {"input": []}, "input", "invalid_value"),
        ("/v1/embeddings", {"input": [[]]}, "input", "invalid_value"),
        ("/v1/embeddings", {"input": ["a", 3]}, "input", "invalid_value"),
        ("/v1/embeddings", {"input": ["a", "x" * 49]}, "input[1]", "context_length_exceeded"),
        ("/v1/embeddings", {"input": [[1], [260]]}, "input[1]", "invalid_value"),
        ("/v1/embeddings", {"input": ["a"] * 21}, "input", "invalid_value"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format", "invalid_value"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ("/v1/embeddings", {"input": "a", "dimensions": True}, "dimensions", "invalid_value"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 49}, "truncate_prompt_tokens", "invalid_value"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "invalid_value"),
        ("/v1/embeddings", {"input": "a", "embed_dtype": "float16"}, "embed_dtype", "unsupported_parameter"),
        ("/v1/embeddings", {"input": "a", "user": 3}, "user", "invalid_type"),
        ("/v1/embeddings", {"input": "a", "dimension": 3}, "dimension", "unknown_parameter"),
        ("/v1/embeddings", {"input": "a", "temperature": 1}, "temperature", "unknown_parameter"),
        ("/v1/rerank", {"query": "a"}, "documents", "invalid_value"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents", "invalid_value"),
        ("/v1/rerank", {"query": "a", "documents": [{"title": "x"}]}, "documents", "invalid_value"),
        ("/v1/rerank", {"query": ["a"], "documents": ["b"]}, "query", "invalid_value"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n", "invalid_value"),
        ("/v1/rerank", {"query": "a" * 49, "documents": ["b"]}, "query", "context_length_exceeded"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 4}, "max_tokens_per_doc",
         "unsupported_parameter"),
        ("/v1/score", {"text_1": "a"}, "text_2", "invalid_value"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "c"}, "text_1", "invalid_value"),
        ("/v1/score", {"text_1": [], "text_2": "c"}, "text_1", "invalid_value"),
    ],
)  # fmt: skip
async def test_fields_that_are_refused(server: Server, path: str, body: dict, param: str, code: str) -> None:
    error = (await server.ask(path, 400, **body))["error"]
    assert (error["param"], error["code"]) == (param, code), error


async def test_truncation(server: Server) -> None:
    for long in ("x" * 60, [97] * 50):
        answer = await server.ask("/v1/embeddings", input=long, truncate_prompt_tokens=-1)
        assert answer["data"][0]["embedding"][1] == 48.0 and answer["usage"]["total_tokens"] == 48
    answer = await server.ask("/v1/embeddings", input="abcdef", truncate_prompt_tokens=3)
    assert answer["data"][0]["embedding"] == vector("abc")


async def test_another_model_and_another_task(server: Server) -> None:
    error = await server.ask("/v1/embeddings", 404, input="a", model="other")
    assert error["error"]["code"] == "model_not_found"
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        error = (await server.ask(path, 400, **body))["error"]
        assert error["code"] == "unsupported_model" and "embeds texts: /v1/embeddings" in error["message"]


async def test_a_generating_server_says_what_it_does(client: httpx.AsyncClient) -> None:
    for path in ("/v1/embeddings", "/v1/rerank", "/v1/score"):
        answer = await client.post(path, json={"input": "x"})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "unsupported_model"
        assert "generates text: /v1/chat/completions" in error["message"]


async def test_what_every_server_has(server: Server) -> None:
    models = (await server.http.get("/v1/models")).json()
    assert models["data"][0]["id"] == NAME and models["data"][0]["max_model_len"] == 48
    assert (await server.ask("/tokenize", prompt="abc"))["tokens"] == [97, 98, 99]
    assert (await server.http.get("/health")).status_code == 200


async def test_a_text_that_fails_is_a_500_and_not_its_neighbours(server: Server) -> None:
    answers = await asyncio.gather(
        server.http.post("/v1/embeddings", json={"input": ["abc", chr(BAD)]}),
        server.http.post("/v1/embeddings", json={"input": "abc"}),
    )
    assert [answer.status_code for answer in answers] == [500, 200]
    assert answers[0].json()["error"]["code"] == "engine_error"


async def test_a_full_queue_is_a_429() -> None:
    server = Server(max_queued_requests=4)
    server.device.gate.clear()
    first = asyncio.create_task(server.ask("/v1/embeddings", input=["x" * 40] * 12))
    while server.engine.stats().num_waiting < 4:
        await asyncio.sleep(0.01)
    answer = await server.http.post("/v1/embeddings", json={"input": "a"})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    server.device.gate.set()
    assert len((await first)["data"]) == 12
    server.engine.stop()


async def test_a_client_that_leaves_drops_its_texts(server: Server) -> None:
    server.device.gate.clear()
    task = asyncio.create_task(server.ask("/v1/embeddings", input=["x" * 40] * 20))
    while server.engine.stats().num_waiting < 8:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    server.device.gate.set()
    while server.engine.has_work():
        await asyncio.sleep(0.01)
    assert sum(len(batch.items) for batch in server.device.batches) < 10
    assert await server.lifecycle.idle(5)


async def test_shutting_down_ends_what_is_open(server: Server) -> None:
    server.device.gate.clear()
    task = asyncio.create_task(server.http.post("/v1/embeddings", json={"input": ["x" * 40] * 20}))
    while server.engine.stats().num_waiting < 8:
        await asyncio.sleep(0.01)
    server.lifecycle.draining = True
    assert (await server.http.post("/v1/embeddings", json={"input": "a"})).status_code == 503
    server.lifecycle.fail_open()
    answer = await task
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
    server.device.gate.set()


async def test_metrics(server: Server) -> None:
    await server.ask("/v1/embeddings", input=["abc", "de"])
    await server.ask("/v1/score", text_1="ab", text_2=["q"])
    found = await server.metrics()
    labels = f'{{engine="0",model_name="{NAME}"}}'
    assert found[f"octavo_texts_total{labels}"] == 4
    assert found[f"vllm:prompt_tokens_total{labels}"] == 3 + 2 + 2 + 1
    assert found[f'vllm:request_success_total{{engine="0",finished_reason="stop",model_name="{NAME}"}}'] == 4
    assert found[f"vllm:e2e_request_latency_seconds_count{labels}"] == 2
    assert found[f"vllm:num_requests_waiting{labels}"] == 0
