"""lm-evaluation-harness against the server: its numbers are the model's own log-probabilities.

The harness sends prompt and continuation as one prompt with echo, logprobs and one more token,
and sums the part that it asked about. It runs as its own program (`pip install ".[eval]"`, in an
environment of its own whose `lm_eval` is on PATH); what it does to an answer is tested without it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engine import LLM, SamplingParams
from tests.e2e.serving import MODEL, ROOT, Served

pytestmark = pytest.mark.model

TASKS = Path(__file__).parent / "lm_eval"
CLOSE = 5e-3  # of a sum over a continuation, in float32


def documents() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / "facts.jsonl").read_text().splitlines()]


def pairs() -> list[tuple[str, str]]:
    """(context, continuation) as octavo_facts.yaml makes them."""
    return [(f"Question: {doc['question']}\nAnswer:", f" {choice}") for doc in documents() for choice in doc["choices"]]


def encode_pair(llm: LLM, context: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of both together, and how many of them are the context's."""
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    whole = list(tokenizer.encode(context + continuation, add_special_tokens=False))
    return whole, len(tokenizer.encode(context, add_special_tokens=False))


def by_logits(llm: LLM, context: str, continuation: str) -> tuple[float, bool]:
    """Log-probability of the continuation, and whether greedy decoding would write it."""
    ids, start = encode_pair(llm, context, continuation)
    rows = llm.logits(ids[:-1])[start - 1 :].astype(np.float64)
    top = rows.max(-1)
    logprobs = rows - top[:, None] - np.log(np.exp(rows - top[:, None]).sum(-1))[:, None]
    mine = logprobs[np.arange(len(rows)), ids[start:]]
    return float(mine.sum()), bool((rows.argmax(-1) == ids[start:]).all())


def test_sum_of_echoed_logprobs(http: httpx.Client, llm: LLM) -> None:
    """What the harness does: entries [context:-1] of an echo, the last one being a token nobody asked for."""
    chosen = pairs()[::5]
    encoded = [encode_pair(llm, *pair) for pair in chosen]
    body = {"model": MODEL, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = http.post("/v1/completions", json=body | {"prompt": [ids for ids, _ in encoded]}).json()["choices"]
    greedy = []
    for pair, (ids, start), choice in zip(chosen, encoded, choices, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][start:-1]
        best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][start:-1]]
        assert len(logprobs) == len(ids) - start > 0
        want, is_greedy = by_logits(llm, *pair)
        assert abs(sum(logprobs) - want) < CLOSE
        assert (logprobs == best) == is_greedy
        greedy.append(is_greedy)
        text = http.post("/v1/completions", json=body | {"prompt": "".join(pair)}).json()["choices"][0]
        assert np.allclose(text["logprobs"]["token_logprobs"][start:-1], logprobs, atol=CLOSE)
    shifted = sum(choices[0]["logprobs"]["token_logprobs"][encoded[0][1] - 1 : -2])
    assert abs(shifted - by_logits(llm, *chosen[0])[0]) > CLOSE  # one place off is seen


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("lm_eval") is None, reason="lm_eval is not on PATH: pip install '.[eval]'")
@pytest.mark.parametrize("tokenizer", ["folder", "remote"])
def test_lm_eval(server: Served, llm: LLM, tmp_path: Path, tokenizer: str) -> None:
    """Every log-probability that the harness reports, and what it generates."""
    assert llm.engine.tokenizer is not None
    llm.engine.tokenizer.save(tmp_path / "tokenizer")
    options = {"model": MODEL, "base_url": f"{server.url}/v1/completions", "num_concurrent": 4}
    if tokenizer == "folder":
        options |= {"tokenizer_backend": "huggingface", "tokenizer": tmp_path / "tokenizer"}
    done = subprocess.run(
        ["lm_eval", "--model", "local-completions", "--tasks", "octavo_facts,octavo_words",
         "--include_path", str(TASKS), "--batch_size", "4", "--output_path", str(tmp_path / "out"), "--log_samples",
         "--model_args", ",".join(f"{name}={value}" for name, value in options.items())],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    samples = _samples(tmp_path / "out", "octavo_facts")
    found = [(float(value), greedy == "True") for s in samples for value, greedy in (r[0] for r in s["resps"])]
    wanted = [by_logits(llm, *pair) for pair in pairs()]
    assert np.allclose([f[0] for f in found], [w[0] for w in wanted], atol=CLOSE)
    assert [f[1] for f in found] == [w[1] for w in wanted]
    contexts = [f"Question: {doc['question']}\nAnswer:" for doc in documents()]
    params = SamplingParams(temperature=0, max_tokens=12, stop=("\n", "Question:"))
    words = [sample["resps"][0][0] for sample in _samples(tmp_path / "out", "octavo_words")]
    assert words == [result.outputs[0].text for result in llm.generate(contexts, params)]


def _samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
