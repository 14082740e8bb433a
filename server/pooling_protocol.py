"""Bodies of /v1/embeddings, /v1/rerank and /v1/score, checked. OpenAI's, Jina's and Cohere's, and vLLM's fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from engine.errors import InvalidParam
from server.protocol import Prompt, RequestModel, parse_prompts, str_or_list

MAX_TOP_N = 2**31 - 1
Texts = Annotated[tuple[str, ...], PlainValidator(str_or_list)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


def _documents(value: Any) -> tuple[str, ...]:
    """Strings, or objects with nothing but a text."""
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of strings or of objects with 'text'")
    return tuple(_document(item) for item in value)


def _document(item: Any) -> str:
    if isinstance(item, dict) and item.keys() == {"text"}:
        item = item["text"]
    if not isinstance(item, str):
        raise ValueError("items must be strings or objects with 'text' alone")
    return item


class PoolingModel(RequestModel):
    """What the three share."""

    model: str | None = None
    # vLLM's: cut longer texts to so many tokens instead of refusing them; -1: to what the model takes.
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    request_id: RequestId | None = None


class EmbeddingRequest(PoolingModel):
    input: Annotated[tuple[Prompt, ...], PlainValidator(parse_prompts)]
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    normalize: bool | None = None
    add_special_tokens: bool = True

    @property
    def num_texts(self) -> int:
        return len(self.input)


class RerankRequest(PoolingModel):
    query: str
    documents: Annotated[tuple[str, ...], PlainValidator(_documents)]
    top_n: Annotated[int, Field(ge=0, le=MAX_TOP_N)] = 0  # 0: all
    return_documents: bool = True

    @property
    def num_texts(self) -> int:
        return len(self.documents)


class ScoreRequest(PoolingModel):
    text_1: Texts
    text_2: Texts

    @property
    def num_texts(self) -> int:
        return max(len(self.text_1), len(self.text_2))

    def check(self) -> None:
        for name in ("text_1", "text_2"):
            if not getattr(self, name):
                raise InvalidParam(name, "must not be empty")
