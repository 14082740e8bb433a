"""The default model on a CPU by its kinds of weights, with the compiled kernels and with XLA's products, in turn.

    python -m benchmarks.native_kernels [--streams 1 4 16] [--rounds 5] [--only bfloat16 int4]

Offline, in one process: 128 tokens in, first with one token out, which times the prompts, then with 65, whose
difference times decoding. Wall time says what a user gets on a machine of one's own; processor time a token is also
good on a machine that others use. Results go to benchmarks/results/ and to the last line as JSON.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.offline import run_batch, tokenizer_of
from benchmarks.prompts import make_prompts
from benchmarks.report import finish, rounded, table, versions
from engine import LLM
from engine.config import DEFAULT_MODEL
from pallas_kernels.native import library

INPUT_TOKENS, OUTPUT_TOKENS = 128, 65
XLA = tuple(f"{op}=reference" for op in ("matmul", "quantized_matmul", "decode_attention", "prefill_attention"))
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16", "quantization": "none"},
    "float32": {"dtype": "float32", "quantization": "none"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
    "as in the file": {"dtype": "bfloat16", "quantization": "stored"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    name + end: kind | more for name, kind in KINDS.items() for end, more in (("", {}), (", XLA", {"kernel": XLA}))
}


@dataclass(frozen=True)
class Round:
    """Tokens a second and processor milliseconds a token, of prompts and of decoding."""

    prefill_tokens_per_s: float
    prefill_cpu_ms: float
    decode_tokens_per_s: float
    decode_cpu_ms: float


def measure(llm: LLM, prompts: list[list[int]]) -> Round:
    first, whole = run_batch(llm, prompts, 1), run_batch(llm, prompts, OUTPUT_TOKENS)
    read, written = sum(map(len, prompts)), len(prompts) * (OUTPUT_TOKENS - 1)
    cpu_ms = whole.cpu_ms_per_token * len(prompts) * OUTPUT_TOKENS - first.cpu_ms_per_token * len(prompts)
    return Round(
        read / first.wall_s,
        first.cpu_ms_per_token * len(prompts) / read,
        written / (whole.wall_s - first.wall_s),
        cpu_ms / written,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    sizes: dict[str, Any] = {"max_num_seqs": max(args.streams), "max_num_batched_tokens": 128, "max_model_len": 512}
    llms = {name: LLM(DEFAULT_MODEL, enable_prefix_caching=False, **sizes, **SETTINGS[name]) for name in args.only}
    tokenizer = tokenizer_of(next(iter(llms.values())))
    rows = []
    for streams in args.streams:
        found: dict[str, list[Round]] = {name: [] for name in llms}
        for seed in range(args.rounds):
            prompts = [list(p.token_ids) for p in make_prompts(tokenizer, INPUT_TOKENS, streams, seed)]
            for name, llm in llms.items():
                found[name].append(measure(llm, prompts))
        for name, rounds in found.items():
            medians = {field: median(getattr(r, field) for r in rounds) for field in Round.__dataclass_fields__}
            rows.append({"streams": streams, "setting": name} | rounded(medians))
    header = ["setting", "streams", *(name.replace("_", " ") for name in Round.__dataclass_fields__)]
    print(table(header, [[r["setting"], *(v for k, v in r.items() if k != "setting")] for r in rows]))
    facts = {"instruction_set": library().isa, "rounds": args.rounds, "versions": versions("jax", "jaxlib")}
    finish(
        "native-kernels", "cpu", facts | {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS, "rows": rows}
    )


if __name__ == "__main__":
    main()
