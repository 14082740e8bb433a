"""Texts a second of all-MiniLM-L6-v2 on short texts, next to transformers in the same run.

    python -m benchmarks.embed             # --help; --transformers-python PYTHON adds the peer

Texts are English-like word sequences of about 10 and about 20 tokens ([CLS] and [SEP] included),
of mixed lengths. Octavo gets them as text through `LLM.embed`, tokenization included; the peer is
transformers on torch with the ids given, sorted by length into batches of 64 as
sentence-transformers does it, mean pooling and length one included. Rounds of both alternate on one
list, so that a machine that others use is shared fairly; the best and the median round are
reported, and CPU seconds, which tell more than the wall clock there. The embeddings of both must
agree to 1e-5 (cosine) in float32; in bfloat16 the agreement is reported.

Writes benchmarks/results/<date>-<backend>-embed.json; the last line on stdout is the same JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import engines, report
from engine import LLM
from engine.config import cache_root
from engine.registry import resolve_model

MODEL = "all-minilm-l6-v2"
TEXT = (
    "the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many"
)
WORDS = TEXT.split()
COSINE = 1e-5


@dataclass(frozen=True)
class Round:
    """One pass over all texts."""

    wall_s: float
    cpu_s: float
    embeddings: np.ndarray  # float32 [texts, numbers]


def make_texts(count: int, words: int, seed: int) -> list[str]:
    """Texts of words - 2 to words + 2 words, each of which is one token."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(words - 2, words + 3))) for _ in range(count)]


def octavo_round(llm: LLM, texts: Sequence[str]) -> Round:
    wall, cpu = time.perf_counter(), time.process_time()
    found = llm.embed(list(texts))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Round(wall, cpu, np.stack([one.outputs.embedding for one in found]))


@contextmanager
def transformers(python: Path, folder: Path, dtype: str) -> Iterator[Callable[[Sequence[Sequence[int]]], Round]]:
    """A worker under a Python that has torch; called with token ids."""
    worker = Path(__file__).parent / "transformers_embed_worker.py"
    # -P: the folder of the script is not searched for modules, where transformers would take our kernels.py.
    command = [str(python), "-P", str(worker), str(folder), str(os.cpu_count()), dtype]
    with engines.process(command, cwd=engines.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("the worker has no pipes")
        stdin, stdout = child.stdin, child.stdout
        stdout.readline()  # ready

        def run(ids: Sequence[Sequence[int]]) -> Round:
            stdin.write(json.dumps([list(row) for row in ids]) + "\n")
            stdin.flush()
            answer = json.loads(stdout.readline())
            return Round(answer["wall_s"], answer["cpu_s"], np.asarray(answer["embeddings"], np.float32))

        yield run


def figures(rounds: Sequence[Round], num_texts: int) -> dict[str, float]:
    return {
        "texts_per_s_best": round(num_texts / min(r.wall_s for r in rounds), 1),
        "texts_per_s_median": round(num_texts / statistics.median(r.wall_s for r in rounds), 1),
        "cpu_ms_per_text": round(1000 * statistics.median(r.cpu_s for r in rounds) / num_texts, 3),
    }


def furthest(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of a cosine from one."""
    wide = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(wide[0], axis=1) * np.linalg.norm(wide[1], axis=1)
    return float(np.max(1 - np.sum(wide[0] * wide[1], axis=1) / norms))


def measure(args: argparse.Namespace, dtype: str, folder: Path) -> dict[str, Any]:
    """Every length: our figures and the peer's, rounds of both in turn."""
    found: dict[str, Any] = {}
    start_s = time.perf_counter()
    with LLM(MODEL, dtype=dtype) as llm:
        found["ready_s"] = round(time.perf_counter() - start_s, 1)
        for words in args.words:
            texts = make_texts(args.texts, words, words)
            ids = [one.prompt_token_ids for one in llm.embed(texts)]  # a round that does not count
            before = llm.pooling_engine.stats()
            own, theirs = [], []
            if args.transformers_python is None:
                own = [octavo_round(llm, texts) for _ in range(args.rounds)]
            else:
                with transformers(args.transformers_python, folder, dtype) as peer:
                    peer(ids)
                    for _ in range(args.rounds):
                        own.append(octavo_round(llm, texts))
                        theirs.append(peer(ids))
            after = llm.pooling_engine.stats()
            used, padded = after.tokens_used - before.tokens_used, after.tokens_padded - before.tokens_padded
            entry: dict[str, Any] = {
                "tokens_per_text": round(statistics.mean(map(len, ids)), 1),
                "padding": round(padded / (used + padded), 4),
                "octavo": figures(own, len(texts)),
            }
            if theirs:
                entry["transformers"] = figures(theirs, len(texts))
                entry["cosine_from_one"] = furthest(own[-1].embeddings, theirs[-1].embeddings)
                if dtype == "float32" and entry["cosine_from_one"] > COSINE:
                    raise RuntimeError(f"embeddings are {entry['cosine_from_one']} from transformers'")
            found[f"{words}_words"] = entry
            print(f"{dtype}, {words} words: {entry}", file=sys.stderr)
    return found


def run(args: argparse.Namespace) -> int:
    folder = resolve_model(MODEL, cache_root())
    load = os.getloadavg()
    by_dtype = {dtype: measure(args, dtype, folder) for dtype in args.dtypes}
    rows = [
        [f"{dtype}, {entry['tokens_per_text']} tokens, {name}", *entry[name].values()]
        for dtype, lengths in by_dtype.items()
        for entry in lengths.values()
        if isinstance(entry, dict)
        for name in ("octavo", "transformers")
        if name in entry
    ]
    print(report.table(["", "best texts/s", "median", "CPU ms a text"], rows))
    result = {
        "command": " ".join(
            ["python", "-m", "benchmarks.embed", *(w if "/" not in w else "PATH" for w in sys.argv[1:])]
        ),
        "model": MODEL,
        "texts": args.texts,
        "rounds": args.rounds,
        "versions": report.versions("octavo", "jax", "jaxlib", "tokenizers"),
        "load_before_and_after": [round(load[0], 2), round(os.getloadavg()[0], 2)],
        "results": by_dtype,
    }
    report.finish("embed", jax.default_backend(), result)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", type=int, nargs="*", default=[8, 18])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--transformers-python", type=Path, help="a Python that has torch and transformers")
    return run(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
