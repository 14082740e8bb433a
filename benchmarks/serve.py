"""Serving speed on the default model, next to llama.cpp and transformers in the same run.

    make bench                     # or: python -m benchmarks.serve --help

Measures what a client of `octavo serve` feels at 1, 4 and 16 concurrent streams: output tokens
per second of all streams together, time to first token (TTFT) and time per token after it
(TPOT). Every request has 128 prompt tokens of real text and 128 output tokens (greedy, end
tokens ignored), arrives over HTTP and is streamed. All streams of a round start at once, and
each sends its requests one after the other.

Prompts differ from their first tokens on, within a run and between rounds, so no prefix cache
helps anyone. Every engine gets the same prompts, all cores, and the same weights: the default
model's quantized tensors, expanded and rounded to bfloat16 once. llama.cpp is also measured on
the quantized file itself ("q4_1"), which reads a fifth of the bytes. transformers has no server
here: it runs one static batch, in process, which is its best case.

The counts of prompt and output tokens are checked for every request, and the greedy texts of
the engines are compared (`text_agreement`: characters that agree before the first difference,
a share of the text; engines differ in the order of bfloat16 sums, so it is not 1).

Writes benchmarks/results/<date>-<backend>-serve.json; the last line on stdout is the same JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from benchmarks import engines, report
from benchmarks.client import LoadError, Round, figures
from benchmarks.prompts import Prompt, make_prompts
from benchmarks.weights import write_bf16_gguf, write_hf_folder
from engine.config import DEFAULT_MODEL, EngineOptions, cache_root
from engine.registry import resolve_model
from engine.text import Tokenizer, load_tokenizer

MIN_AGREEMENT = 0.1  # below this the texts have nothing to do with each other


@dataclass(frozen=True)
class Plan:
    """What is sent: `prompts[level][round][stream][k]`; round 0 warms up and is not counted."""

    levels: tuple[int, ...]
    prompts: dict[int, list[list[list[Prompt]]]]
    num_tokens: int


def make_plan(tokenizer: Tokenizer, args: argparse.Namespace) -> Plan:
    rounds = args.rounds + 1
    count = sum(level * args.requests * rounds for level in args.streams)
    found = iter(make_prompts(tokenizer, args.prompt_tokens, count, args.seed))
    prompts = {
        level: [[[next(found) for _ in range(args.requests)] for _ in range(level)] for _ in range(rounds)]
        for level in args.streams
    }
    return Plan(tuple(args.streams), prompts, args.output_tokens)


def measure(name: str, engine: engines.Engine, plan: Plan) -> dict[int, list[Round]]:
    """The counted rounds of each level. Raises LoadError when a request has the wrong token counts."""
    found: dict[int, list[Round]] = {}
    for level in plan.levels:
        rounds = []
        for number, prompts in enumerate(plan.prompts[level]):
            done = engine.run(prompts, plan.num_tokens)
            check_counts(name, done, prompts, plan.num_tokens)
            if number:
                rounds.append(done)
        found[level] = rounds
        print(f"{name}: {level} streams: {figures(rounds)['output_tokens_per_s']} tok/s", file=sys.stderr)
    return found


def check_counts(name: str, done: Round, prompts: Sequence[Sequence[Prompt]], num_tokens: int) -> None:
    wanted = {len(p.token_ids) for own in prompts for p in own}
    for sample in done.samples:
        if sample.num_prompt_tokens not in wanted or sample.num_output_tokens != num_tokens:
            raise LoadError(
                f"{name}: a request had {sample.num_prompt_tokens} prompt and {sample.num_output_tokens} output "
                f"tokens, not {wanted} and {num_tokens}"
            )
        if not sample.text.strip():
            raise LoadError(f"{name}: an answer has no text")


def agreement(ours: dict[int, list[Round]], theirs: dict[int, list[Round]]) -> float:
    """Mean share of our text that agrees with theirs before the first difference."""
    shares = []
    for level, rounds in ours.items():
        for mine, other in zip(rounds, theirs[level], strict=True):
            for a, b in zip(mine.samples, other.samples, strict=True):
                same = takewhile(lambda pair: pair[0] == pair[1], zip(a.text, b.text, strict=False))
                shares.append(sum(1 for _ in same) / max(1, len(a.text)))
    return round(sum(shares) / len(shares), 3)


def peers(args: argparse.Namespace, source: Path, folder: Path, tokenizer: Tokenizer) -> dict[str, Callable[[], Any]]:
    """name -> function that starts the engine; it raises Unavailable when that cannot be had."""
    per_stream = 2 * (args.prompt_tokens + args.output_tokens)

    def llamacpp(path: Path) -> Callable[[], AbstractContextManager[engines.Engine]]:
        return lambda: engines.xllamacpp(path, max(args.streams), per_stream)

    def bf16() -> AbstractContextManager[engines.Engine]:
        target = folder / "bf16.gguf"
        write_bf16_gguf(source, target)
        return engines.xllamacpp(target, max(args.streams), per_stream)

    def transformers() -> AbstractContextManager[engines.Engine]:
        python = engines.transformers_python(args.transformers_python)
        write_hf_folder(source, folder / "hf")
        return engines.transformers(python, folder / "hf", tokenizer)

    every = {"llama.cpp bf16": bf16, "llama.cpp q4_1": llamacpp(source), "transformers bf16": transformers}
    return {name: start for name, start in every.items() if any(word in name for word in args.peers)}


def run(args: argparse.Namespace) -> int:
    source = resolve_model(DEFAULT_MODEL, cache_root())
    tokenizer = load_tokenizer(source)
    plan = make_plan(tokenizer, args)
    versions = report.versions("octavo", "jax", "jaxlib", "libtpu")
    rounds: dict[str, dict[int, list[Round]]] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        every: dict[str, Callable[[], Any]] = {"octavo bf16": lambda: engines.octavo(EngineOptions(dtype="bfloat16"))}
        every |= peers(args, source, Path(temporary), tokenizer)
        for name, start in every.items():
            try:
                with start() as engine:
                    rounds[name] = measure(name, engine, plan)
                    versions |= engine.versions
            except engines.Unavailable as error:
                missing[name] = str(error)
                print(f"{name}: not measured: {error}", file=sys.stderr)
    return conclude(args, rounds, missing, versions)


def conclude(
    args: argparse.Namespace,
    rounds: dict[str, dict[int, list[Round]]],
    missing: dict[str, str],
    versions: dict[str, str],
) -> int:
    """Prints the table, writes the result; exit code 1 when our texts agree with nobody's."""
    results = {name: {level: figures(r) for level, r in by.items()} for name, by in rounds.items()}
    ours = results["octavo bf16"]
    rows = []
    for level in args.streams:
        for name, by in results.items():
            f = by[level]
            ratio = f"{ours[level]['output_tokens_per_s'] / f['output_tokens_per_s']:.2f}"
            times = [f[key] for key in ("ttft_ms_p50", "ttft_ms_p95", "tpot_ms_p50", "tpot_ms_p95")]
            rows.append([name, level, f["output_tokens_per_s"], ratio, *times])
    header = ("engine", "streams", "tok/s", "octavo/it", "TTFT ms p50", "p95", "TPOT ms p50", "p95")
    print(report.table(header, rows))
    agree = {name: agreement(rounds["octavo bf16"], by) for name, by in rounds.items() if name != "octavo bf16"}
    same_weights = [share for name, share in agree.items() if "bf16" in name]
    good = not same_weights or max(same_weights) >= MIN_AGREEMENT
    if not good:
        print(f"the texts agree with no other engine's: {agree}", file=sys.stderr)
    shape = {
        "model": DEFAULT_MODEL, "prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens,
        "rounds": args.rounds, "requests_per_stream": args.requests, "versions": versions,
    }  # fmt: skip
    outcome = {"engines": results, "not_measured": missing, "text_agreement": agree, "texts_ok": good}
    report.finish("serve", args.backend, shape | outcome)
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds a level; the median is reported")
    parser.add_argument("--requests", type=int, default=2, help="requests that each stream sends in a round")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="chooses the prompts")
    parser.add_argument("--backend", default="cpu", help="what octavo runs on; names the result file")
    parser.add_argument(
        "--peers", nargs="*", default=["llama.cpp", "transformers"], help="words of names; none skips all"
    )
    parser.add_argument("--transformers-python", type=Path, help="a Python that has torch and transformers")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
