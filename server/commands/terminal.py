"""From sampling flags to a request body, and from a stream of chunks to text on the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

from engine.errors import OctavoError
from engine.request import SamplingParams
from server.commands.options import SAMPLING_HELP


class AnswerError(OctavoError):
    """The engine refused or failed a request; the message is the API's."""


def sampling_fields(params: SamplingParams) -> dict[str, Any]:
    """The flags as fields of a request body. None is left out: the API's default holds."""
    fields = {name: value for name, value in vars_of(params).items() if name in SAMPLING_HELP and value is not None}
    fields["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    return fields


def vars_of(params: SamplingParams) -> dict[str, Any]:
    return {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}


async def stream_text(chunks: AsyncIterator[dict[str, Any]], write: Callable[[str], None]) -> list[str]:
    """Writes the first choice as it comes; returns the text of every choice. Raises AnswerError."""
    texts: dict[int, list[str]] = {}
    async for chunk in chunks:
        if "error" in chunk:
            raise AnswerError(chunk["error"]["message"])
        for choice in chunk["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            texts.setdefault(choice["index"], []).append(text)
            if choice["index"] == 0:
                write(text)
    return ["".join(texts[index]) for index in sorted(texts)]


def write_now(text: str) -> None:
    print(text, end="", flush=True)
