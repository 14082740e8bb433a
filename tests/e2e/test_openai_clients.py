"""The `openai` package against a real server and the real model, sync and async, streaming and not.

Numbers are checked against the same model's logits in this process, in float32.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from engine import LLM, SamplingParams
from tests.e2e.serving import MODEL, Served

pytestmark = pytest.mark.model

MESSAGES: list[Any] = [{"role": "user", "content": "Name three colours and say why you like them."}]
PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 24}
SEEDED: dict[str, Any] = {"model": MODEL, "temperature": 1.0, "top_p": 0.95, "seed": 1234, "max_tokens": 24}
CLOSE = 2e-4  # of two float32 log-softmaxes over one model, batched differently


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))


def chat_ids(llm: LLM, messages: list[Any]) -> list[int]:
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    return list(tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False))


def events(text: str) -> Iterator[str]:
    """The data of each event of an SSE body, which must be nothing but events and comments."""
    *frames, rest = text.split("\n\n")
    assert rest == ""
    for frame in frames:
        if not frame.startswith(":"):
            assert frame.startswith("data: ") and "\n" not in frame
            yield frame.removeprefix("data: ")


# -- chat ---------------------------------------------------------------------------------------


def test_chat_is_what_the_engine_says(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    want = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=24))[0]
    choice = answer.choices[0]
    assert choice.message.content == want.outputs[0].text and choice.message.role == "assistant"
    assert choice.finish_reason == want.outputs[0].finish_reason == "length"
    assert answer.usage is not None and answer.model == MODEL and answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len(want.prompt_token_ids) == len(chat_ids(llm, MESSAGES))
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (24, len(want.prompt_token_ids) + 24)


def test_chat_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    stream = client.chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    *chunks, last = list(stream)
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    pieces = [item for c in chunks if (found := c.choices[0].logprobs) and found.content for item in found.content]
    wanted = whole.choices[0].logprobs
    assert wanted is not None and wanted.content is not None
    assert [item.token for item in pieces] == [item.token for item in wanted.content]
    assert np.allclose([p.logprob for p in pieces], [w.logprob for w in wanted.content], atol=CLOSE)
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    for chunk in client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY):
        assert "usage" not in chunk.model_fields_set


def test_stream_helper_accumulates(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(messages=MESSAGES, n=2, logprobs=True, **SEEDED) as stream:
        stream.until_done()
        final = stream.current_completion_snapshot
        with pytest.raises(openai.LengthFinishReasonError):  # the client's own word for a cut answer
            stream.get_final_completion()
    whole = client.chat.completions.create(messages=MESSAGES, n=2, **SEEDED)
    assert [c.message.content for c in final.choices] == [c.message.content for c in whole.choices]


def test_chat_logprobs_are_the_models(client: openai.OpenAI, llm: LLM) -> None:
    extra = {"return_token_ids": True}
    answer = client.chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=20, extra_body=extra, **GREEDY
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    ids = answer.choices[0].token_ids  # type: ignore[attr-defined]
    prompt = chat_ids(llm, MESSAGES)
    want = log_softmax(llm.logits([*prompt, *ids]))[len(prompt) - 1 : -1]
    assert len(found.content) == len(ids) == 24
    for row, token_id, item in zip(want, ids, found.content, strict=True):
        assert abs(item.logprob - row[token_id]) < CLOSE
        assert np.allclose([top.logprob for top in item.top_logprobs], np.sort(row)[::-1][:20], atol=CLOSE)
        assert item.top_logprobs[0].token == item.token  # greedy takes the best
        assert item.top_logprobs[0].bytes == item.bytes
    text = b"".join(bytes(item.bytes or ()) for item in found.content)
    assert text.decode() == answer.choices[0].message.content


def test_logprobs_of_a_sampled_token(client: openai.OpenAI, llm: LLM) -> None:
    """They are the model's own, before temperature: what vLLM gives."""
    extra = {"return_token_ids": True}
    answer = client.chat.completions.create(messages=MESSAGES, logprobs=True, extra_body=extra, **SEEDED)
    ids = answer.choices[0].token_ids  # type: ignore[attr-defined]
    prompt = chat_ids(llm, MESSAGES)
    want = log_softmax(llm.logits([*prompt, *ids]))[len(prompt) - 1 : -1]
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    got = [item.logprob for item in found.content]
    assert np.allclose(got, want[np.arange(len(ids)), ids], atol=CLOSE)
    assert all(item.top_logprobs == [] for item in found.content)


def test_choices_differ_and_the_first_is_the_only_one(client: openai.OpenAI) -> None:
    one = client.chat.completions.create(messages=MESSAGES, **SEEDED)
    two = client.chat.completions.create(messages=MESSAGES, n=2, **SEEDED)
    assert [c.index for c in two.choices] == [0, 1]
    assert two.choices[0].message.content == one.choices[0].message.content != two.choices[1].message.content
    assert one.usage is not None and two.usage is not None
    assert two.usage.prompt_tokens == one.usage.prompt_tokens
    other = client.chat.completions.create(messages=MESSAGES, **merged(SEEDED, {"seed": 5}))
    assert other.choices[0].message.content != one.choices[0].message.content


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_neighbours_change_nothing(aclient: openai.AsyncOpenAI, params: dict[str, Any]) -> None:
    """In float32 the tokens of a request are its own, whoever runs beside it."""

    async def ids(prompt: Any, **more: Any) -> list[int]:
        answer = await aclient.completions.create(
            prompt=prompt, extra_body={"return_token_ids": True}, **merged(params, {"max_tokens": 40}, more)
        )
        return answer.choices[0].token_ids  # type: ignore[attr-defined]

    alone = await ids(PROMPT)
    words = [f"{i} " + "Once upon a time there was a castle. " * (7 * i) for i in range(7)]
    neighbours = [ids(word, seed=i, temperature=0.1 * i, max_tokens=10 + 8 * i) for i, word in enumerate(words)]
    together, *_ = await asyncio.gather(ids(PROMPT), *neighbours)
    assert together == alone and len(alone) > 8


def test_stop_strings(client: openai.OpenAI) -> None:
    free = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    stop = free[9:14]
    for stream in (False, True):
        answer = client.completions.create(prompt=PROMPT, stop=[stop, "never said"], stream=stream, **GREEDY)
        choices = [c.choices[0] for c in answer] if stream else [answer.choices[0]]  # type: ignore[union-attr]
        assert "".join(c.text for c in choices) == free[: free.index(stop)]
        assert choices[-1].finish_reason == "stop" and choices[-1].stop_reason == stop  # type: ignore[attr-defined]
    kept = client.completions.create(
        prompt=PROMPT, stop=stop, extra_body={"include_stop_str_in_output": True}, **GREEDY
    )
    assert kept.choices[0].text == free[: free.index(stop) + len(stop)]


def test_logit_bias(client: openai.OpenAI, llm: LLM) -> None:
    extra = {"return_token_ids": True}
    free = client.completions.create(prompt=PROMPT, extra_body=extra, **GREEDY)
    first = free.choices[0].token_ids[0]  # type: ignore[attr-defined]
    banned = client.completions.create(prompt=PROMPT, logit_bias={str(first): -100}, extra_body=extra, **GREEDY)
    order = np.argsort(-llm.logits(free.choices[0].prompt_token_ids)[-1])  # type: ignore[attr-defined]
    ids = banned.choices[0].token_ids  # type: ignore[attr-defined]
    assert first == order[0] and ids[0] == order[1] and first not in ids
    forced = client.completions.create(prompt=PROMPT, logit_bias={"1234": 100}, extra_body=extra, **GREEDY)
    assert forced.choices[0].token_ids == [1234] * 24  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "penalties",
    [{"frequency_penalty": 1.5}, {"presence_penalty": 1.1}, {"extra_body": {"repetition_penalty": 1.3}}],
    ids=lambda found: next(iter(found)),
)
def test_penalties_by_hand(client: openai.OpenAI, llm: LLM, penalties: dict[str, Any]) -> None:
    """Greedy under a penalty, worked out token by token from the model's logits."""
    extra = {"return_token_ids": True, "ignore_eos": True} | penalties.get("extra_body", {})
    text = "one two one two one two one"
    answer = client.completions.create(
        prompt=text, **merged(GREEDY, penalties, {"max_tokens": 12, "extra_body": extra})
    )
    prompt = answer.choices[0].prompt_token_ids  # type: ignore[attr-defined]
    frequency, presence = penalties.get("frequency_penalty", 0.0), penalties.get("presence_penalty", 0.0)
    repetition = extra.get("repetition_penalty", 1.0)
    ids: list[int] = []
    for _ in range(12):
        logits = llm.logits([*prompt, *ids])[-1].astype(np.float64)
        seen = list({*prompt, *ids})
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / repetition, logits[seen] * repetition)
        for token, count in Counter(ids).items():
            logits[token] -= frequency * count + presence
        ids.append(int(logits.argmax()))
    assert answer.choices[0].token_ids == ids  # type: ignore[attr-defined]
    free = client.completions.create(
        prompt=text, extra_body={"return_token_ids": True}, **merged(GREEDY, {"max_tokens": 12})
    )
    assert free.choices[0].token_ids != ids  # type: ignore[attr-defined]


def test_max_completion_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=5, temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=5, max_tokens=6)
    assert refused.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=10**6)
    assert (refused.value.param, refused.value.code) == ("max_completion_tokens", "context_length_exceeded")


def test_chat_ends_by_itself(client: openai.OpenAI, llm: LLM) -> None:
    question: list[Any] = [{"role": "user", "content": "What is 1+1? Answer with one number only."}]
    answer = client.chat.completions.create(model=MODEL, messages=question, temperature=0)
    want = llm.chat(question, SamplingParams(temperature=0, max_tokens=None))[0].outputs[0]
    assert answer.choices[0].message.content == want.text and "<|im_end|>" not in want.text
    assert answer.choices[0].finish_reason == want.finish_reason == "stop"


def test_cached_prompt_is_told(client: openai.OpenAI, server: Served) -> None:
    long: list[Any] = [{"role": "user", "content": "Count the sheep. " * 30}]
    first = client.chat.completions.create(model=MODEL, messages=long, max_tokens=4, temperature=0)
    again = client.chat.completions.create(model=MODEL, messages=long, max_tokens=4, temperature=0)
    salted = client.chat.completions.create(
        model=MODEL, messages=long, max_tokens=4, temperature=0, extra_body={"cache_salt": "apart"}
    )
    cached = [a.usage.prompt_tokens_details.cached_tokens for a in (first, again, salted)]  # type: ignore[union-attr]
    assert again.usage is not None
    assert cached[1] == (again.usage.prompt_tokens - 1) // 16 * 16 and cached[2] == 0
    texts = {a.choices[0].message.content for a in (first, again, salted)}
    assert len(texts) == 1


# -- completions ----------------------------------------------------------------------------------


def test_completions_echo_and_logprobs(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.completions.create(
        prompt=PROMPT, echo=True, logprobs=3, extra_body={"return_token_ids": True}, **GREEDY
    )
    choice, found = answer.choices[0], answer.choices[0].logprobs
    assert found is not None and found.token_logprobs and found.tokens and found.top_logprobs and found.text_offset
    ids = [*choice.prompt_token_ids, *choice.token_ids]  # type: ignore[attr-defined]
    rows = log_softmax(llm.logits(ids))
    assert choice.text.startswith(PROMPT) and "".join(found.tokens) == choice.text
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    for i in range(1, len(ids)):
        assert abs(found.token_logprobs[i] - rows[i - 1][ids[i]]) < CLOSE
        top = sorted(found.top_logprobs[i].values(), reverse=True)[:3]
        assert np.allclose(top, np.sort(rows[i - 1])[::-1][:3], atol=CLOSE)
        assert choice.text[found.text_offset[i] :].startswith(found.tokens[i])
    assert found.text_offset == np.cumsum([0, *map(len, found.tokens[:-1])]).tolist()


def test_completions_of_nothing_but_the_prompt(client: openai.OpenAI) -> None:
    """lm-eval asks so: no token is generated, the prompt's logprobs are the answer."""
    answer = client.completions.create(
        model=MODEL, prompt=[PROMPT, "one two"], max_tokens=0, echo=True, logprobs=1, temperature=0
    )
    assert [c.text for c in answer.choices] == [PROMPT, "one two"]
    assert [c.finish_reason for c in answer.choices] == ["length", "length"]
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_completions_prompt_lists_and_ids(client: openai.OpenAI, http: httpx.Client) -> None:
    texts = [PROMPT, "one two three", "def main():"]
    singles = [client.completions.create(prompt=text, **GREEDY).choices[0].text for text in texts]
    ids = [http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in texts]
    for prompt in (texts, ids):
        answer = client.completions.create(prompt=prompt, **GREEDY)
        assert [c.text for c in answer.choices] == singles
        assert [c.index for c in answer.choices] == [0, 1, 2]
        assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, ids))
    assert client.completions.create(prompt=ids[0], **GREEDY).choices[0].text == singles[0]
    pairs = client.completions.create(prompt=texts, n=2, **SEEDED)
    assert [c.index for c in pairs.choices] == list(range(6))
    streamed: dict[int, str] = {}
    for chunk in client.completions.create(prompt=texts, stream=True, **GREEDY):
        streamed[chunk.choices[0].index] = streamed.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert [streamed[i] for i in range(3)] == singles


def test_completions_default_length(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 16


async def test_async_clients_stream_side_by_side(aclient: openai.AsyncOpenAI, llm: LLM) -> None:
    questions = [f"Tell me about the number {i}." for i in range(12)]

    async def one(question: str) -> str:
        stream = await aclient.chat.completions.create(
            messages=[{"role": "user", "content": question}], stream=True, **GREEDY
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    got = await asyncio.gather(*map(one, questions))
    chats: list[Any] = [[{"role": "user", "content": question}] for question in questions]
    want = llm.chat(chats, SamplingParams(temperature=0, max_tokens=24))
    assert got == [result.outputs[0].text for result in want]


# -- the wire -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_stream_has_one_ending_a_choice(http: httpx.Client, path: str) -> None:
    """Read as bytes, not through a client that forgives."""
    what = {"messages": MESSAGES} if "chat" in path else {"prompt": [PROMPT, "one two"]}
    num_choices = 3 if "chat" in path else 6
    body = what | {"n": 3, "stream": True, "seed": 3, "max_tokens": 9, "stream_options": {"include_usage": True}}
    answer = http.post(path, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["x-request-id"]
    *chunks, done = list(events(answer.text))
    assert done == "[DONE]" and answer.text.count("[DONE]") == 1
    parsed = [json.loads(chunk) for chunk in chunks]
    assert not any("error" in chunk for chunk in parsed)
    assert parsed[-1]["choices"] == [] and parsed[-1]["usage"]["completion_tokens"] <= 9 * num_choices
    ends = [c["index"] for chunk in parsed for c in chunk["choices"] if c["finish_reason"] is not None]
    assert sorted(ends) == list(range(num_choices))
    for index in range(num_choices):
        mine = [c for chunk in parsed for c in chunk["choices"] if c["index"] == index]
        assert mine[-1]["finish_reason"] is not None  # nothing comes after the ending
        if "chat" in path:
            assert [c["delta"].get("role") for c in mine] == ["assistant"] + [None] * (len(mine) - 1)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    card = client.models.retrieve(MODEL)
    assert card.object == "model" and card.max_model_len == 8192  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "model"),
        ({"suffix": "end"}, openai.BadRequestError, "suffix"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"logprobs": 21}, openai.BadRequestError, "logprobs"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"prompt": []}, openai.BadRequestError, "prompt"),
        ({"prompt": [10**6]}, openai.BadRequestError, "prompt"),
        ({"best_of": 2}, openai.BadRequestError, "best_of"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens"),
    ],
    ids=lambda found: next(iter(found)) if isinstance(found, dict) else "",
)
def test_error_classes(client: openai.OpenAI, fields: dict[str, Any], kind: type, param: str) -> None:
    with pytest.raises(kind) as refused:
        client.completions.create(**merged({"model": MODEL, "prompt": PROMPT}, fields))
    error = refused.value
    assert error.param == param and error.request_id and error.type == "invalid_request_error"
    assert param in error.message


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    for answer, status in ((http.get("/v1/nothing"), 404), (http.get("/v1/completions"), 405)):
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("text", ["The capital of France is", "naïve — 世界 🌍\n\ttabs", "<|im_start|>user", " "])
def test_tokenize_and_back(http: httpx.Client, llm: LLM, text: str) -> None:
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    assert found["tokens"] == list(tokenizer.encode(text)) and found["max_model_len"] == 8192
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}


def test_tokenize_messages(http: httpx.Client, llm: LLM) -> None:
    found = http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert found["tokens"] == chat_ids(llm, MESSAGES)
