"""What packing costs: perplexity of the default model with weights and KV cache in fewer bits.

    python -m benchmarks.perplexity [--pieces 24] [--only bfloat16 int4]

Logits of the engine's own prefill path, over pieces of 512 tokens of Python's
reference manual (nothing is calibrated, so any text is unseen by the quantizer). Beside it the
bytes that the weights take and the tokens that a KV cache of 1 GiB holds. Results go to
benchmarks/results/ and to the last line as JSON.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks.prompts import make_prompts
from benchmarks.report import finish, table, versions
from engine.batch import StepKey, step_layout
from engine.config import DEFAULT_MODEL, EngineOptions, cache_root
from engine.device import device_facts
from engine.executables import NoProgramCache, compile_all, compile_one
from engine.load import configure, load_params
from engine.model.weights import open_checkpoint
from engine.programs import empty_programs, logits_program, page_bytes
from engine.registry import resolve_model
from engine.runner import Runner
from engine.stats import Counters
from engine.text import load_tokenizer

PIECE_TOKENS = 512
GIB = 1 << 30
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {},
    "weights int8": {"quantization": "int8"},
    "weights fp8": {"quantization": "fp8"},
    "weights int4": {"quantization": "int4"},
    "w8a8": {"quantization": "w8a8"},
    "w8a8_32": {"quantization": "w8a8_32"},
    "w4a8_32": {"quantization": "w4a8_32"},
    "weights int8, head": {"quantization": "int8", "quantize_lm_head": True},
    "w8a8_32, head": {"quantization": "w8a8_32", "quantize_lm_head": True},
    "w4a8_32, head": {"quantization": "w4a8_32", "quantize_lm_head": True},
    "weights stored": {"quantization": "stored"},  # the default model's are Q4_1
    "KV int8": {"kv_cache_dtype": "int8"},
    "KV fp8 e4m3": {"kv_cache_dtype": "fp8_e4m3"},
    "KV fp8 e5m2": {"kv_cache_dtype": "fp8_e5m2"},
    "weights int8, KV int8": {"quantization": "int8", "kv_cache_dtype": "int8"},
}


class Scorer:
    """The model through one program of the paged prefill path, and no engine around it."""

    def __init__(self, model: str, setting: dict[str, Any]) -> None:
        options = EngineOptions(model=model, **{"dtype": "bfloat16", "max_model_len": PIECE_TOKENS} | setting)
        path = resolve_model(model, cache_dir=cache_root(options.cache_dir), revision=None)
        checkpoint = open_checkpoint(path)
        self.tokenizer = load_tokenizer(path)
        config = configure(options, [checkpoint], device_facts())
        self.num_pages = config.max_pages_per_seq
        self.config = replace(config, num_pages=1 + self.num_pages)
        params = load_params(checkpoint, self.config, lambda phase, done, of: None)
        empty = compile_all(
            empty_programs(checkpoint.config, self.config), NoProgramCache(), lambda phase, done, of: None
        )
        self.runner = Runner(checkpoint.config, self.config, params, empty, Counters())
        self.layout = step_layout(self.config, StepKey(PIECE_TOKENS, 0))
        self.executable = compile_one(logits_program(checkpoint.config, self.config, PIECE_TOKENS), NoProgramCache())

    def logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """float64 [tokens - 1]: of each token but the first, given those before it."""
        return self.all_logprobs(token_ids)[np.arange(len(token_ids) - 1), token_ids[1:]]

    def all_logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """float64 [tokens, vocab]: of every token after each of at most PIECE_TOKENS."""
        vector, fields = self.layout.pack()
        fields["tokens"][: len(token_ids)] = token_ids
        fields["q_len"][0] = len(token_ids)
        fields["block_table"][0] = 1 + np.arange(self.num_pages)
        logits = self.runner.token_logits(self.executable, vector)[: len(token_ids)].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def measure(model: str, setting: dict[str, Any], pieces: int) -> dict[str, Any]:
    """Perplexity over all predicted tokens of the pieces, and what the setting weighs."""
    scorer = Scorer(model, setting)
    prompts = make_prompts(scorer.tokenizer, PIECE_TOKENS, pieces, seed=0)
    logprobs = np.concatenate([scorer.logprobs(prompt.token_ids) for prompt in prompts])
    return {
        "perplexity": math.exp(-logprobs.mean()),
        "predicted_tokens": len(logprobs),
        "weight_bytes": scorer.runner.weight_bytes,
        "kv_tokens_per_gib": GIB // page_bytes(scorer.runner.model, scorer.config) * scorer.config.page_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--pieces", type=int, default=24, help=f"of {PIECE_TOKENS} tokens each")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), help="settings (default: all)")
    args = parser.parse_args()
    found = {}
    for name in args.only or SETTINGS:
        found[name] = measure(args.model, SETTINGS[name], args.pieces)
        print(f"{name}: {found[name]['perplexity']:.3f}", flush=True)
    rows = [
        (
            name,
            f"{row['perplexity']:.3f}",
            f"{row['weight_bytes'] / 1e6:.0f}",
            f"{row['kv_tokens_per_gib']:,}",
        )
        for name, row in found.items()
    ]
    print(table(("setting", "perplexity", "weights MB", "KV tokens a GiB"), rows))
    result = {"model": args.model, "pieces": args.pieces, "piece_tokens": PIECE_TOKENS, "settings": found}
    finish("perplexity", jax.default_backend(), result | {"versions": versions("jax", "jaxlib")})


if __name__ == "__main__":
    main()
