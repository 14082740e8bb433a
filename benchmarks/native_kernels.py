"""The default model with the compiled CPU kernels and with XLA's products, in turn in one process.

    python -m benchmarks.native_kernels [--streams 1 4 16] [--rounds 5]

128 tokens in, 64 out, greedy, offline. Wall time says what a user gets on a machine of one's own;
processor time a token is also good on a machine that others use. Results go to
benchmarks/results/ and to the last line as JSON.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from benchmarks.offline import Batch, run_batch, tokenizer_of
from benchmarks.prompts import make_prompts
from benchmarks.report import finish, table, versions
from engine import LLM
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    sizes: dict[str, Any] = {"max_num_seqs": max(args.streams), "max_num_batched_tokens": 64, "max_model_len": 512}
    llms = {name: LLM(DEFAULT_MODEL, enable_prefix_caching=False, **sizes, **SETTINGS[name]) for name in args.only}
    tokenizer = tokenizer_of(next(iter(llms.values())))
    rows = []
    for streams in args.streams:
        found: dict[str, list[Batch]] = {name: [] for name in llms}
        for seed in range(args.rounds):
            prompts = [list(p.token_ids) for p in make_prompts(tokenizer, INPUT_TOKENS, streams, seed)]
            for name, llm in llms.items():
                found[name].append(run_batch(llm, prompts, OUTPUT_TOKENS))
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
