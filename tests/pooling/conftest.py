"""One engine a fixture checkpoint for all tests here, each with a handful of small programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from engine import LLM
from tests.model.encoders import FOLDER

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 32, "compile_cache": False}


def opened(name: str, **options: Any) -> LLM:
    return LLM(str(FOLDER / name), **(OPTIONS | options))


@pytest.fixture(scope="session")
def bert() -> Iterator[LLM]:
    with opened("bert", max_model_len=60, is_matryoshka=True) as llm:
        yield llm


@pytest.fixture(scope="session")
def qwen() -> Iterator[LLM]:
    with opened("qwen3_embedding") as llm:
        yield llm


@pytest.fixture(scope="session")
def cross_encoder() -> Iterator[LLM]:
    with opened("bert_classifier") as llm:
        yield llm
