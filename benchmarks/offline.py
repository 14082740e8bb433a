"""Batches of equal greedy requests through an `LLM` in this process, timed."""

from __future__ import annotations

import time
from dataclasses import dataclass

from engine import LLM, SamplingParams
from engine.text import Tokenizer


@dataclass(frozen=True)
class Batch:
    """From the first submit to the last token."""

    tokens_per_s: float
    cpu_ms_per_token: float
    outputs: list[tuple[int, ...]]


def run_batch(llm: LLM, prompts: list[list[int]], output_tokens: int) -> Batch:
    """All prompts at once, each continued greedily for so many tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    found = llm.generate(prompts, params)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    count = len(prompts) * output_tokens
    return Batch(count / wall_s, 1e3 * cpu_s / count, [tuple(one.outputs[0].token_ids) for one in found])


def tokenizer_of(llm: LLM) -> Tokenizer:
    """RuntimeError without one."""
    if llm.engine.tokenizer is None:
        raise RuntimeError("the model has no tokenizer")
    return llm.engine.tokenizer
