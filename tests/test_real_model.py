"""The embedded default model against transformers in float32 (fixtures/make_real_model.py).

40 prompts of 1 to 1,500 tokens, raw and chat-templated, through the serving path: paged
prefill in chunks, batched decode, prefix cache and all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.config import EngineOptions
from engine.load import tokenizer_of
from tests.e2e.serving import MODEL, OPTIONS

FIXTURE = Path(__file__).parent / "fixtures" / "real_model.npz"
TOLERANCE = 1e-3  # of the norm of the logits, and the margin under which two tokens count as a tie

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURE))


@pytest.fixture(scope="module")
def prompts(expected: dict[str, np.ndarray]) -> list[list[int]]:
    ends = np.cumsum(expected["lengths"])
    return [part.tolist() for part in np.split(expected["tokens"], ends[:-1])]


@pytest.fixture(scope="module")
def llm(default_model_path: Path) -> Iterator[LLM]:
    with LLM(MODEL, **OPTIONS) as model:
        yield model


@pytest.mark.slow
def test_next_token_logits(llm: LLM, prompts: list[list[int]], expected: dict[str, np.ndarray]) -> None:
    for i, prompt in enumerate(prompts):
        logits = llm.logits(prompt)[-1].astype(np.float64)
        for name, got in (("sampled", logits[expected["sample"]]), ("top", logits[expected["top_ids"][i]])):
            want = expected[name][i]
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            assert error < TOLERANCE, (i, len(prompt), name, error)
        logsumexp = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
        assert abs(logsumexp - expected["logsumexp"][i]) < TOLERANCE * abs(logsumexp)


@pytest.mark.slow
def test_logits_of_a_shifted_prompt_differ(llm: LLM, prompts: list[list[int]], expected: dict[str, np.ndarray]) -> None:
    """The comparison can fail: one token too few is far outside the tolerance."""
    got = llm.logits(prompts[20][:-1])[-1][expected["sample"]]
    want = expected["sampled"][20]
    assert np.linalg.norm(got - want) / np.linalg.norm(want) > 10 * TOLERANCE


@pytest.mark.slow
def test_greedy_tokens(llm: LLM, prompts: list[list[int]], expected: dict[str, np.ndarray]) -> None:
    """64 tokens each, all prompts at once; they may part only where the best two logits are a tie."""
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    results = llm.generate(prompts, params)
    for i, result in enumerate(results):
        got, want = np.array(result.outputs[0].token_ids), expected["greedy"][i]
        if not np.array_equal(got, want):
            first = int(np.argmax(got != want))
            assert expected["margin"][i][first] < TOLERANCE * np.abs(expected["top"][i]).max(), (i, first)


def test_chat_template_and_tokenizer(
    default_model_path: Path, prompts: list[list[int]], expected: dict[str, np.ndarray]
) -> None:
    """The templated prompts of the fixture were tokenized by transformers."""
    questions = expected["questions"].tolist()
    tokenizer = tokenizer_of(EngineOptions(), default_model_path)
    for question, want in zip(questions, prompts[-len(questions) :], strict=True):
        text = tokenizer.render_chat([{"role": "user", "content": question}])
        assert tokenizer.encode(text, add_special_tokens=False) == want
