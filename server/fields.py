"""Which JSON fields mean what: supported, accepted without effect, or refused by name.

A field is never ignored in silence: either a request model applies it, or it stands in one of
the two tables below, or the request is answered with 400 and the field's name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from server.errors import ApiError

_ALWAYS_NEUTRAL: tuple[Any, ...] = (None, [], {})

# Fields that OpenAI or vLLM know and this server does not support yet -> the values, besides
# null and the empty list or object, that ask for nothing and therefore pass.
REFUSED: dict[str, tuple[Any, ...]] = {
    # tools and structure
    "tools": (),
    "tool_choice": ("none", "auto"),  # with no tools both mean: write text
    "functions": (),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "structural_tag": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json_object": (False,),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    # media and side services
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "prediction": (),
    "prompt_embeds": (),
    "mm_processor_kwargs": (),
    "media_io_kwargs": (),
    "documents": (),
    "store": (False,),
    "moderation": (),
    # reasoning
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "include_reasoning": (True,),
    "thinking_token_budget": (),
    # decoding that the engine does not do
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "logits_processors": (),
    "logit_processors": (),
    "logprob_token_ids": (),
    "repetition_detection": (),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "return_tokens_as_token_ids": (False,),
    "detokenize": (True,),
    "echo": (False,),  # completions have it; a chat has not
    # embeddings and reranking
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "input_type": (),  # Cohere's: a prompt of the model's authors in front of the text
    "late_chunking": (False,),
    "max_tokens_per_doc": (),
    "max_chunks_per_doc": (),
    "rank_fields": (),
    "activation": (True,),
    "use_activation": (True,),
    # templates and adapters
    "chat_template": (),  # a request never brings a template: it is code
    "lora": (),
    "lora_request": (),
    # scheduling and transport
    "priority": (0,),
    "service_tier": ("auto", "default"),
    "data_parallel_rank": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
}

# Fields that say something about the request and ask nothing of the answer -> their JSON type.
HINTS: dict[str, type] = {
    "user": str,  # for the operator's abuse tracking; we keep no such record
    "safety_identifier": str,  # the successor of `user`
    "metadata": dict,  # for stored completions, and we store none
    "prompt_cache_key": str,  # routes equal prefixes together; one engine needs no routing
    "prompt_cache_retention": str,  # a wish; the prefix cache keeps what it has room for
    "parallel_tool_calls": bool,  # without tools there is nothing to be parallel
}

# The same for the fields of one message.
MESSAGE_REFUSED: dict[str, tuple[Any, ...]] = {
    "tool_calls": (),
    "function_call": (),
    "audio": (),
    "refusal": ("",),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "annotations": (),  # null or empty in the messages that our own answers bring back
}

_TYPE_NAMES = {str: "a string", dict: "an object", bool: "a boolean"}


def supported(
    body: Mapping[str, Any], known: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]], where: str = ""
) -> dict[str, Any]:
    """The fields of `body` that a model with fields `known` applies; nulls mean "not given".

    `where` is the path of `body` in the request. Raises `ApiError` 400 with the field's path.
    """
    found = {}
    for name, value in body.items():
        path = f"{where}.{name}" if where else name
        if name in known:
            if value is not None:
                found[name] = value
        elif name in HINTS and not where:
            _check_hint(path, name, value)
        elif name in refused:
            _check_neutral(path, value, refused[name])
        else:
            raise _unknown(path, name, [*known, *refused])
    return found


def _check_neutral(path: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if any(_same(value, item) for item in (*_ALWAYS_NEUTRAL, *neutral)):
        return
    text = f"Unsupported parameter: '{path}' is not supported by this server."
    raise ApiError(400, text, param=path, code="unsupported_parameter")


def _same(value: Any, item: Any) -> bool:
    return type(value) is type(item) and value == item  # 1 is not True, and 0 is not False


def _check_hint(path: str, name: str, value: Any) -> None:
    kind = HINTS[name]
    if value is not None and not isinstance(value, kind):
        raise ApiError(400, f"Invalid '{path}': must be {_TYPE_NAMES[kind]}.", param=path, code="invalid_type")


def _unknown(path: str, name: str, names: list[str]) -> ApiError:
    shown = path if len(path) <= 100 else path[:100] + "..."
    close = difflib.get_close_matches(name, names, n=1) if len(name) <= 64 else []
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return ApiError(400, f"Unknown parameter: '{shown}'.{hint}", param=shown, code="unknown_parameter")
