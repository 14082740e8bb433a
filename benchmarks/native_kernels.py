"""The default model with the compiled CPU kernels and with XLA's products, in turn in one process.

    python -m benchmarks.native_kernels [--streams 1 4 16] [--rounds 5]

128 tokens in, 64 out, greedy, offline. Wall time says what a user gets on a machine of one's own;
processor time a token is also good on a machine that others use. Results go to
benchmarks/results/ and to the last line as JSON.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.prompts import make_prompts
from benchmarks.report import finish, table, versions
from engine import LLM, SamplingParams
from engine.config import DEFAULT_MODEL
from pallas_kernels.native import library

INPUT_TOKENS, OUTPUT_TOKENS = 128, 64
XLA = tuple(f"{op}=reference" for op in ("matmul", "quantized_matmul", "decode_attention", "prefill_attention"))
SETTINGS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, XLA": {"dtype": "bfloat16", "kernel": XLA},
    "float32": {"dtype": "float32"},
    "float32, XLA": {"dtype": "float32", "kernel": XLA},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int8, XLA": {"dtype": "bfloat16", "quantization": "int8", "kernel": XLA},
}


@dataclass(frozen=True)
class Round:
    """One batch of equal requests, from the first submit to the last token."""

    tokens_per_s: float
    cpu_ms_per_token: float


def measure(llm: LLM, prompts: list[list[int]]) -> Round:
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    llm.generate(prompts, params)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    count = len(prompts) * OUTPUT_TOKENS
    return Round(count / wall_s, 1e3 * cpu_s / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    sizes: dict[str, Any] = {"max_num_seqs": max(args.streams), "max_num_batched_tokens": 64, "max_model_len": 512}
    llms = {name: LLM(DEFAULT_MODEL, enable_prefix_caching=False, **sizes, **SETTINGS[name]) for name in args.only}
    tokenizer = next(iter(llms.values())).engine.tokenizer
    if tokenizer is None:
        raise RuntimeError("the default model has no tokenizer")
    rows = []
    for streams in args.streams:
        found: dict[str, list[Round]] = {name: [] for name in llms}
        for seed in range(args.rounds):
            prompts = [list(p.token_ids) for p in make_prompts(tokenizer, INPUT_TOKENS, streams, seed)]
            for name, llm in llms.items():
                found[name].append(measure(llm, prompts))
        for name, rounds in found.items():
            speed, cpu_ms = (
                median(getattr(r, field) for r in rounds) for field in ("tokens_per_s", "cpu_ms_per_token")
            )
            rows.append({"streams": streams, "setting": name, "tokens_per_s": speed, "cpu_ms_per_token": cpu_ms})
    shown = [[r["setting"], r["streams"], f"{r['tokens_per_s']:.1f}", f"{r['cpu_ms_per_token']:.1f}"] for r in rows]
    print(table(["setting", "streams", "tokens/s", "CPU ms a token"], shown))
    facts = {"instruction_set": library().isa, "rounds": args.rounds, "versions": versions("jax", "jaxlib")}
    finish(
        "native-kernels", "cpu", facts | {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS, "rows": rows}
    )


if __name__ == "__main__":
    main()
