"""Answers, whole and streamed, against the fake engine's formula; openai's types are the oracle of shape."""

from __future__ import annotations

import json

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.server.fakes import FakeEngine, output_ids, token_logprobs

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(text: str, **fields) -> dict:
    return {"messages": [{"role": "user", "content": text}], **fields}


def letters(text: str, count: int, index: int = 0) -> str:
    return bytes(output_ids(tuple(text.encode()), count, index)).decode()


async def post(client: httpx.AsyncClient, path: str, body: dict) -> dict:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def events(client: httpx.AsyncClient, path: str, body: dict) -> list[dict]:
    """The chunks of a stream, which must end in [DONE]."""
    answer = await client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last, tail = answer.text.split("\n\n")
    assert last == "data: [DONE]" and tail == ""
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks if not chunk.startswith(":")]


async def test_chat_answer_is_what_the_formula_says(client):
    body = await post(client, CHAT, chat("hi", max_tokens=4, n=2))
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert [c.message.content for c in parsed.choices] == [letters("user:hi;", 4, i) for i in (0, 1)]
    assert [(c.index, c.finish_reason, c.logprobs) for c in parsed.choices] == [
        (0, "length", None),
        (1, "length", None),
    ]
    assert body["choices"][0]["message"]["role"] == "assistant" and "refusal" in body["choices"][0]["message"]
    assert parsed.usage is not None and parsed.usage.prompt_tokens_details is not None
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens, parsed.usage.total_tokens) == (8, 8, 16)
    assert parsed.usage.prompt_tokens_details.cached_tokens == 4
    assert parsed.id.startswith("chatcmpl-") and parsed.model == "fake-model"


async def test_chat_without_a_limit_may_use_the_rest_of_the_context(client, engine: FakeEngine):
    body = await post(client, CHAT, chat("=short"))
    assert engine.submitted[0].params.max_tokens is None
    assert body["choices"][0]["message"]["content"] == "short"
    assert body["choices"][0]["finish_reason"] == "stop" and body["choices"][0]["stop_reason"] is None


async def test_completion_limit_defaults_to_16_and_gives_way_at_the_end_of_the_context(client, engine: FakeEngine):
    await post(client, COMPLETIONS, {"prompt": "ab"})
    await post(client, COMPLETIONS, {"prompt": [97] * (engine.config.max_model_len - 3)})
    assert [r.params.max_tokens for r in engine.submitted] == [16, 3]


@pytest.mark.parametrize("text", ["plain", "é", "日本語 and 🙂🙂", "tail \ufffd"])
async def test_stream_joins_to_the_whole_answer(client, text):
    chunks = [ChatCompletionChunk.model_validate(c, strict=True) for c in await events(client, CHAT, chat("=" + text))]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    assert len({(c.id, c.created, c.object, c.model) for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert [c.choices[0].delta.role for c in chunks[1:]] == [None] * (len(chunks) - 1)
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(c.usage is None for c in chunks)


async def test_stream_of_several_choices_gives_each_one_role_and_one_ending(client):
    chunks = await events(client, CHAT, chat("x", n=3, max_tokens=5))
    for index in range(3):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in own) == letters("user:x;", 5, index)
        assert [c["finish_reason"] for c in own].count("length") == 1 and own[-1]["finish_reason"] == "length"
        assert sum("role" in c["delta"] for c in own) == 1
    assert all("usage" not in c for c in chunks)


async def test_usage_chunk_comes_last_and_alone(client):
    *chunks, last = await events(client, CHAT, chat("x", n=2, max_tokens=3, stream_options={"include_usage": True}))
    assert all(c["usage"] is None for c in chunks)
    assert last["choices"] == [] and last["object"] == "chat.completion.chunk"
    assert last["usage"]["prompt_tokens"] == 7 and last["usage"]["completion_tokens"] == 6


async def test_continuous_usage_counts_up(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await events(client, COMPLETIONS, {"prompt": "x", "max_tokens": 3, "stream_options": options})
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts) and counts[-1] == 3


async def test_obfuscation_hides_the_length_of_texts(client):
    chunks = await events(client, CHAT, chat("=abcdefgh", stream_options={"include_obfuscation": True}))
    sizes = {len(c["choices"][0]["delta"].get("content", "")) + len(c["obfuscation"]) for c in chunks}
    assert sizes <= {0, 32}
    assert all("obfuscation" not in c for c in await events(client, CHAT, chat("=abc")))


async def test_chat_logprobs(client):
    body = await post(client, CHAT, chat("=é", logprobs=True, top_logprobs=5))
    content = body["choices"][0]["logprobs"]["content"]
    ChatCompletion.model_validate(body, strict=True)
    assert [t["bytes"] for t in content] == [[0xC3], [0xA9], list(b"<end>")]
    expected = token_logprobs(0xC3, 5)
    assert content[0]["logprob"] == expected.logprob
    assert [t["logprob"] for t in content[0]["top_logprobs"]] == [*(e.logprob for e in expected.top[:4]), -9999.0]
    assert "refusal" in body["choices"][0]["logprobs"]


async def test_streamed_logprobs_are_the_same_list(client):
    fields = {"logprobs": True, "top_logprobs": 2}
    whole = await post(client, CHAT, chat("=aé", **fields))
    chunks = await events(client, CHAT, chat("=aé", **fields))
    streamed = [t for c in chunks for t in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == whole["choices"][0]["logprobs"]["content"]


async def test_logprobs_without_alternatives(client):
    body = await post(client, CHAT, chat("=a", logprobs=True))
    assert [t["top_logprobs"] for t in body["choices"][0]["logprobs"]["content"]] == [[], []]


# -- completions -------------------------------------------------------------------------------


async def test_completion_prompts_in_every_form(client):
    forms = ["ab", ["ab", "cd"], [97, 98], [[97, 98], [99, 100]]]
    for form, prompts in zip(forms, [["ab"], ["ab", "cd"], ["ab"], ["ab", "cd"]], strict=True):
        body = await post(client, COMPLETIONS, {"prompt": form, "max_tokens": 3, "n": 2})
        parsed = Completion.model_validate(body, strict=True)
        assert [c.text for c in parsed.choices] == [letters(p, 3, i) for p in prompts for i in (0, 1)]
        assert [c.index for c in parsed.choices] == list(range(2 * len(prompts)))
        assert parsed.usage is not None and parsed.usage.prompt_tokens == 2 * len(prompts)
        assert parsed.usage.completion_tokens == 6 * len(prompts)


async def test_streamed_completions_interleave_by_index(client):
    chunks = await events(client, COMPLETIONS, {"prompt": ["ab", "cd"], "max_tokens": 3, "n": 2, "echo": True})
    # OpenAI's own chunks carry null until the end, which its type for them does not know.
    for chunk in chunks:
        Completion.model_validate({**chunk, "choices": [c | {"finish_reason": "stop"} for c in chunk["choices"]]})
    for index, (prompt, i) in enumerate([("ab", 0), ("ab", 1), ("cd", 0), ("cd", 1)]):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in own) == prompt + letters(prompt, 3, i)
        assert [c["finish_reason"] for c in own] == [None, None, "length"]


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
async def test_legacy_logprobs_with_echo(client, max_tokens):
    body = await post(
        client, COMPLETIONS, {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    )
    choice = body["choices"][0]
    ids = [*b"abc", *output_ids(tuple(b"abc"), max_tokens)]
    legacy = choice["logprobs"]
    assert choice["text"] == bytes(ids).decode()
    assert legacy["tokens"] == [chr(i) for i in ids]
    assert legacy["token_logprobs"] == [None] + [-i / 128 for i in ids[1:]]
    assert legacy["top_logprobs"] == [None] + [{chr(i): -i / 128} for i in ids[1:]]
    assert legacy["text_offset"] == list(range(len(ids)))


def loglikelihood(choice: dict, context_len: int) -> tuple[float, bool]:
    """What lm-eval's local-completions does with an answer (max_tokens 1, echo, logprobs 1)."""
    own = choice["logprobs"]["token_logprobs"][context_len:-1]
    tops = choice["logprobs"]["top_logprobs"][context_len:-1]
    return sum(own), all(token == max(top.values()) for token, top in zip(own, tops, strict=True))


async def test_loglikelihood_as_lm_eval_reads_it(client):
    prompts = [[*b"context", *b" next"], [*b"a", *b"bc"]]
    body = await post(client, COMPLETIONS, {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "seed": 1})
    found = [loglikelihood(c, n) for c, n in zip(body["choices"], (7, 1), strict=True)]
    assert found == [(sum(-t / 128 for t in b" next"), True), (sum(-t / 128 for t in b"bc"), True)]


async def test_text_offsets_point_into_the_text(client):
    text = "aé🙂z"
    for fields in ({"prompt": "=" + text, "max_tokens": 20}, {"prompt": "=" + text, "max_tokens": 0, "echo": True}):
        choice = (await post(client, COMPLETIONS, {**fields, "logprobs": 0}))["choices"][0]
        offsets = choice["logprobs"]["text_offset"]
        for token, offset in zip(choice["logprobs"]["tokens"], offsets, strict=True):
            if not token.startswith("bytes:") and token != "<end>":
                assert choice["text"][offset : offset + len(token)] == token
        assert offsets == sorted(offsets) and offsets[-1] <= len(choice["text"])
        assert "bytes:\\xc3" in choice["logprobs"]["tokens"]


async def test_streamed_legacy_logprobs_join_to_the_whole(client):
    fields = {"prompt": "=aé", "max_tokens": 9, "echo": True, "logprobs": 2}
    whole = (await post(client, COMPLETIONS, fields))["choices"][0]
    chunks = [c["choices"][0] for c in await events(client, COMPLETIONS, fields)]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for c in chunks for x in c["logprobs"][key]] == whole["logprobs"][key]
    assert "".join(c["text"] for c in chunks) == whole["text"]


async def test_stop_string_is_cut_and_named(client):
    body = await post(client, COMPLETIONS, {"prompt": "=one two", "stop": [" "], "max_tokens": 20})
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("one", "stop")
    assert body["choices"][0]["stop_reason"] == " "


async def test_prompt_logprobs_and_token_ids(client):
    fields = {"max_tokens": 1, "prompt_logprobs": 1, "return_token_ids": True}
    body = await post(client, COMPLETIONS, {"prompt": "ab", **fields})
    choice = body["choices"][0]
    assert choice["prompt_logprobs"] == [None, {"98": {"logprob": -98 / 128, "rank": 1, "decoded_token": "b"}}]
    assert choice["prompt_token_ids"] == [97, 98] and choice["token_ids"] == output_ids((97, 98), 1)
    body = await post(client, CHAT, chat("=a", prompt_logprobs=0, return_token_ids=True))
    assert body["prompt_logprobs"][1]["97"]["rank"] is None  # no alternatives were asked for
    assert body["prompt_token_ids"] == [61, 97] and body["choices"][0]["token_ids"] == [97, 257]


async def test_sampling_fields_reach_the_engine(client, engine: FakeEngine):
    sent = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.1, "seed": 5, "stop": ["x", "y"], "stop_token_ids": [3], "ignore_eos": True,
        "max_tokens": 4, "min_tokens": 2, "logit_bias": {"5": -100}, "allowed_token_ids": [1, 2],
        "include_stop_str_in_output": True, "skip_special_tokens": False,
    }  # fmt: skip
    await post(client, COMPLETIONS, {"prompt": "ab", "bad_words": ["q"], "cache_salt": "s", "logprobs": 3, **sent})
    request = engine.submitted[0]
    for name, value in sent.items():
        expected = {5: -100.0} if name == "logit_bias" else tuple(value) if isinstance(value, list) else value
        assert getattr(request.params, name) == expected, name
    assert request.params.logprobs == 3 and request.banned_token_ids == (ord("q"),)
    assert request.cache_salt == "s" and request.end_token_ids == (257,)


async def test_messages_with_text_parts_and_every_role(client, engine: FakeEngine):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    roles = ["system", "developer", "user", "assistant", "tool"]
    messages = [{"role": role, "content": parts} for role in roles]
    await post(client, CHAT, {"messages": messages, "max_completion_tokens": 1})
    assert bytes(engine.submitted[0].prompt_token_ids).decode() == "".join(f"{role}:a\nb;" for role in roles)


async def test_an_answer_can_be_sent_back_as_history(client):
    first = ChatCompletion.model_validate(await post(client, CHAT, chat("=hello")))
    history = [
        {"role": "user", "content": "x"},
        first.choices[0].message.model_dump(),
        {"role": "user", "content": "y"},
    ]
    await post(client, CHAT, {"messages": history, "max_tokens": 1})


async def test_tokenize_and_detokenize(client):
    body = await post(client, "/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert body == {
        "count": 3,
        "max_model_len": 4096,
        "tokens": [104, 195, 169],
        "token_strs": ["h", "\ufffd", "\ufffd"],
    }
    body = await post(client, "/tokenize", chat("hi", model="fake-model"))
    assert bytes(body["tokens"]) == b"user:hi;" and body["token_strs"] is None
    assert await post(client, "/detokenize", {"tokens": [104, 195, 169, 257]}) == {"prompt": "hé<end>"}


async def test_models(client):
    cards = (await client.get("/v1/models")).json()
    assert cards["object"] == "list"
    assert cards["data"][0] == (await client.get("/v1/models/fake-model")).json()
    assert (cards["data"][0]["id"], cards["data"][0]["max_model_len"]) == ("fake-model", 4096)
