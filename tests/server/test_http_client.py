"""The real client: `openai`, sync and async, streaming and not, against a listening server."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.server.fakes import output_ids

MESSAGES: list = [{"role": "user", "content": "=Hello, 世界"}]
TEXT = "Hello, 世界"


@pytest.fixture
def sync(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client


def test_chat(sync):
    answer = sync.chat.completions.create(model="fake-model", messages=MESSAGES, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == TEXT and answer.choices[0].finish_reason == "stop"
    assert len(answer.choices[0].logprobs.content) == len(TEXT.encode()) + 1
    assert answer._request_id
    stream = sync.chat.completions.create(
        model="fake-model", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == TEXT
    assert last.choices == [] and last.usage.total_tokens == 2 * len(TEXT.encode()) + 2


def test_accumulating_stream_helper(sync):
    with sync.chat.completions.stream(model="fake-model", messages=MESSAGES, n=2, logprobs=True) as stream:
        final = stream.get_final_completion()
    assert [c.message.content for c in final.choices] == [TEXT, TEXT]
    assert [c.finish_reason for c in final.choices] == ["stop", "stop"]
    assert len(final.choices[0].logprobs.content) == len(TEXT.encode()) + 1


def test_completions(sync):
    expected = bytes(output_ids((97, 98), 4)).decode()
    answer = sync.completions.create(model="fake-model", prompt="ab", max_tokens=4, logprobs=1, echo=True)
    assert answer.choices[0].text == "ab" + expected
    assert answer.choices[0].logprobs.text_offset == [0, 1, 2, 3, 4, 5]
    chunks = sync.completions.create(model="fake-model", prompt=["ab"], max_tokens=4, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == expected
    extra = {"top_k": 3, "return_token_ids": True}
    answer = sync.completions.create(model="fake-model", prompt=[97, 98], max_tokens=4, extra_body=extra)
    assert answer.choices[0].token_ids == output_ids((97, 98), 4)


def test_models(sync):
    assert [m.id for m in sync.models.list()] == ["fake-model"]
    assert sync.models.retrieve("fake-model").owned_by == "octavo"


def test_errors_become_the_clients_exceptions(sync, live):
    with pytest.raises(openai.NotFoundError) as missing:
        sync.chat.completions.create(model="other", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model") and missing.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        sync.chat.completions.create(model="fake-model", messages=MESSAGES, tools=[{"type": "function"}])
    assert (bad.value.code, bad.value.param) == ("unsupported_parameter", "tools")
    with pytest.raises(openai.InternalServerError):
        sync.completions.create(model="fake-model", prompt="FAULT")
    with pytest.raises(openai.APIError, match="engine failed"):
        list(sync.completions.create(model="fake-model", prompt="FAULT", stream=True))
    live.engine.gate.clear()
    with pytest.raises(openai.RateLimitError):
        sync.completions.create(model="fake-model", prompt=["x"] * 65)


async def test_async_client_many_at_once(live):
    async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none", timeout=20) as client:

        async def one(i: int) -> str:
            text = f"{i} " + "é" * i
            stream = await client.chat.completions.create(
                model="fake-model", messages=[{"role": "user", "content": "=" + text}], stream=True
            )
            parts = [c.choices[0].delta.content or "" async for c in stream]
            return text if "".join(parts) == text else f"{parts} for {text}"

        assert await asyncio.gather(*map(one, range(32))) == [f"{i} " + "é" * i for i in range(32)]
        answer = await client.completions.create(model="fake-model", prompt="ab", max_tokens=2)
        assert answer.choices[0].text == bytes(output_ids((97, 98), 2)).decode()
