"""What a decode step costs as the vocabulary and the pool of pages grow, on whatever device is there.

    python -m benchmarks.growth [--vocabulary 32000 64000 128000 256000] [--pages 1000 10000 100000]

A model of two narrow layers with random weights, so that what grows is not hidden behind products: embeddings, LM head
and sampler with the vocabulary, nothing with the pages. One axis at a time, 16 greedy sequences of 128 prompt tokens;
`benchmarks.steps` times the steps. Batch, context and waiting requests are axes of `octavo bench steps`.
Writes benchmarks/results/<date>-<backend>-growth.json; the last line on stdout is the same JSON.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.fake_device import MODEL as NARROW
from benchmarks.steps import Load, measure
from engine.config import EngineOptions
from engine.device import device_facts, keep_memory
from engine.executables import NoProgramCache, compile_all
from engine.loop import Engine
from engine.model.config import ModelConfig
from engine.programs import param_shapes, serving_programs
from engine.resolve import resolve
from engine.runner import Runner
from engine.stats import Counters

BATCH, CONTEXT = 16, 128
WIDTH, HEAD_DIM, LAYERS = 256, 64, 2
VOCABULARY, PAGES = 49152, 1000  # of the runs along the other axis


def random_engine(model: ModelConfig, num_pages: int) -> Engine:
    """Of weights that mean nothing; its thread is not started."""
    options = EngineOptions(
        max_num_seqs=BATCH, max_model_len=1024, max_num_batched_tokens=128, decode_steps=1, enable_prefix_caching=False
    )
    config = replace(resolve(options, model, "bfloat16", device_facts()), num_pages=num_pages)
    rng = np.random.default_rng(0)

    def random(leaf: jax.ShapeDtypeStruct) -> Any:
        return jax.device_put((0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype))

    params = jax.tree.map(random, param_shapes(model, config))
    executables = compile_all(serving_programs(model, config), NoProgramCache(), lambda phase, done, of: None)
    counters = Counters()
    runner = Runner(model, config, params, executables, counters)
    runner.warm_up()
    keep_memory()
    return Engine(config, runner, vocab_size=model.vocab_size, counters=counters)


def row(vocabulary: int, pages: int, steps: int) -> dict[str, Any]:
    model = replace(
        NARROW, vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=WIDTH, num_q_heads=WIDTH // HEAD_DIM,
        head_dim=HEAD_DIM, layers=NARROW.layers * LAYERS,
    )  # fmt: skip
    timed = measure(random_engine(model, pages), Load(BATCH, CONTEXT), steps)
    return {
        "vocabulary": vocabulary, "pages": pages, "device_us": round(timed.device_us, 1),
        "host_us": round(timed.host_us, 1), "python_ns": round(timed.python_ns, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[32_000, 64_000, 128_000, 256_000])
    parser.add_argument("--pages", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    points = [(size, PAGES) for size in args.vocabulary] + [(VOCABULARY, count) for count in args.pages]
    rows = [row(*point, args.steps) for point in points]
    print(report.table([name.removesuffix("_us") for name in rows[0]], [tuple(each.values()) for each in rows]))
    about = {"batch": BATCH, "context": CONTEXT, "width": WIDTH, "layers": LAYERS, "steps": args.steps}
    report.finish(
        "growth", device_facts().platform, about | {"rows": rows, "versions": report.versions("jax", "jaxlib")}
    )


if __name__ == "__main__":
    main()
