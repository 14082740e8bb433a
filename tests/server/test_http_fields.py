"""Every field: its limits, wrong types and neutral values; and no field ignored in silence."""

from __future__ import annotations

import json

import pytest

from engine.request import SamplingParams
from server.fields import HINTS, REFUSED
from server.protocol import ChatRequest, CompletionRequest
from tests.server.fakes import FakeEngine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BASE = {
    CHAT: {"messages": [{"role": "user", "content": "=a"}], "max_tokens": 2},
    COMPLETIONS: {"prompt": "=a", "max_tokens": 2},
}
MEGABYTE = "x" * 2**20
ANY_NUMBER = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "huge": 10**40}
NOT_A_NUMBER = ["", "1", MEGABYTE, True, [], {}, [1]]

# field -> accepted, refused (besides what no number may be)
NUMBERS: dict[str, tuple[list, list]] = {
    "temperature": ([0, 0.0, 1, 2, -0.0, 1e-9], [-0.001, 2.001, -1]),
    "top_p": ([1e-6, 0.5, 1, 1.0], [0, -0.1, 1.0001]),
    "min_p": ([0, 0.5, 1], [-0.1, 1.1]),
    "presence_penalty": ([-2, 0, 2], [-2.01, 2.01]),
    "frequency_penalty": ([-2, 0, 2], [-2.01, 2.01]),
    "repetition_penalty": ([0.001, 1, 1000], [0, -1, 1000.1]),
}
INTEGERS: dict[str, tuple[list, list]] = {
    "n": ([1, 8], [0, -1, 129, 2**31, 2**63]),
    "top_k": ([-1, 0, 1, 2**31 - 1], [-2, 2**31, 2**63]),
    "seed": ([-(2**63), 0, 2**63 - 1, 2**64 - 1], []),
    "max_tokens": ([1, 2, 4000], [-1, 2**31, 2**63]),
    "min_tokens": ([0, 1, 2], [-1, 3, 2**31]),  # above max_tokens, too
    "prompt_logprobs": ([0, 20], [-1, 21]),
}


async def refusal(client, path: str, content: bytes | str) -> dict:
    answer = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, (content[:200], answer.status_code, answer.text[:500])
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"] and len(error["message"]) < 3000
    return error


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", [*NUMBERS, *INTEGERS])
async def test_numbers(client, path, name):
    accepted, refused = (NUMBERS | INTEGERS)[name]
    for value in [*accepted, None]:
        answer = await client.post(path, json=BASE[path] | {name: value})
        assert answer.status_code == 200, (value, answer.text)
    wrong = [*refused, *ANY_NUMBER.values(), *NOT_A_NUMBER, *([0.5, 2.0] if name in INTEGERS else [])]
    for value in wrong:
        error = await refusal(client, path, json.dumps(BASE[path] | {name: value}))
        assert error["param"] == name, (value, error)


OTHERS = [
    # path, field, value, the path that the answer must name
    (CHAT, "messages", [], "messages"),
    (CHAT, "messages", "hi", "messages"),
    (CHAT, "messages", None, "messages"),
    (CHAT, "messages", ["hi"], "messages[0]"),
    (CHAT, "messages", [{"role": "robot", "content": "x"}], "messages[0].role"),
    (CHAT, "messages", [{"role": "user"}], "messages[0].content"),
    (CHAT, "messages", [{"role": "user", "content": 5}], "messages[0].content"),
    (CHAT, "messages", [{"role": "user", "content": "x", "colour": 1}], "messages[0].colour"),
    (CHAT, "messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    (CHAT, "messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
    (CHAT, "messages", [{"role": "user", "content": "x"}] * 4097, "messages"),
    (CHAT, "messages", [{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
    (CHAT, "max_tokens", 0, "max_tokens"),
    (CHAT, "max_completion_tokens", 3, "max_tokens"),  # differs from max_tokens 2
    (CHAT, "top_logprobs", 2, "top_logprobs"),  # without logprobs
    (CHAT, "top_logprobs", 21, "top_logprobs"),
    (CHAT, "logprobs", 1, "logprobs"),
    (CHAT, "chat_template_kwargs", {"messages": "x"}, "chat_template_kwargs.messages"),
    (CHAT, "chat_template_kwargs", {"tools": "x"}, "chat_template_kwargs.tools"),
    (CHAT, "chat_template_kwargs", {"enable_thinking": [1]}, "chat_template_kwargs.enable_thinking"),
    (CHAT, "chat_template_kwargs", {"other": 1}, "chat_template_kwargs"),
    (CHAT, "prompt", "x", "prompt"),
    (COMPLETIONS, "prompt", "", "prompt"),
    (COMPLETIONS, "prompt", [], "prompt"),
    (COMPLETIONS, "prompt", None, "prompt"),
    (COMPLETIONS, "prompt", [1, "a"], "prompt"),
    (COMPLETIONS, "prompt", [[1], []], "prompt"),
    (COMPLETIONS, "prompt", [True], "prompt"),
    (COMPLETIONS, "prompt", [1.0], "prompt"),
    (COMPLETIONS, "prompt", [260], "prompt"),
    (COMPLETIONS, "prompt", [-1], "prompt"),
    (COMPLETIONS, "prompt", {"a": 1}, "prompt"),
    (COMPLETIONS, "prompt", ["x"] * 257, "prompt"),
    (COMPLETIONS, "logprobs", 21, "logprobs"),
    (COMPLETIONS, "logprobs", True, "logprobs"),
    (COMPLETIONS, "messages", [], "messages"),
    (COMPLETIONS, "stop", [""], "stop"),
    (COMPLETIONS, "stop", "", "stop"),
    (COMPLETIONS, "stop", ["x"] * 17, "stop"),
    (COMPLETIONS, "stop", MEGABYTE, "stop"),
    (COMPLETIONS, "stop", [1], "stop"),
    (COMPLETIONS, "stop_token_ids", [-1], "stop_token_ids"),
    (COMPLETIONS, "stop_token_ids", [260], "stop_token_ids"),
    (COMPLETIONS, "stop_token_ids", ["a"], "stop_token_ids[0]"),
    (COMPLETIONS, "logit_bias", {"x": 1}, "logit_bias"),
    (COMPLETIONS, "logit_bias", {"1": 101}, "logit_bias"),
    (COMPLETIONS, "logit_bias", {"1": "1"}, "logit_bias"),
    (COMPLETIONS, "logit_bias", {"1": True}, "logit_bias"),
    (COMPLETIONS, "logit_bias", {"999": 1}, "logit_bias"),
    (COMPLETIONS, "logit_bias", {str(i): 1 for i in range(301)}, "logit_bias"),
    (COMPLETIONS, "logit_bias", [1], "logit_bias"),
    (COMPLETIONS, "allowed_token_ids", [], "allowed_token_ids"),
    (COMPLETIONS, "allowed_token_ids", [260], "allowed_token_ids"),
    (COMPLETIONS, "bad_words", ["two"], "bad_words"),
    (COMPLETIONS, "bad_words", [""], "bad_words[0]"),
    (COMPLETIONS, "stream", "yes", "stream"),
    (COMPLETIONS, "stream_options", {"include_usage": True}, "stream_options"),  # without stream
    (COMPLETIONS, "request_id", "a b", "request_id"),
    (COMPLETIONS, "request_id", MEGABYTE, "request_id"),
    (COMPLETIONS, "cache_salt", "", "cache_salt"),
    (COMPLETIONS, "user", 5, "user"),
    (COMPLETIONS, "model", 5, "model"),
    ("/tokenize", "prompt", None, "prompt"),
    ("/tokenize", "prompt", 5, "prompt"),
    ("/detokenize", "tokens", [260], "tokens"),
    ("/detokenize", "tokens", [-1], "tokens[0]"),
    ("/detokenize", "tokens", None, "tokens"),
]


@pytest.mark.parametrize(
    ("path", "name", "value", "param"), OTHERS, ids=[f"{p}-{n}-{str(v)[:24]}" for p, n, v, _ in OTHERS]
)
async def test_other_fields(client, engine: FakeEngine, path, name, value, param):
    error = await refusal(client, path, json.dumps(BASE.get(path, {}) | {name: value}))
    assert error["param"] == param, error
    assert engine.submitted == []


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", REFUSED)
async def test_unsupported_fields_are_refused_unless_they_ask_for_nothing(client, path, name):
    model = ChatRequest if path == CHAT else CompletionRequest
    if name in model.model_fields:
        return
    for value in [*REFUSED[name], None, []]:
        answer = await client.post(path, json=BASE[path] | {name: value})
        assert answer.status_code == 200, (value, answer.text)
    for value in ["something", 7, {"type": "json_object"}, [{"a": 1}]]:
        error = await refusal(client, path, json.dumps(BASE[path] | {name: value}))
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_every_field_of_the_sampler_has_a_door():
    """A field added to `SamplingParams` must be given a place here: applied or refused."""
    known = ChatRequest.model_fields.keys() | REFUSED.keys()
    assert {name for name in SamplingParams.__dataclass_fields__ if name not in known} == set()


@pytest.mark.parametrize("name", HINTS)
async def test_hints_are_accepted(client, name):
    value = {str: "x", dict: {"a": "b"}, bool: True}[HINTS[name]]
    assert (await client.post(CHAT, json=BASE[CHAT] | {name: value})).status_code == 200


async def test_unknown_field_names_the_nearest(client):
    error = await refusal(client, CHAT, json.dumps(BASE[CHAT] | {"temprature": 1}))
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")
    assert "Did you mean 'temperature'?" in error["message"]
    error = await refusal(client, CHAT, json.dumps(BASE[CHAT] | {MEGABYTE: 1}))
    assert len(error["param"]) <= 200


async def test_neutral_is_compared_with_its_type(client):
    """1 == True in Python; 'store': 0 is no false, and best_of true is no 1."""
    for name, value in (("store", 0), ("best_of", True), ("include_reasoning", 1)):
        assert (await refusal(client, COMPLETIONS, json.dumps(BASE[COMPLETIONS] | {name: value})))["param"] == name


async def test_combinations_that_a_stream_cannot_show(client):
    fields = {"stream": True, "prompt_logprobs": 1}
    assert (await refusal(client, COMPLETIONS, json.dumps(BASE[COMPLETIONS] | fields)))["param"] == "prompt_logprobs"
    fields = {"stream": True, "echo": True, "logprobs": 1, "n": 2}
    assert (await refusal(client, COMPLETIONS, json.dumps(BASE[COMPLETIONS] | fields)))["param"] == "echo"
    fields = {"stream": True, "stream_options": {"include_use": True}}
    error = await refusal(client, COMPLETIONS, json.dumps(BASE[COMPLETIONS] | fields))
    assert error["param"] == "stream_options.include_use" and "include_usage" in error["message"]


async def test_continue_final_message(client):
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert (await refusal(client, CHAT, json.dumps(BASE[CHAT] | both)))["param"] == "continue_final_message"
    assert (await client.post(CHAT, json=BASE[CHAT] | {"continue_final_message": True})).status_code == 200


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"5", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}'])
async def test_bodies_that_are_no_json_object(client, raw):
    error = await refusal(client, COMPLETIONS, raw)
    assert error["code"] == "invalid_json" and error["param"] is None


@pytest.mark.parametrize("word", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
async def test_non_finite_numbers_name_their_field(client, word):
    error = await refusal(client, COMPLETIONS, b'{"prompt": "x", "temperature": ' + word + b"}")
    assert error["param"] == "temperature" and "finite" in error["message"]


async def test_a_megabyte_of_text_is_an_answer_not_an_accident(client):
    error = await refusal(client, COMPLETIONS, json.dumps({"prompt": MEGABYTE}))
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    error = await refusal(client, CHAT, json.dumps({"messages": [{"role": "user", "content": MEGABYTE}]}))
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert (await client.post(COMPLETIONS, json=BASE[COMPLETIONS])).status_code == 200
