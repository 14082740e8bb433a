"""After ready nothing compiles: every feature and batch mix, aborts, prefix hits and preemption.

The same sweep shows that the metrics add up: what was asked, what ended, and what is left.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.serving import Served, ended, is_idle, running

pytestmark = pytest.mark.model

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Tell me a story about the sea."}]
STORY = "Once upon a time there was a lighthouse at the edge of the world. "

FEATURES: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.9, "seed": 1},
    {"top_k": 5, "seed": 2},
    {"min_p": 0.1, "top_k": 40, "top_p": 0.8},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.3, "temperature": 0},
    {"logit_bias": {str(i): -100 for i in range(100, 400)}},
    {"allowed_token_ids": list(range(500, 3000))},
    {"bad_words": ["sea", "the"]},
    {"stop": ["\n", "the end", "."]},
    {"stop_token_ids": list(range(40, 60)), "min_tokens": 4},
    {"ignore_eos": True, "min_tokens": 6},
    {"n": 3, "seed": 9},
    {"prompt_logprobs": 5},
    {"include_stop_str_in_output": True, "stop": "a", "skip_special_tokens": False},
    {"cache_salt": "mine", "return_token_ids": True},
    {
        "temperature": 1.3, "top_p": 0.7, "top_k": 30, "min_p": 0.01, "presence_penalty": 0.3, "seed": 3, "n": 2,
        "frequency_penalty": 0.2, "repetition_penalty": 1.1, "logit_bias": {"17": 5}, "bad_words": ["x"],
    },
]  # fmt: skip
OF_CHAT: list[dict[str, Any]] = [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 20}]
OF_TEXT: list[dict[str, Any]] = [{}, {"logprobs": 0}, {"logprobs": 20}, {"echo": True, "logprobs": 5}, {"echo": True}]


class Asked:
    """What was asked for and what came, counted on the client's side."""

    def __init__(self, url: str) -> None:
        self.http = httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=64))
        self.prompt_tokens = self.output_tokens = self.choices = self.cut = 0

    async def whole(self, path: str, **body: Any) -> dict[str, Any]:
        answer = await self.http.post(path, json={"max_tokens": 8} | body)
        assert answer.status_code == 200, (body, answer.text)
        found = answer.json()
        self.prompt_tokens += found["usage"]["prompt_tokens"]
        self.output_tokens += found["usage"]["completion_tokens"]
        self.choices += len(found["choices"])
        self.cut += sum(isinstance(choice["stop_reason"], str) for choice in found["choices"])
        return found

    async def left(self, after_events: int, **body: Any) -> None:
        """A stream that is left after so many lines."""
        fields = {"max_tokens": 500, "ignore_eos": True, "stream": True} | body
        async with self.http.stream("POST", TEXT, json=fields) as answer:
            assert answer.status_code == 200
            lines = aiter(answer.aiter_lines())
            for _ in range(after_events):
                await anext(lines)


def text_of(num_words: int, salt: int) -> str:
    return f"{salt}: " + (STORY * (num_words // 13 + 1))[: 5 * num_words]


async def sweep_features(asked: Asked) -> None:
    alone = [(CHAT, {"messages": MESSAGES} | f | OF_CHAT[i % 3]) for i, f in enumerate(FEATURES)]
    alone += [(TEXT, {"prompt": STORY} | f | OF_TEXT[i % 5]) for i, f in enumerate(FEATURES)]
    for path, body in alone:
        await asked.whole(path, **body)
    for batch in itertools.batched(alone, 12):  # and all of them mixed
        await asyncio.gather(*(asked.whole(path, **body) for path, body in batch))


async def sweep_bursts(asked: Asked) -> None:
    for size in (1, 2, 3, 5, 8, 9, 13, 20):
        lengths = itertools.cycle((1, 20, 60, 3, 250, 120, 700, 33))
        await asyncio.gather(
            *(
                asked.whole(TEXT, prompt=text_of(next(lengths), i), seed=i, temperature=i % 3, max_tokens=2 + i)
                for i in range(size)
            )
        )
    # Long prompts come while others decode: each step mixes the two.
    late = (asked.whole(TEXT, prompt=text_of(900, 100 + i), max_tokens=1, echo=i == 1, logprobs=3) for i in range(3))
    decode = (asked.whole(TEXT, prompt=text_of(5, 200 + i), max_tokens=40, ignore_eos=True) for i in range(6))
    await asyncio.gather(*decode, *late)
    for prompt in ([1], [1] * 255, [2] * 256, [3] * 257, list(range(10, 1000)), [4] * 8191):
        await asked.whole(TEXT, prompt=prompt, max_tokens=1)
    await asked.whole(TEXT, prompt=[STORY, "a", text_of(300, 1)], n=2, max_tokens=0, echo=True, logprobs=1)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_refused_requests_reach_no_program(server: Served, path: str) -> None:
    before = server.wait_idle()
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        for body in ({}, {"prompt": "x", "messages": []}, {"nonsense": 1}):
            assert (await http.post(path, json=body)).status_code == 400
    after = server.metrics()
    assert after.get("octavo_steps_total", 0) == before.get("octavo_steps_total", 0)
    assert after["octavo_compiles_total"] == before["octavo_compiles_total"]


@pytest.mark.slow
async def test_no_feature_and_no_batch_compiles(server: Served) -> None:
    before = server.wait_idle()
    asked = Asked(server.url)
    async with asked.http:
        await sweep_features(asked)
        await sweep_bursts(asked)
    after = server.wait_idle()
    check_no_compiles(before, after)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("vllm:prompt_tokens_total") == asked.prompt_tokens
    # A step draws up to four tokens, and those behind a stop string are in no answer.
    assert 0 <= grown("vllm:generation_tokens_total") - asked.output_tokens <= 3 * asked.cut
    assert grown("vllm:request_success_total") == asked.choices
    done = sum(ended(after, reason) - ended(before, reason) for reason in ("stop", "length"))
    assert done == asked.choices == grown("vllm:e2e_request_latency_seconds_count")
    assert grown("vllm:request_generation_tokens_sum") == asked.output_tokens
    assert grown("vllm:request_prompt_tokens_sum") == asked.prompt_tokens
    assert 0 < grown("vllm:prefix_cache_hits_total") < grown("vllm:prefix_cache_queries_total")
    assert grown("vllm:num_preemptions_total") == 0
    buckets = {key for key in after if key.startswith("octavo_steps_total{")}
    assert len(buckets) >= 6, buckets  # several sizes of both kinds of step were in use


async def test_aborts_in_the_middle_compile_nothing(server: Served) -> None:
    before = server.wait_idle()
    asked = Asked(server.url)
    async with asked.http:
        await asyncio.gather(
            *(asked.left(3 * i, prompt=text_of(10 * i, i), n=1 + i % 3) for i in range(10)),
            *(asked.whole(TEXT, prompt=text_of(40, i), max_tokens=30, ignore_eos=True) for i in range(6)),
        )
    after = server.wait_idle()
    check_no_compiles(before, after)
    assert ended(after, "abort") - ended(before, "abort") == sum(1 + i % 3 for i in range(10))
    done = sum(ended(after, reason) - ended(before, reason) for reason in ("stop", "length"))
    assert done == asked.choices == 6


def check_no_compiles(before: dict[str, float], after: dict[str, float]) -> None:
    assert after["octavo_compiles_after_ready_total"] == 0
    assert after["octavo_compiles_total"] == before["octavo_compiles_total"]  # none where others had compiled them
    assert is_idle(after)


@pytest.mark.slow
async def test_preemption_compiles_nothing_and_changes_nothing(server: Served, tmp_path: Path) -> None:
    """A pool for about 256 tokens and four requests of 150: they push each other out, and say the same.

    The other server has room for all, so it is the oracle.
    """
    bodies = [
        {"prompt": text_of(12 + 5 * i, i), "max_tokens": 120, "ignore_eos": True, "seed": i, "temperature": i % 2}
        for i in range(4)
    ]
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
        answers = await asyncio.gather(*(http.post(TEXT, json=body) for body in bodies))
    wanted = [answer.json()["choices"][0]["text"] for answer in answers]
    page_bytes = 16 * 30 * 2 * 3 * 64 * 4  # tokens, layers, k and v, heads, head size, float32
    small: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    with running(tmp_path, kv_cache_memory_bytes=16 * page_bytes, **small) as tiny:
        before = tiny.metrics()
        asked = Asked(tiny.url)
        async with asked.http:
            found = await asyncio.gather(*(asked.whole(TEXT, **body) for body in bodies))
            too_long = await asked.http.post(TEXT, json={"prompt": "x", "max_tokens": 512})
        after = tiny.wait_idle()
    assert [answer["choices"][0]["text"] for answer in found] == wanted
    assert after["vllm:num_preemptions_total"] > 0
    check_no_compiles(before, after)
    assert after["vllm:generation_tokens_total"] == asked.output_tokens == 4 * 120
    assert after["vllm:prompt_tokens_total"] == asked.prompt_tokens
    assert too_long.status_code == 400 and too_long.json()["error"]["code"] == "context_length_exceeded"
