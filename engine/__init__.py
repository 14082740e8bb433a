"""Octavo's engine: `from engine import LLM, SamplingParams`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.request import SamplingParams

if TYPE_CHECKING:
    from engine.llm import LLM, CompletionOutput, RequestOutput

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """`LLM` loads JAX, which takes a second: only who asks for it pays."""
    if name in __all__:
        import engine.llm

        return getattr(engine.llm, name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
