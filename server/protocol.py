"""Bytes of a request body -> a checked request model, one class an endpoint.

Types and cross-field rules live here; the ranges of sampling fields are `SamplingParams`' own.
Knows nothing about tokenizers or the engine's state.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from engine.errors import InvalidParam
from engine.request import MAX_LOGPROBS, SamplingParams
from server.errors import ApiError
from server.fields import MESSAGE_REFUSED, REFUSED, supported

MAX_MESSAGES = 4096
MAX_NAME_CHARS = 256
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for the legacy endpoint

Prompt = str | tuple[int, ...]
MaxTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]

_NON_FINITE = re.compile(rb'"(\w{1,64})"\s*:\s*-?(?:NaN|Infinity|[0-9.]+[eE]\+?[0-9]{3,})')


def parse_prompts(value: Any) -> tuple[Prompt, ...]:
    """A string, a list of strings, token ids, or a list of such id lists."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) for item in value):
        return tuple(_token_ids(item) for item in value)
    return (_token_ids(value),)


def _token_ids(value: list[Any]) -> tuple[int, ...]:
    if not all(type(item) is int and 0 <= item < 2**31 for item in value):
        raise ValueError("items must be all strings, all token ids, or all lists of token ids")
    return tuple(value)


def str_or_list(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("must be a string or a list of strings")
    return tuple(items)


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError("must be an object from token id to bias")
    bias = {}
    for key, number in value.items():
        if not re.fullmatch(r"[0-9]{1,9}", key):
            raise ValueError("keys must be token ids")
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ValueError("values must be numbers")
        bias[int(key)] = float(number)
    return bias


# The template itself refuses names that it does not read and names that are its own.
TemplateKwargs = Annotated[
    dict[Name, bool | int | float | Annotated[str, Field(max_length=MAX_NAME_CHARS)]], Field(max_length=16)
]


_NOT_FOR_TEMPLATES = {"messages", "tools", "add_generation_prompt", "continue_final_message"}


class RequestModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    def check(self) -> None:
        """Rules between fields. Raises `InvalidParam`."""


class StreamOptions(RequestModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM: usage so far in every chunk
    include_obfuscation: bool = False  # pad chunks, so that their length does not tell the text's


class Message(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: Name | None = None
    tool_call_id: Name | None = None


class GenerationRequest(RequestModel):
    """The fields that chat and completions share. None: not given."""

    model: str | None = None
    n: int = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(str_or_list)] = ()
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: Annotated[dict[int, float], PlainValidator(_logit_bias)] = {}
    allowed_token_ids: list[int] | None = None
    bad_words: list[Name] = Field(default=[], max_length=300)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: Name | None = None
    return_token_ids: bool = False
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidParam("stream_options", "is only allowed with 'stream': true")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidParam("prompt_logprobs", "is not available with 'stream': true")

    @property
    def num_top(self) -> int | None:
        """Alternatives that the answer shows for each token; None: no logprobs at all."""
        raise NotImplementedError

    def sampling(self, max_tokens: int | None, **special: Any) -> SamplingParams:
        """Raises `InvalidParam` that names the field as the client spelled it."""
        names = {field.name for field in dataclasses.fields(SamplingParams)}
        values: dict[str, Any] = {name: getattr(self, name) for name in names & GenerationRequest.model_fields.keys()}
        values |= {"max_tokens": max_tokens, "logprobs": self.num_top}
        return SamplingParams(**(values | special))


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs = {}
    add_special_tokens: bool = False  # the template writes them

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise InvalidParam("top_logprobs", "needs 'logprobs': true")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise InvalidParam("max_tokens", "differs from max_completion_tokens; give one of them")
        _check_rendering(self)

    @property
    def num_top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(GenerationRequest):
    prompt: Annotated[tuple[Prompt, ...], PlainValidator(parse_prompts)]
    max_tokens: int | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool = True

    def check(self) -> None:
        super().check()
        if self.stream and self.echo and self.logprobs is not None and self.n > 1:
            raise InvalidParam("echo", "with logprobs and n above 1 is not available with 'stream': true")

    @property
    def num_top(self) -> int | None:
        return self.logprobs


class TokenizeRequest(RequestModel):
    """vLLM's two forms in one: a prompt, or messages to render."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs = {}
    return_token_strs: bool = False

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidParam("prompt", "give either prompt or messages")
        _check_rendering(self)


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class ReshardRequest(RequestModel):
    sharding: str  # as --sharding: a name, or a file of the server's machine


def _check_rendering(body: ChatRequest | TokenizeRequest) -> None:
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidParam("continue_final_message", "excludes add_generation_prompt")
    for name in _NOT_FOR_TEMPLATES & body.chat_template_kwargs.keys():
        raise InvalidParam(f"chat_template_kwargs.{name}", "cannot be set here")


def parse[T: RequestModel](cls: type[T], raw: bytes) -> T:
    """Raises `ApiError` or `InvalidParam`; each names the field that is wrong."""
    body = _load(raw)
    fields = supported(body, cls.model_fields, REFUSED)
    messages = fields.get("messages")
    if isinstance(messages, list) and "messages" in cls.model_fields:
        fields["messages"] = [_message(item, f"messages[{i}]") for i, item in enumerate(messages)]
    options = fields.get("stream_options")
    if isinstance(options, dict):
        fields["stream_options"] = supported(options, StreamOptions.model_fields, {}, "stream_options")
    try:
        model = cls.model_validate(fields)
    except ValidationError as error:
        raise _invalid(error, fields) from None
    model.check()
    return model


def _load(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        found = _NON_FINITE.search(raw)  # JSON has no NaN or Infinity, but Python's clients send them
        if found:
            name = found[1].decode()
            raise InvalidParam(name, "must be a finite number") from None
        raise ApiError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return body


def _message(value: Any, where: str) -> dict[str, Any]:
    """One message with its text parts joined. Parts other than text are refused."""
    if not isinstance(value, dict):
        raise InvalidParam(where, "must be an object")
    fields = supported(value, Message.model_fields, MESSAGE_REFUSED, where)
    if isinstance(fields.get("content"), list):
        parts = enumerate(fields["content"])
        fields["content"] = "\n".join(_text_part(part, f"{where}.content[{i}]") for i, part in parts)
    return fields


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise InvalidParam(where, "must be an object")
    if part.get("type") != "text":
        text = f"Unsupported content part: '{where}' is not of type 'text'."
        raise ApiError(400, text, param=where, code="unsupported_parameter")
    fields = supported(part, {"type": str, "text": str}, {}, where)
    if not isinstance(fields.get("text"), str):
        raise InvalidParam(f"{where}.text", "must be a string")
    return fields["text"]


def _invalid(error: ValidationError, body: dict[str, Any]) -> InvalidParam:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    return InvalidParam(_path(first["loc"], body, first["type"] == "missing"), reason)


def _path(loc: tuple[int | str, ...], value: Any, missing: bool) -> str:
    """'messages[0].role' from pydantic's location, without its names for the arms of a union."""
    path = ""
    for part in loc:
        is_name = isinstance(part, str) and isinstance(value, dict) and part in value
        is_index = isinstance(part, int) and isinstance(value, list)
        if not (is_name or is_index or (missing and part == loc[-1])):
            break
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
        value = value[part] if is_name or is_index else None  # type: ignore[index]
    return path
