"""Checkpoints with recurrent layers through the whole engine, from folder to tokens, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine import LLM, SamplingParams
from tests.model import models

pytestmark = pytest.mark.slow  # a minute of compiling each


@pytest.mark.parametrize("speculation", ["none", "ngram"])
@pytest.mark.parametrize("name", ["mamba2", "granitemoehybrid", "qwen3_next"])
def test_tokens_and_logits_are_transformers(name: str, speculation: str, tmp_path: Path) -> None:
    """In chunks of 32, several prompts at once, and again from checkpoints of the first time."""
    cases = models.expected(name)
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    with LLM(
        str(models.FOLDER / name),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=3,
        max_num_batched_tokens=32,
        page_size=8,
        decode_steps=2,
        speculation=speculation,
        state_checkpoints=12,
        cache_dir=str(tmp_path),
    ) as llm:
        assert llm.engine.config.state_checkpoints == 12
        first = llm.generate([case.prompt for case in cases], params)
        assert [result.outputs[0].token_ids for result in first] == [case.greedy for case in cases]
        again = llm.generate([case.prompt for case in cases], params)
        assert [result.outputs[0].token_ids for result in again] == [case.greedy for case in cases]
        assert [result.num_cached_tokens for result in again] == [0, 0, 8, 32, 96]
        verified = any(name.startswith("verify_") for name in llm.engine.stats().steps)
        assert verified == (speculation == "ngram")  # whether or not the text had anything to propose
        for case in cases[-2:]:
            logits = llm.logits(case.prompt)
            assert models.relative_error(np.asarray(logits)[case.positions], case.logits) < 1e-4
        assert llm.engine.counters.compiles_after_ready <= 1, "the program of logits, which is outside the set"
