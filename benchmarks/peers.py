"""Serving speed on the default model, next to llama.cpp, OpenVINO GenAI and transformers in the same run.

    make bench-peers               # or: python -m benchmarks.peers --help

Measures what a client of `octavo serve` feels at 1, 4 and 16 concurrent streams: output tokens
per second of all streams together, time to first token (TTFT) and time per token after it
(TPOT). Every request has 128 prompt tokens of real text and 128 output tokens (greedy, end
tokens ignored), arrives over HTTP and is streamed. Prefill is the prompt's tokens by the time to
the first token of a lone request.

Prompts differ from their first tokens on, within a run and between rounds, so no prefix cache
helps anyone. Every engine gets the same prompts and all cores, and runs alone. All weights come from
the default model's file: as it is ("int4": Q4_1), or expanded once, rounded to bfloat16, and
written as each engine reads them: bf16 (OpenVINO's reader has no bf16 and gets the same numbers as
float16), or quantized to 8 bits ("int8": Q8_0; ours packs its own way). Ours rounds activations to 8
bits in both, as the others do; "w8a16" and "w4a16" are ours with bfloat16 activations and LM head. OpenVINO and
transformers run in process, without HTTP, which is their best case; transformers on a static batch.

The counts of output tokens are checked for every request, and the greedy texts are compared with ours
at the same width (`text_agreement`: characters that agree before the first difference, a share of the
text; engines differ in the order of sums and in quantization, so it is not 1).

Writes benchmarks/results/<date>-<backend>-peers.json; the last line on stdout is the same JSON.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import engines, report
from benchmarks.client import Sample
from benchmarks.figures import figures, output_tokens_per_s
from benchmarks.load import Ask, whole
from benchmarks.prompts import Cutter
from benchmarks.serve import MIN_AGREEMENT, agreement
from benchmarks.weights import write_gguf, write_hf_folder
from engine.config import DEFAULT_MODEL, EngineOptions, cache_root
from engine.registry import resolve_model
from engine.text import Tokenizer, load_tokenizer

OURS: Mapping[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    # As OpenVINO and llama.cpp do: activations rounded to 8 bits, 32 of a row at a time, and the LM head in 8 bits.
    "int8": {"dtype": "bfloat16", "quantization": "w8a8_32", "quantize_lm_head": True},
    "int4": {"dtype": "bfloat16", "quantization": "w4a8_32", "quantize_lm_head": True},
    "w8a16": {"dtype": "bfloat16", "quantization": "int8"},
    "w4a16": {"dtype": "bfloat16", "quantization": "int4"},
    "f32": {"dtype": "float32"},
}
Start = Callable[[], AbstractContextManager[engines.Engine]]


@dataclass(frozen=True)
class Plan:
    """What is sent; round 0 warms up and is not counted."""

    levels: Mapping[int, list[list[Ask]]]  # streams -> rounds
    prefills: Mapping[int, list[Ask]]  # tokens -> one lone request a round


@dataclass(frozen=True)
class Measured:
    """Of one engine: the counted rounds' samples."""

    levels: Mapping[int, list[tuple[Sample, ...]]]
    prefills: Mapping[int, list[Sample]]


def make_plan(tokenizer: Tokenizer, args: argparse.Namespace) -> Plan:
    cutter, rounds = Cutter(tokenizer, args.seed), range(args.rounds + 1)
    levels = {
        level: [
            [Ask(cutter.cut(args.prompt_tokens), args.output_tokens) for _ in range(level * args.requests)]
            for _ in rounds
        ]
        for level in args.streams
    }
    return Plan(levels, {length: [Ask(cutter.cut(length), 1) for _ in rounds] for length in args.prefill})


def measure(name: str, engine: engines.Engine, plan: Plan) -> Measured:
    """Raises LoadError when a request fails or has another number of output tokens."""
    levels = {}
    for level, rounds in plan.levels.items():
        done = [whole(engine.run(asks, level)).samples for asks in rounds]
        levels[level] = done[1:]
        print(f"{name}: {level} streams: {speed(done[1:]):.1f} tok/s", file=sys.stderr)
    prefills = {
        length: [whole(engine.run([ask], 1)).samples[0] for ask in asks][1:] for length, asks in plan.prefills.items()
    }
    return Measured(levels, prefills)


def speed(rounds: Sequence[Sequence[Sample]]) -> float:
    """Output tokens a second: the median of the rounds."""
    return statistics.median(output_tokens_per_s(samples) for samples in rounds)


def row(rounds: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """Tokens a second of the median round; latencies over all requests."""
    every = figures([sample for samples in rounds for sample in samples])
    kept = ("requests", "ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99", "itl_ms_p99")
    return {"output_tokens_per_s": speed(rounds)} | {name: every[name] for name in kept if name in every}


def all_engines(args: argparse.Namespace, source: Path, folder: Path, tokenizer: Tokenizer) -> dict[str, Start]:
    """Name and width -> what starts the engine; it raises Unavailable when that cannot be had."""
    per_stream = max([2 * (args.prompt_tokens + args.output_tokens), *(length + 16 for length in args.prefill)])
    streams = max(args.streams)

    def written(kind: str) -> Path:
        target = folder / f"{kind}.gguf"
        if not target.exists():
            write_gguf(source, target, kind)
        return target

    def llamacpp(kind: str) -> Start:
        return lambda: engines.xllamacpp(source if kind == "q4_1" else written(kind), streams, per_stream)

    def openvino(kind: str, precision: str | None) -> Start:
        return lambda: engines.openvino(
            source if kind == "q4_1" else written(kind), streams, tokenizer, args.openvino_python, precision
        )

    def transformers() -> AbstractContextManager[engines.Engine]:
        python = engines.transformers_python(args.transformers_python)
        write_hf_folder(source, folder / "hf")
        return engines.transformers(python, folder / "hf", tokenizer)

    def octavo(width: str) -> Start:
        sizes: dict[str, Any] = {"max_num_seqs": streams, "max_model_len": per_stream}
        return lambda: engines.octavo(EngineOptions(**OURS[width], **sizes))

    found = {f"octavo {width}": octavo(width) for width in OURS}
    kinds = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_1"}
    found |= {f"llama.cpp {width}": llamacpp(kind) for width, kind in kinds.items()}
    kinds = {"bf16": ("f16", "bf16"), "int8": ("q8_0", None), "int4": ("q4_1", None), "f32": ("f16", "f32")}
    found |= {f"openvino {width}": openvino(*how) for width, how in kinds.items()}
    found["transformers bf16"] = transformers
    return {name: start for name, start in found.items() if any(name.startswith(word) for word in args.only)}


def run(args: argparse.Namespace) -> int:
    source = resolve_model(DEFAULT_MODEL, cache_root())
    tokenizer = load_tokenizer(source)
    plan = make_plan(tokenizer, args)
    versions = report.versions("octavo", "jax", "jaxlib")
    found: dict[str, Measured] = {}
    missing: dict[str, str] = {}
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        for name, start in all_engines(args, source, Path(folder), tokenizer).items():
            try:
                with start() as engine:
                    found[name] = measure(name, engine, plan)
                    versions |= engine.versions
            except engines.Unavailable as error:
                missing[name] = str(error)
                print(f"{name}: not measured: {error}", file=sys.stderr)
    facts = {"versions": versions, "not_measured": missing, "load_before": round(load_before, 2)}
    return conclude(args, found, facts)


def conclude(args: argparse.Namespace, found: Mapping[str, Measured], facts: dict[str, Any]) -> int:
    """Prints the tables, writes the result; exit code 1 when our texts agree with nobody's at the same width."""
    results = {
        name: {
            "streams": {level: row(rounds) for level, rounds in own.levels.items()},
            "prefill_tokens_per_s": {
                length: length / statistics.median(s.ttft_s for s in samples)
                for length, samples in own.prefills.items()
            },
        }
        for name, own in found.items()
    }
    print_tables(results, args)
    agree = {name: share for name, own in found.items() if (share := text_agreement(name, own, found)) is not None}
    good = not agree or max(agree.values()) >= MIN_AGREEMENT
    if not good:
        print(f"the texts agree with no other engine's: {agree}", file=sys.stderr)
    shape = {
        "model": DEFAULT_MODEL, "prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens,
        "rounds": args.rounds, "requests_per_stream": args.requests,
    }  # fmt: skip
    outcome = report.rounded({"engines": results, "text_agreement": agree, "texts_ok": good})
    report.finish("peers", args.backend, shape | facts | outcome, Path(args.result_dir))
    return 0 if good else 1


def text_agreement(name: str, own: Measured, found: Mapping[str, Measured]) -> float | None:
    """Mean share of our text at this width that agrees with theirs. None: ours itself, or nothing to compare with."""
    ours = found.get(f"octavo {name.split()[1]}")
    if ours is None or ours is own:
        return None
    shares = [
        agreement(a.text, b.text)
        for level, rounds in ours.levels.items()
        for mine, theirs in zip(rounds, own.levels[level], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    return sum(shares) / len(shares)


def print_tables(results: Mapping[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Streams: with our tokens a second over theirs at the same width. Then prefill."""
    rows = []
    for level in args.streams:
        for name, by in results.items():
            own, ours = by["streams"][level], results.get(f"octavo {name.split()[1]}")
            ratio = ours["streams"][level]["output_tokens_per_s"] / own["output_tokens_per_s"] if ours else None
            keys = ("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99", "itl_ms_p99")
            times = [f"{own[key]:.1f}" if key in own else "-" for key in keys]
            rows.append([name, level, f"{own['output_tokens_per_s']:.1f}", f"{ratio:.2f}" if ratio else "-", *times])
    header = ("engine", "streams", "tok/s", "octavo/it", "TTFT ms p50", "p99", "TPOT ms p50", "p99", "ITL p99")
    print(report.table(header, rows))
    prefill = [[name, *(f"{s:.0f}" for s in by["prefill_tokens_per_s"].values())] for name, by in results.items()]
    print(report.table(("prefill tok/s of", *(f"{length} tokens" for length in args.prefill)), prefill))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds a level; the median is reported")
    parser.add_argument("--requests", type=int, default=2, help="requests that each stream sends in a round")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 1500], help="prompt lengths to time alone")
    parser.add_argument("--seed", type=int, default=0, help="chooses the prompts")
    parser.add_argument("--backend", default="cpu", help="what octavo runs on; names the result file")
    parser.add_argument("--result-dir", default=str(report.RESULTS), help="where the result goes")
    parser.add_argument(
        "--only", nargs="*", default=["octavo", "llama.cpp", "openvino"],
        help="beginnings of names, as octavo or 'openvino int8'; transformers is left out by default",
    )  # fmt: skip
    parser.add_argument("--openvino-python", type=Path, help="a Python that has openvino-genai")
    parser.add_argument("--transformers-python", type=Path, help="a Python that has torch and transformers")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
